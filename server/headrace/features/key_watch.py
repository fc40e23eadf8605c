"""Hears from Redis which keys are written, so that what was read of them can be forgotten at once.

A connection of its own to each server asks for that in broadcast mode: the server remembers
nothing of what was read, and reading connections know nothing of it.

What is heard only makes forgetting sooner. A server that cannot be heard, or a message on its way
for too long, leaves rows as old as their age allows, and no older.

Source: https://valkey.io/topics/client-side-caching/, "Broadcasting mode".
"""

import threading
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import hiredis
import structlog

from headrace.features.redis_connection import RedisConnection
from headrace.features.redis_errors import error_word
from headrace.features.redis_pool import RedisPool

CONNECT_TIMEOUT_S = 1.0
PING_PERIOD_S = 1.0
SILENCE_MAX_S = 3.0
"""A server that does not even answer pings for so long is connected to anew."""

RETRY_S = 1.0
REFUSED_RETRY_S = 60.0
"""After a server that says that it will not: too old, or not for this user."""

_PING = b"*1\r\n$4\r\nPING\r\n"
_log = structlog.get_logger(__name__)


class Listener(Protocol):
    """Who is told. Called by the threads that hear."""

    def keys_written(self, keys: Sequence[bytes]) -> None:
        """Be told of keys that have been written or removed, or expired: all that came at once."""
        ...

    def writes_missed(self) -> None:
        """Be told that keys may have been written without a word, up to now."""
        ...


class KeyWatch:
    """
    Listens to every server of a topology, with a thread per server and one that keeps count.

    Args:
        servers: Returns those that are read, which may change; OSError if it cannot tell.
        listener: Who is told.
    """

    def __init__(self, servers: Callable[[], Sequence[RedisPool]], listener: Listener) -> None:
        self._servers = servers
        self._listener = listener
        self._prefixes: tuple[bytes, ...] = ()
        self._watches: dict[RedisPool, _ServerWatch] = {}
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def is_listening(self) -> bool:
        """Whether every server is heard; False while nothing is watched."""
        with self._lock:
            return bool(self._watches) and all(one.is_heard for one in self._watches.values())

    def watch(self, prefix: bytes) -> None:
        """Hear of keys that begin so, besides those watched already; returns before it does."""
        with self._lock:
            if prefix in self._prefixes or self._stopping.is_set():
                return
            self._prefixes = (*self._prefixes, prefix)
            for one in self._watches.values():
                one.stop()  # and another takes its place, with all prefixes
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="key-watch", daemon=True)
                self._thread.start()

    def close(self) -> None:
        """Stop listening; the threads end within `SILENCE_MAX_S`."""
        self._stopping.set()
        with self._lock:
            for one in self._watches.values():
                one.stop()

    def _run(self) -> None:
        while not self._stopping.wait(RETRY_S / 4):
            try:
                servers = set(self._servers())
            except OSError:
                continue  # whoever reads hears of that
            with self._lock:
                if self._stopping.is_set():
                    return
                for server, one in list(self._watches.items()):
                    # By Sentinel the same server may be somewhere else now.
                    has_moved = one.location not in {None, server.location}
                    if server not in servers or has_moved or one.is_stopped:
                        one.stop()
                        del self._watches[server]
                for server in servers - self._watches.keys():
                    self._watches[server] = _ServerWatch(server, self._prefixes, self._listener)


class _ServerWatch:
    """
    Listens to one server, from construction to `stop`.

    Attributes:
        is_heard: Whether it tells of writes now.
        location: Where the server was when it was connected to; None before.
    """

    def __init__(self, server: RedisPool, prefixes: Sequence[bytes], listener: Listener) -> None:
        self.is_heard = False
        self.location: tuple[str, int] | None = None
        self._server = server
        self._prefixes = prefixes
        self._listener = listener
        self._stopping = threading.Event()
        self._is_refused = self._is_lost = False
        threading.Thread(target=self._run, name="key-watch-server", daemon=True).start()

    @property
    def is_stopped(self) -> bool:
        return self._stopping.is_set()

    def stop(self) -> None:
        self._stopping.set()

    def _run(self) -> None:
        while not self.is_stopped:
            try:
                connection, reader = self._subscribe()
                try:
                    self._listen(connection, reader)
                finally:
                    connection.close()
            except hiredis.ReplyError as error:
                host, port = self.location or self._server.location
                if not self._is_refused:
                    self._is_refused = True
                    _log.warning(
                        "key_watch_refused", host=host, port=port, reason=error_word(error)
                    )
                self._stopping.wait(REFUSED_RETRY_S)
            except OSError as error:
                host, port = self.location or self._server.location
                if self.is_heard or not self._is_lost:
                    self._is_lost = True  # said once until it is heard again
                    event = "key_watch_lost" if self.is_heard else "key_watch_failed"
                    _log.warning(event, host=host, port=port, reason=str(error))
                self._stopping.wait(RETRY_S)
            finally:
                self.is_heard = False

    def _subscribe(self) -> tuple[RedisConnection, hiredis.Reader]:
        """Return a connection on which writes are told, and what has come on it already."""
        deadline_s = time.monotonic() + CONNECT_TIMEOUT_S
        connection = self._server.open(deadline_s)
        self.location = connection.address
        try:
            return connection, _begin_tracking(connection, self._prefixes, deadline_s)
        except BaseException:
            connection.close()
            raise

    def _listen(self, connection: RedisConnection, reader: hiredis.Reader) -> None:
        # Only now: what was written while nobody listened is on no message.
        self._listener.writes_missed()
        self.is_heard, self._is_lost = True, False
        heard_s = pinged_s = time.monotonic()
        while not self.is_stopped:
            now_s = time.monotonic()
            if now_s > heard_s + SILENCE_MAX_S:
                raise TimeoutError("the server is silent")
            if now_s >= pinged_s + PING_PERIOD_S:
                connection.send_only(_PING, now_s + PING_PERIOD_S)
                pinged_s = now_s
            try:
                data = connection.receive_some(now_s + PING_PERIOD_S / 4)
            except TimeoutError:
                continue
            heard_s = time.monotonic()
            self._hand_on(reader, data)

    def _hand_on(self, reader: hiredis.Reader, data: bytes) -> None:
        """Tell of all that has come, at once."""
        keys: list[bytes] = []
        try:
            reader.feed(data)
            while (message := reader.gets()) is not False:
                if not isinstance(message, list) or message[:1] != [b"invalidate"]:
                    continue  # a pong
                if message[1] is None:
                    self._listener.writes_missed()  # everything is gone
                else:
                    keys += message[1]
        except (hiredis.ProtocolError, IndexError, TypeError) as error:
            raise ConnectionError("messages are not understood") from error
        if keys:
            self._listener.keys_written(keys)


def _begin_tracking(
    connection: RedisConnection, prefixes: Sequence[bytes], deadline_s: float
) -> hiredis.Reader:
    """
    Ask to be told of keys that begin so; return the reader that has what has come already.

    Raises:
        hiredis.ReplyError: the server will not.
        OSError: the connection failed.
    """
    hello = connection.command(b"HELLO", b"3", deadline_s=deadline_s)
    if isinstance(hello, hiredis.ReplyError):
        raise hello
    words = [word for prefix in prefixes for word in (b"PREFIX", prefix)]
    tracking = hiredis.pack_command((b"CLIENT", b"TRACKING", b"ON", b"BCAST", *words))
    connection.send_only(tracking, deadline_s)
    # From here on messages come, behind the reply and in the same breath: another command, with
    # which `RedisConnection` makes sure of its replies, would have them among its own.
    reader = hiredis.Reader()
    try:
        while (reply := reader.gets()) is False:
            reader.feed(connection.receive_some(deadline_s))
    except hiredis.ProtocolError:
        raise ConnectionError("messages are not understood") from None
    if isinstance(reply, hiredis.ReplyError):
        raise reply
    if reply != b"OK":
        raise ConnectionError("the reply to CLIENT TRACKING is not understood")
    return reader
