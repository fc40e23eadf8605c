"""Where Redis servers are and how to log in: Feast's connection string, read.

Source: feast 0.67 `connection_string`: `host:port[,host:port…][,option=value…]` with JSON values,
the options being redis-py's.
"""

import json
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import structlog

from headrace.errors import StartupError

_log = structlog.get_logger(__name__)


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

    def at(self, host: str, port: int) -> "RedisOptions":
        """Return the same login at another server."""
        return replace(self, host=host, port=port)


@dataclass(frozen=True, slots=True)
class RedisServers:
    """
    What a connection string names.

    Args:
        servers: One or several, all with the same login.
        sentinel_login: `username` and `password` at Sentinels, which have users of their own.
    """

    servers: tuple[RedisOptions, ...]
    sentinel_login: Mapping[str, str] = field(default_factory=dict, repr=False)

    @classmethod
    def parse(cls, connection_string: str) -> "RedisServers":
        """
        Read Feast's `connection_string`.

        `db`, `username`, `password`, `unix_socket_path`, redis-py's `ssl*` options and the login in
        `sentinel_kwargs` count; others tune redis-py, and are named in a log line.

        Raises:
            StartupError: no `host:port`, or an option's value is unusable.
        """
        if "${" in connection_string:  # Feast leaves it as it is, and would try to connect
            raise StartupError(
                "connection_string of the online store names an environment variable "
                "that is not set"
            )
        parts = connection_string.split(",")
        options = dict(_option(part) for part in parts if "=" in part)
        db = options.pop("db", 0)
        if not isinstance(db, int) or isinstance(db, bool) or db < 0:
            raise StartupError("db in connection_string of the online store is no number")
        sentinel_login = _sentinel_login(options.pop("sentinel_kwargs", {}))
        login = RedisOptions(
            unix_socket_path=_text(options.pop("unix_socket_path", None)),
            username=_text(options.pop("username", None)),
            password=_text(options.pop("password", None)),
            db=db,
            tls=_tls(options),
        )
        unused = sorted(options)
        if unused:
            _log.warning("redis_options_ignored", options=unused)
        addresses = [_address(part) for part in parts if "=" not in part]
        if not addresses:
            raise StartupError("connection_string of the online store names no `host:port`")
        return cls(tuple(login.at(*address) for address in addresses), sentinel_login)

    def only(self) -> RedisOptions:
        """
        Return the one server there is.

        Raises:
            StartupError: there are several.
        """
        if len(self.servers) > 1:
            raise StartupError(
                f"connection_string of the online store names {len(self.servers)} servers, where "
                "one is expected; with redis_type redis_cluster or redis_sentinel there may be more"
            )
        return self.servers[0]


def _address(part: str) -> tuple[str, int]:
    host, _, port = part.strip().rpartition(":")
    if not host or "/" in host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise StartupError("a server in connection_string of the online store is not `host:port`")
    host = host.strip("[]")
    try:
        host.encode("idna")
    except UnicodeError:
        raise StartupError(
            "a host in connection_string of the online store is no name: between its dots there "
            "are 1 to 63 characters"
        ) from None
    return host, int(port)


def _sentinel_login(given: Any) -> dict[str, str]:
    if not isinstance(given, dict):
        raise StartupError("sentinel_kwargs in connection_string is no JSON object")
    unused = [f"sentinel_kwargs.{name}" for name in given if name not in {"username", "password"}]
    if unused:
        _log.warning("redis_options_ignored", options=unused)
    return {name: str(given[name]) for name in ("username", "password") if name in given}


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
    checks_hostname = options.pop("ssl_check_hostname", True)
    authorities = _text(options.pop("ssl_ca_certs", None))
    certificate = _text(options.pop("ssl_certfile", None))
    key = _text(options.pop("ssl_keyfile", None))
    pass_phrase = _text(options.pop("ssl_password", None))
    if not _flag("ssl", wanted):
        return None
    if requirement not in {"none", "optional", "required"}:
        raise StartupError("ssl_cert_reqs in connection_string is none, optional or required")
    checks_hostname = _flag("ssl_check_hostname", checks_hostname) and requirement == "required"

    def phrase() -> str:
        if pass_phrase is None:  # or OpenSSL would ask for it at the terminal
            raise StartupError(
                "the private key of ssl_keyfile (or ssl_certfile) in connection_string of the "
                "online store is encrypted: add its pass phrase as ssl_password, or decrypt it"
            )
        return pass_phrase

    try:
        context = ssl.create_default_context(cafile=authorities)
        if certificate is not None:
            context.load_cert_chain(certificate, key, phrase)
    except OSError as error:
        reason = error.reason if isinstance(error, ssl.SSLError) else error.strerror
        raise StartupError(
            f"a TLS file of the online store is unusable: {reason or 'it cannot be read'}"
        ) from None
    context.check_hostname = checks_hostname
    context.verify_mode = {
        "none": ssl.CERT_NONE,
        "optional": ssl.CERT_OPTIONAL,
        "required": ssl.CERT_REQUIRED,
    }[requirement]
    return context


def _flag(name: str, value: Any) -> bool:
    """Read true or false, and nothing else: never less safe by a slip of the pen."""
    text = str(value).lower()
    if text not in {"true", "1", "yes", "false", "0", "no"}:
        raise StartupError(f"{name} in connection_string of the online store is true or false")
    return text in {"true", "1", "yes"}
