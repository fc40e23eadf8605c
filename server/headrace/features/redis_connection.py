"""One blocking connection to a Redis server, and how to open it.

Every exchange ends with an ECHO of a token that nobody else can know. The token is how the end of
the replies is found without parsing them, and it is the proof that they answer these commands: a
connection that is out of step can give an error, never another entity's features.

Source: RESP2 (https://valkey.io/topics/protocol/).
"""

import secrets
import socket
import time
from collections.abc import Sequence
from typing import Any

import hiredis

from headrace.features.redis_options import RedisOptions

MAX_REPLY_BYTES = 64 << 20
"""Of one exchange. A server that sends more is cut off."""

_FIRST_BUFFER_BYTES = 64 << 10
_KEPT_BUFFER_BYTES = 4 << 20
_NOT_ENOUGH = object()


class DesynchronizedError(OSError):
    """The replies do not belong to the commands that were sent."""


class RedisConnection:
    """
    An open connection, logged in. Used by one thread at a time.

    Args:
        options: Where to.
        timeout_s: The longest that connecting may take. Name resolution is the operating system's
            and keeps its own time.

    Raises:
        OSError: the server cannot be reached, or it refuses the login.
    """

    def __init__(self, options: RedisOptions, timeout_s: float) -> None:
        deadline_s = time.monotonic() + timeout_s
        self._token = secrets.token_hex(12)
        self._exchanges = 0
        self._end = b""
        self._groups = 0
        self._buffer = bytearray(_FIRST_BUFFER_BYTES)
        self._socket = _open_socket(options, timeout_s)
        try:
            self._log_in(options, deadline_s)
        except BaseException:
            self.close()
            raise

    def send(self, groups: Sequence[Any], deadline_s: float) -> None:
        """
        Send commands; `receive` must follow.

        After an error the connection must be closed: what is still on its way is unknown.

        Args:
            groups: Each a buffer of commands in RESP.
            deadline_s: On `time.monotonic`.

        Raises:
            TimeoutError: the deadline passed.
            OSError: the connection failed.
        """
        self._exchanges += 1
        self._end = b"$32\r\n%b%08x\r\n" % (self._token.encode(), self._exchanges & 0xFFFFFFFF)
        self._groups = len(groups)
        echo = b"*2\r\n$4\r\nECHO\r\n" + self._end
        self._set_timeout(deadline_s)
        self._socket.sendall(b"".join(part for group in groups for part in (group, echo)))

    def receive(self, deadline_s: float) -> list[bytes]:
        """
        Return the bytes of the replies to what was sent last, per group, unparsed.

        Raises:
            TimeoutError: the deadline passed.
            OSError: the connection failed, or the replies are not to these commands.
        """
        self._set_timeout(deadline_s)
        received = self._receive(self._end, self._groups, deadline_s)
        if len(self._buffer) > _KEPT_BUFFER_BYTES:  # one wide read is no reason to keep it
            self._buffer = bytearray(_FIRST_BUFFER_BYTES)
        pieces = received.split(self._end)
        if len(pieces) != self._groups + 1 or pieces.pop():
            raise DesynchronizedError("replies out of step")
        return pieces

    def exchange(self, groups: Sequence[Any], deadline_s: float) -> list[bytes]:
        """Send commands and return the bytes of their replies; all is sent before any is read."""
        self.send(groups, deadline_s)
        return self.receive(deadline_s)

    def send_only(self, commands: bytes, deadline_s: float) -> None:
        """Send commands whose replies are for `receive_some`; errors as `send`."""
        self._set_timeout(deadline_s)
        self._socket.sendall(commands)

    def receive_some(self, deadline_s: float) -> bytes:
        """
        Return what comes next, whatever it is; after this, nothing else can be received.

        Raises:
            TimeoutError: nothing has come in time; the connection is as good as before.
            OSError: it failed.
        """
        self._set_timeout(deadline_s)
        data = self._socket.recv(_FIRST_BUFFER_BYTES)
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

    def _receive(self, end: bytes, times: int, deadline_s: float) -> bytes:
        """Read until `end` has come `times` times, which is also where reading must stop."""
        view, filled = memoryview(self._buffer), 0
        while True:
            count = self._socket.recv_into(view[filled:])
            if not count:
                raise ConnectionResetError("the server closed the connection")
            filled += count
            if self._buffer.endswith(end, 0, filled) and (
                times == 1 or self._buffer.count(end, 0, filled) >= times
            ):
                return view[:filled].tobytes()
            if filled == len(self._buffer):
                if filled >= MAX_REPLY_BYTES:
                    raise DesynchronizedError(f"a reply of more than {MAX_REPLY_BYTES} bytes")
                view.release()
                self._buffer += bytes(len(self._buffer))
                view = memoryview(self._buffer)
            self._set_timeout(deadline_s)

    def _log_in(self, options: RedisOptions, deadline_s: float) -> None:
        commands = []
        if options.password is not None:
            user = [] if options.username is None else [options.username]
            commands.append(hiredis.pack_command(("AUTH", *user, options.password)))
        if options.db:
            commands.append(hiredis.pack_command(("SELECT", str(options.db))))
        commands.append(hiredis.pack_command(("ECHO", self._token)))
        self._set_timeout(deadline_s)
        self._socket.sendall(b"".join(commands))
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
            for reply in replies:
                if isinstance(reply, hiredis.ReplyError):
                    raise ConnectionRefusedError(str(reply))
            self._set_timeout(deadline_s)
        if replies[-1] != self._token.encode():
            raise DesynchronizedError("the server does not echo")

    def _set_timeout(self, deadline_s: float) -> None:
        remaining_s = deadline_s - time.monotonic()
        if remaining_s <= 0:
            raise TimeoutError("no answer in time")
        self._socket.settimeout(remaining_s)


def _open_socket(options: RedisOptions, timeout_s: float) -> socket.socket:
    if options.unix_socket_path is not None:
        plain = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            plain.settimeout(timeout_s)
            plain.connect(options.unix_socket_path)
        except BaseException:
            plain.close()
            raise
        return plain
    plain = socket.create_connection((options.host, options.port), timeout_s)
    try:
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if options.tls is None:
            return plain
        return options.tls.wrap_socket(plain, server_hostname=options.host)
    except BaseException:
        plain.close()
        raise
