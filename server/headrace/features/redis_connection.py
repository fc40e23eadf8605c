"""One blocking connection to a Redis server, and how to open it.

Every exchange ends with an ECHO of a token that nobody else can know. The token is how the end of
the replies is found without parsing them, and it is the proof that they answer these commands: a
connection that is out of step can give an error, never another entity's features.

Source: RESP2 (https://valkey.io/topics/protocol/); feast 0.67 `connection_string`:
`host:port[,option=value…]` with JSON values, the options being redis-py's.
"""

import json
import secrets
import socket
import ssl
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import hiredis
import structlog

from headrace.errors import StartupError

MAX_REPLY_BYTES = 64 << 20
"""Of one exchange. A server that sends more is cut off."""

_FIRST_BUFFER_BYTES = 64 << 10
_KEPT_BUFFER_BYTES = 4 << 20
_log = structlog.get_logger(__name__)


class DesynchronizedError(OSError):
    """The replies do not belong to the commands that were sent."""


@dataclass(frozen=True, slots=True)
class RedisOptions:
    """
    Where a Redis server is and how to log in.

    Args:
        host: Name or address.
        port: TCP port.
        unix_socket_path: Used instead of host and port when it is given.
        username: For AUTH; the default user when None.
        password: For AUTH; no AUTH when None.
        db: Chosen with SELECT when it is not 0.
        tls: A TLS context, or None for plain TCP.
    """

    host: str = "localhost"
    port: int = 6379
    unix_socket_path: str | None = None
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    db: int = 0
    tls: ssl.SSLContext | None = None

    @classmethod
    def parse(cls, connection_string: str) -> "RedisOptions":
        """
        Read Feast's `connection_string`.

        `db`, `username`, `password`, `unix_socket_path` and redis-py's `ssl*` options count; others
        tune redis-py, and are named in a log line.

        Raises:
            StartupError: no `host:port`, several of them, or an option's value is unusable.
        """
        if "${" in connection_string:  # Feast leaves it as it is, and would try to connect
            raise StartupError(
                "connection_string of the online store names an environment variable "
                "that is not set"
            )
        parts = connection_string.split(",")
        nodes = [part for part in parts if "=" not in part]
        options = dict(_option(part) for part in parts if "=" in part)
        if len(nodes) != 1:
            raise StartupError(
                f"connection_string of the online store names {len(nodes)} servers; one "
                "`host:port` is expected (Redis Cluster and Sentinel are not supported yet)"
            )
        host, _, port = nodes[0].strip().rpartition(":")
        if not host or "/" in host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
            raise StartupError("connection_string of the online store does not begin `host:port`")
        db = options.pop("db", 0)
        if not isinstance(db, int) or isinstance(db, bool) or db < 0:
            raise StartupError("db in connection_string of the online store is no number")
        parsed = cls(
            host=host.strip("[]"),
            port=int(port),
            unix_socket_path=_text(options.pop("unix_socket_path", None)),
            username=_text(options.pop("username", None)),
            password=_text(options.pop("password", None)),
            db=db,
            tls=_tls(options),
        )
        unused = sorted(options)
        if unused:
            _log.warning("redis_options_ignored", options=unused)
        return parsed


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
        self._buffer = bytearray(_FIRST_BUFFER_BYTES)
        self._socket = _open_socket(options, timeout_s)
        try:
            self._log_in(options, deadline_s)
        except BaseException:
            self.close()
            raise

    def exchange(self, groups: Sequence[Any], deadline_s: float) -> list[bytes]:
        """
        Send commands and return the bytes of their replies.

        After an error the connection must be closed: what is still on its way is unknown.

        Args:
            groups: Each a buffer of commands in RESP. All are sent before any reply is read.
            deadline_s: On `time.monotonic`.

        Returns:
            The replies of each group, unparsed.

        Raises:
            TimeoutError: the deadline passed.
            OSError: the connection failed, or the replies are not to these commands.
        """
        self._exchanges += 1
        reply = b"$32\r\n%b%08x\r\n" % (self._token.encode(), self._exchanges & 0xFFFFFFFF)
        echo = b"*2\r\n$4\r\nECHO\r\n" + reply
        self._set_timeout(deadline_s)
        self._socket.sendall(b"".join(part for group in groups for part in (group, echo)))
        received = self._receive(reply, len(groups), deadline_s)
        if len(self._buffer) > _KEPT_BUFFER_BYTES:  # one wide read is no reason to keep it
            self._buffer = bytearray(_FIRST_BUFFER_BYTES)
        pieces = received.split(reply)
        if len(pieces) != len(groups) + 1 or pieces.pop():
            raise DesynchronizedError("replies out of step")
        return pieces

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


def _option(part: str) -> tuple[str, Any]:
    name, value = part.split("=", 1)
    try:
        return name.strip(), json.loads(value)
    except json.JSONDecodeError:
        return name.strip(), value


def _text(value: Any) -> str | None:
    # JSON has made a number of a numeric password.
    return None if value is None else str(value)


def _tls(options: dict[str, Any]) -> ssl.SSLContext | None:
    wanted = options.pop("ssl", False)
    requirement = str(options.pop("ssl_cert_reqs", "required")).lower()
    check_hostname = options.pop("ssl_check_hostname", True)
    authorities = _text(options.pop("ssl_ca_certs", None))
    certificate = _text(options.pop("ssl_certfile", None))
    key = _text(options.pop("ssl_keyfile", None))
    if str(wanted).lower() in {"false", "0", "no"}:
        return None
    if str(wanted).lower() not in {"true", "1", "yes"}:  # never plain text by a slip of the pen
        raise StartupError("ssl in connection_string of the online store is true or false")
    if requirement not in {"none", "optional", "required"}:
        raise StartupError("ssl_cert_reqs in connection_string is none, optional or required")
    try:
        context = ssl.create_default_context(cafile=authorities)
        if certificate is not None:
            context.load_cert_chain(certificate, key)
    except OSError as error:
        raise StartupError(
            f"a TLS file of the online store is unusable: {error.strerror}"
        ) from None
    context.check_hostname = check_hostname is True and requirement == "required"
    context.verify_mode = {
        "none": ssl.CERT_NONE,
        "optional": ssl.CERT_OPTIONAL,
        "required": ssl.CERT_REQUIRED,
    }[requirement]
    return context
