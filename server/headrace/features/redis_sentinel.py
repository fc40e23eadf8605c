"""Where the master is, by Redis Sentinel; and connections to it that follow a failover.

Sentinels are asked whenever a connection is opened, and the server must say itself that it is a
master. A failover closes the old master's connections, so that the next ones lead to the new one;
in case it was cut off and could not, `check` asks, too. When no Sentinel answers there is no
failover either: the master known last is kept, as long as it says that it still is one.

Source: https://redis.io/docs/latest/develop/reference/sentinel-clients/.
"""

import threading
import time
from typing import Any

import hiredis
import redis
import structlog
from redis.backoff import NoBackoff
from redis.retry import Retry

from headrace.errors import StartupError
from headrace.features.breaker import PATIENCE_S
from headrace.features.redis_connection import RedisConnection
from headrace.features.redis_errors import error_word
from headrace.features.redis_options import RedisServers
from headrace.features.redis_pool import CHECK_TIMEOUT_S, RedisPool

_log = structlog.get_logger(__name__)


class SentinelsGoneError(OSError):
    """Not one of the Sentinels answers."""


class SentinelsSilentError(SentinelsGoneError, TimeoutError):
    """Not one of the Sentinels answers in time; they may answer whoever has more of it."""


class RedisSentinels:
    """
    Finds the master of a name.

    Args:
        named: The Sentinels. Its login is the master's, as is its TLS; theirs is `sentinel_login`,
            over plain TCP, as Feast's client has it.
        master: What Sentinel calls the master.

    Raises:
        StartupError: `named` has no address, or a unix socket.
    """

    def __init__(self, named: RedisServers, master: str) -> None:
        if any(server.unix_socket_path is not None for server in named.servers):
            raise StartupError("unix_socket_path in connection_string does not go with Sentinel")
        self._named = named
        self.master = master
        self._lock = threading.Lock()
        self._order = [(server.host, server.port) for server in named.servers]
        self.address: tuple[str, int] | None = None
        """Of the master last connected to."""
        self._are_gone = False

    def find(self, timeout_s: float) -> tuple[str, int]:
        """
        Ask as `look` does; tell the log when nobody answers, and when somebody does again.

        That nobody answers whoever is in a hurry says nothing of the Sentinels.
        """
        are_gone = False
        try:
            return self.look(timeout_s)
        except SentinelsSilentError:
            are_gone = self._are_gone or timeout_s >= PATIENCE_S
            raise
        except SentinelsGoneError:
            are_gone = True
            raise
        finally:
            if are_gone != self._are_gone:
                self._are_gone = are_gone
                log = _log.warning if are_gone else _log.info
                event = "redis_sentinels_gone" if are_gone else "redis_sentinels_back"
                log(event, master=self.master)

    def look(self, timeout_s: float) -> tuple[str, int]:
        """
        Ask the Sentinels, one after another, where the master is.

        Raises:
            SentinelsGoneError: none of them answers; `SentinelsSilentError`, if one or another
                might have, given more time.
            OSError: none of those that answer knows it.
        """
        deadline_s = time.monotonic() + timeout_s
        order, are_gone, is_silent = self._order, True, False
        address: tuple[str, int] | None = None
        for place, sentinel in enumerate(order):
            share_s = max(deadline_s - time.monotonic(), 0.002) / (len(order) - place)
            try:
                address = self._ask(sentinel, share_s)
            except OSError as error:
                is_silent |= isinstance(error, TimeoutError)
                continue
            are_gone = False
            if address is not None:
                if place:  # ask this one first from now on
                    with self._lock:
                        self._order = [sentinel, *(at for at in order if at != sentinel)]
                break
        if are_gone:
            raise (SentinelsSilentError if is_silent else SentinelsGoneError)("no Sentinel answers")
        if address is None:
            raise ConnectionError("no Sentinel knows where the master is")
        return address

    def connect(self, timeout_s: float) -> RedisConnection:
        """Open a connection to the master; OSError if that cannot be done in time."""
        deadline_s = time.monotonic() + timeout_s
        is_announced = True
        try:
            address = self.find(timeout_s / 2)
        except SentinelsGoneError:
            known = self.address
            if known is None:
                raise
            address, is_announced = known, False
        options = self._named.servers[0].at(*address)
        connection = RedisConnection(options, max(deadline_s - time.monotonic(), 0.001))
        try:
            role = connection.command("ROLE", deadline_s=deadline_s)
            # A user who may not ask has to rely on the Sentinels.
            if isinstance(role, hiredis.ReplyError):
                if not is_announced:
                    raise ConnectionError(f"no Sentinel answers, and ROLE: {error_word(role)}")
            elif role[:1] != [b"master"]:
                raise ConnectionError("that server is no master (any more, or yet)")
        except (OSError, TypeError) as error:
            connection.close()
            raise error if isinstance(error, OSError) else ConnectionError("ROLE is odd") from None
        if address != self.address:
            _log.info("redis_master", host=address[0], port=address[1])
        self.address = address
        return connection

    def _ask(self, sentinel: tuple[str, int], timeout_s: float) -> tuple[str, int] | None:
        """Return where a Sentinel says that the master is; OSError if it does not answer."""
        client: Any = redis.Redis(
            host=sentinel[0],
            port=sentinel[1],
            socket_connect_timeout=timeout_s / 2,
            socket_timeout=timeout_s / 2,
            retry=Retry(NoBackoff(), 0),
            username=self._named.sentinel_login.get("username"),
            password=self._named.sentinel_login.get("password"),
        )
        try:
            found = client.sentinel_get_master_addr_by_name(self.master)
        except (OSError, ValueError, redis.RedisError) as error:
            kind = type(error).__name__  # its text may have the password
            _log.debug("redis_sentinel_unanswered", port=sentinel[1], reason=kind)
            is_silent = isinstance(error, redis.TimeoutError | TimeoutError)
            raise (TimeoutError if is_silent else ConnectionError)(kind) from None
        finally:
            client.close()
        if found is None:
            return None
        host, port = found
        return host.decode(errors="replace") if isinstance(host, bytes) else host, port


def look_for_master(connection_string: str, master: str, timeout_s: float) -> None:
    """
    See whether Sentinels know where a master is, as one who is about to ask it.

    Args:
        connection_string: Feast's setting, as `RedisServers.parse` reads it.
        master: What Sentinel calls the master.
        timeout_s: For all of them together.

    Raises:
        StartupError: they do not answer, or do not know it; or a setting is unusable.
    """
    named = RedisServers.parse(connection_string)
    count = len(named.servers)
    try:
        RedisSentinels(named, master).look(timeout_s)
    except SentinelsSilentError:
        raise StartupError(
            f"the online store does not answer: none of {count} Sentinels in connection_string "
            f"says within {timeout_s:g} s where master '{master}' is"
        ) from None
    except SentinelsGoneError:
        raise StartupError(
            f"the online store does not answer: none of {count} Sentinels in connection_string "
            "can be asked; are the addresses, and the login in sentinel_kwargs, right?"
        ) from None
    except OSError:
        raise StartupError(
            f"no Sentinel knows where master '{master}' is: either sentinel_master is not its "
            "name, or there is none now"
        ) from None


class SentinelPool(RedisPool):
    """
    A `RedisTopology` of the master that Sentinels name.

    Args:
        sentinels: Whom to ask.
        connect_timeout_s: The longest that finding and connecting may take.
        patience_s: As `RedisPool` takes it.
    """

    def __init__(
        self,
        sentinels: RedisSentinels,
        *,
        connect_timeout_s: float = 1.0,
        patience_s: float = PATIENCE_S,
    ) -> None:
        super().__init__(
            sentinels.connect,
            (sentinels.master, 0),
            connect_timeout_s=connect_timeout_s,
            patience_s=patience_s,
        )
        self._sentinels = sentinels

    @property
    def location(self) -> tuple[str, int]:
        return self._sentinels.address or self.address

    def check(self) -> None:
        try:
            if self._sentinels.find(CHECK_TIMEOUT_S / 2) != self._sentinels.address:
                self.drop()
        except SentinelsGoneError:
            if self._sentinels.address is None:
                raise
        super().check()
