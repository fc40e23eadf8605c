"""One connection to a Redis server, and how to open it.

Every exchange ends with an ECHO of a token that nobody else can know. The token is how the end of
the replies is found without parsing them, and it is the proof that they answer these commands: a
connection that is out of step can give an error, never another entity's features.

Opening blocks; what follows does not, so that one thread can wait for several servers at once.

Source: RESP2 (https://valkey.io/topics/protocol/).
"""

import secrets
import select
import socket
import ssl
import time
from collections.abc import Sequence
from typing import Any

import hiredis

from headrace.features.redis_errors import OversizedReplyError, error_word
from headrace.features.redis_options import RedisOptions

MAX_REPLY_BYTES = 64 << 20
"""Of one exchange. A server that sends more is cut off."""

_FIRST_BUFFER_BYTES = 64 << 10
_KEPT_BUFFER_BYTES = 4 << 20
_NOT_ENOUGH = object()
_LATER = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)


class DesynchronizedError(OSError):
    """The replies do not belong to the commands that were sent."""


class RedisConnection:
    """
    An open connection, logged in. Used by one thread at a time.

    Args:
        options: Where to.
        timeout_s: The longest that connecting may take, to all addresses of the host together and
            with the login. Name resolution is the operating system's and keeps its own time.

    Raises:
        OSError: the server cannot be reached, or it refuses the login.
    """

    def __init__(self, options: RedisOptions, timeout_s: float) -> None:
        deadline_s = time.monotonic() + timeout_s
        self.address = options.host, options.port
        self._token = secrets.token_hex(12)
        self._exchanges = 0
        self._end = b""
        self._groups = 0
        self._unsent = memoryview(b"")
        self._buffer = bytearray(_FIRST_BUFFER_BYTES)
        self._filled = 0
        self._socket = open_socket(options, deadline_s)
        self._is_tls = isinstance(self._socket, ssl.SSLSocket)
        try:
            self._log_in(options, deadline_s)
            self._socket.settimeout(0)
        except BaseException:
            self.close()
            raise

    def fileno(self) -> int:
        return self._socket.fileno()

    @property
    def received_bytes(self) -> int:
        """Of the replies to what was sent last."""
        return self._filled

    @property
    def events(self) -> int:
        """What `advance` waits for, as `select.poll` has it."""
        return select.POLLIN | select.POLLOUT if self._unsent else select.POLLIN

    def begin(self, groups: Sequence[Any]) -> None:
        """
        Begin to send commands, without waiting; `advance` must follow until it has the replies.

        After an error, or before that, the connection must be closed: what is still on its way is
        unknown.

        Args:
            groups: Each a buffer of commands in RESP.

        Raises:
            OSError: the connection failed.
        """
        self._exchanges += 1
        self._end = b"$32\r\n%b%08x\r\n" % (self._token.encode(), self._exchanges & 0xFFFFFFFF)
        self._groups = len(groups)
        self._filled = 0
        echo = b"*2\r\n$4\r\nECHO\r\n" + self._end
        self._unsent = memoryview(b"".join(part for group in groups for part in (group, echo)))
        self._send_some()

    def advance(self, max_bytes: int = MAX_REPLY_BYTES) -> list[bytes] | None:
        """
        Send and receive what can be at once.

        Args:
            max_bytes: Of replies; `MAX_REPLY_BYTES` at most.

        Returns:
            The bytes of the replies to what was sent last, per group, unparsed; None while some are
            on their way.

        Raises:
            OversizedReplyError: there are more.
            OSError: the connection failed, or the replies are not to these commands.
        """
        if self._unsent:
            self._send_some()
        if not self._receive_some(min(max_bytes, MAX_REPLY_BYTES)):
            return None
        with memoryview(self._buffer) as view:
            if self._groups == 1:  # the end was found already: no need to search for it
                pieces = [bytes(view[: self._filled - len(self._end)]), b""]
            else:
                pieces = bytes(view[: self._filled]).split(self._end)
        if len(self._buffer) > _KEPT_BUFFER_BYTES:  # one wide read is no reason to keep it
            self._buffer = bytearray(_FIRST_BUFFER_BYTES)
        if self._unsent or len(pieces) != self._groups + 1 or pieces.pop():
            raise DesynchronizedError("replies out of step")
        return pieces

    def exchange(self, groups: Sequence[Any], deadline_s: float) -> list[bytes]:
        """
        Send commands and return the bytes of their replies, as `begin` and `advance`.

        Raises:
            TimeoutError: the deadline, on `time.monotonic`, passed.
            OSError: as `advance`.
        """
        self.begin(groups)
        while True:
            self._wait(self.events, deadline_s)
            if (replies := self.advance()) is not None:
                return replies

    def send_only(self, commands: bytes, deadline_s: float) -> None:
        """Send commands whose replies are for `receive_some`; errors as `exchange`."""
        self._unsent = memoryview(commands)
        self._send_some()
        while self._unsent:
            self._wait(select.POLLOUT, deadline_s)
            self._send_some()

    def receive_some(self, deadline_s: float) -> bytes:
        """
        Return what comes next, whatever it is; after this, nothing else can be received.

        Raises:
            TimeoutError: nothing has come in time; the connection is as good as before.
            OSError: it failed.
        """
        while True:
            try:
                data = self._socket.recv(_FIRST_BUFFER_BYTES)
            except _LATER:
                self._wait(select.POLLIN, deadline_s)
                continue
            if not data:
                raise ConnectionResetError("the server closed the connection")
            return data

    def command(self, *words: str | bytes, deadline_s: float) -> Any:
        """Run one command and return its reply as hiredis reads it, errors as its `ReplyError`."""
        reader = hiredis.Reader(notEnoughData=_NOT_ENOUGH)
        reader.feed(self.exchange([hiredis.pack_command(words)], deadline_s)[0])
        try:
            reply = reader.gets()
        except hiredis.ProtocolError as error:
            raise DesynchronizedError(str(error)) from None
        if reply is _NOT_ENOUGH:
            raise DesynchronizedError("half a reply")
        return reply

    def close(self) -> None:
        self._socket.close()

    def _send_some(self) -> None:
        try:
            while self._unsent:
                self._unsent = self._unsent[self._socket.send(self._unsent) :]
        except _LATER:
            pass

    def _receive_some(self, max_bytes: int) -> bool:
        """Read what is there; return whether that ends as the replies to all groups must end."""
        while True:
            room = len(self._buffer) - self._filled
            try:
                with memoryview(self._buffer) as view:
                    count = self._socket.recv_into(view[self._filled :])
            except _LATER:
                return False
            if not count:
                raise ConnectionResetError("the server closed the connection")
            self._filled += count
            if self._filled > max_bytes:
                raise OversizedReplyError(f"a reply of more than {max_bytes} bytes")
            # Every group's end: one may be among the values, if only by a wonder.
            if self._buffer.endswith(self._end, 0, self._filled) and (
                self._groups == 1 or self._buffer.count(self._end, 0, self._filled) >= self._groups
            ):
                return True
            if count < room and not self._is_tls:  # TLS gives a record at a time
                return False
            if count == room:
                self._buffer += bytes(len(self._buffer))

    def _log_in(self, options: RedisOptions, deadline_s: float) -> None:
        commands: list[tuple[str, ...]] = []
        if options.password is not None:
            user = [] if options.username is None else [options.username]
            commands.append(("AUTH", *user, options.password))
        if options.db:
            commands.append(("SELECT", str(options.db)))
        commands.append(("ECHO", self._token))
        self._set_timeout(deadline_s)
        self._socket.sendall(b"".join(map(hiredis.pack_command, commands)))
        reader = hiredis.Reader()
        replies: list[Any] = []
        while len(replies) < len(commands):
            data = self._socket.recv(1 << 12)
            if not data:
                raise ConnectionResetError("the server closed the connection")
            try:
                reader.feed(data)
                while (reply := reader.gets()) is not False:
                    replies.append(reply)
            except hiredis.ProtocolError as error:
                raise DesynchronizedError(str(error)) from None
            for (name, *_), reply in zip(commands, replies, strict=False):
                if isinstance(reply, hiredis.ReplyError):
                    raise ConnectionRefusedError(f"{name} is refused: {error_word(reply)}")
            self._set_timeout(deadline_s)
        if replies[-1] != self._token.encode():
            raise DesynchronizedError("the server does not echo")

    def _set_timeout(self, deadline_s: float) -> None:
        self._socket.settimeout(_remaining_s(deadline_s))

    def _wait(self, events: int, deadline_s: float) -> None:
        poll = select.poll()
        poll.register(self._socket, events)
        if not poll.poll(_remaining_s(deadline_s) * 1e3):
            raise TimeoutError("no answer in time")


def open_socket(options: RedisOptions, deadline_s: float) -> socket.socket:
    """
    Connect, with TLS if `options` say so; what is returned blocks.

    Raises:
        OSError: that cannot be done by `deadline_s`, on `time.monotonic`.
    """
    try:
        if options.unix_socket_path is not None:
            return _connected(socket.AF_UNIX, options.unix_socket_path, deadline_s)
        plain = _connect_to(options.host, options.port, deadline_s)
        try:
            plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if options.tls is None:
                return plain
            plain.settimeout(_remaining_s(deadline_s))
            return options.tls.wrap_socket(plain, server_hostname=options.host)
        except BaseException:
            plain.close()
            raise
    except OSError:  # a certificate that is refused is a ValueError as well
        raise
    except ValueError as error:  # a name or path that none can be; UnicodeError is one of them
        raise OSError(f"not a server's address: {error}") from None


def _connect_to(host: str, port: int, deadline_s: float) -> socket.socket:
    """Try each address of a host with its share of the time that remains."""
    found = socket.getaddrinfo(host, port, 0, socket.SOCK_STREAM)
    reason: OSError = OSError("the host has no address")
    for place, (family, _, _, _, address) in enumerate(found):
        now_s = time.monotonic()
        try:
            share_s = _remaining_s(deadline_s) / (len(found) - place)
            return _connected(family, address, now_s + share_s)
        except OSError as error:
            reason = error
    raise reason


def _connected(family: int, address: Any, deadline_s: float) -> socket.socket:
    plain = socket.socket(family, socket.SOCK_STREAM)
    try:
        plain.settimeout(_remaining_s(deadline_s))
        plain.connect(address)
    except BaseException:
        plain.close()
        raise
    return plain


def _remaining_s(deadline_s: float) -> float:
    remaining_s = deadline_s - time.monotonic()
    if remaining_s <= 0:
        raise TimeoutError("no answer in time")
    return remaining_s
