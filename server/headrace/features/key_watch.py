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

    def key_written(self, key: bytes) -> None:
        """Be told of a key that has been written, removed or has expired."""
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
                    if server not in servers or one.is_stopped:
                        one.stop()
                        del self._watches[server]
                for server in servers - self._watches.keys():
                    self._watches[server] = _ServerWatch(server, self._prefixes, self._listener)


class _ServerWatch:
    """Listens to one server, from construction to `stop`."""

    def __init__(self, server: RedisPool, prefixes: Sequence[bytes], listener: Listener) -> None:
        self.is_heard = False
        self._server = server
        self._prefixes = prefixes
        self._listener = listener
        self._stopping = threading.Event()
        self._is_refused = False
        threading.Thread(target=self._run, name="key-watch-server", daemon=True).start()

    @property
    def is_stopped(self) -> bool:
        return self._stopping.is_set()

    def stop(self) -> None:
        self._stopping.set()

    def _run(self) -> None:
        host, port = self._server.address
        while not self.is_stopped:
            try:
                connection = self._subscribe()
                try:
                    self._listen(connection)
                finally:
                    connection.close()
            except hiredis.ReplyError as error:
                if not self._is_refused:
                    self._is_refused = True
                    _log.warning("key_watch_refused", host=host, port=port, reason=str(error))
                self._stopping.wait(REFUSED_RETRY_S)
            except OSError as error:
                if self.is_heard:
                    _log.warning("key_watch_lost", host=host, port=port, reason=str(error))
                self._stopping.wait(RETRY_S)
            finally:
                self.is_heard = False

    def _subscribe(self) -> RedisConnection:
        deadline_s = time.monotonic() + CONNECT_TIMEOUT_S
        connection = self._server.open(deadline_s)
        try:
            prefixes = [word for prefix in self._prefixes for word in (b"PREFIX", prefix)]
            tracking = (b"CLIENT", b"TRACKING", b"ON", b"BCAST", *prefixes)
            for words in ((b"HELLO", b"3"), tracking):
                _command(connection, words, deadline_s)
        except BaseException:
            connection.close()
            raise
        return connection

    def _listen(self, connection: RedisConnection) -> None:
        # Only now: what was written while nobody listened is on no message.
        self._listener.writes_missed()
        self.is_heard = True
        reader = hiredis.Reader()
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
        try:
            reader.feed(data)
            while (message := reader.gets()) is not False:
                if not isinstance(message, list) or message[:1] != [b"invalidate"]:
                    continue  # a pong
                if message[1] is None:
                    self._listener.writes_missed()  # everything is gone
                else:
                    for key in message[1]:
                        self._listener.key_written(key)
        except (hiredis.ProtocolError, IndexError, TypeError) as error:
            raise ConnectionError("messages are not understood") from error


def _command(connection: RedisConnection, words: Sequence[bytes], deadline_s: float) -> None:
    reply = connection.command(*words, deadline_s=deadline_s)
    if isinstance(reply, hiredis.ReplyError):
        raise reply
