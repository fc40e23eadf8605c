"""Where the master is, by Redis Sentinel; and connections to it that follow a failover.

Sentinels are asked whenever a connection is opened, and the server must say itself that it is a
master. A failover closes the old master's connections, so that the next ones lead to the new one;
in case it was cut off and could not, `check` asks, too.

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
from headrace.features.redis_connection import RedisConnection
from headrace.features.redis_options import RedisServers
from headrace.features.redis_pool import CHECK_TIMEOUT_S, RedisPool

_log = structlog.get_logger(__name__)


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

    def find(self, timeout_s: float) -> tuple[str, int]:
        """
        Ask the Sentinels, one after another, where the master is.

        Raises:
            OSError: none of them answers in time, or knows it.
        """
        deadline_s = time.monotonic() + timeout_s
        order = self._order
        for place, sentinel in enumerate(order):
            share_s = max(deadline_s - time.monotonic(), 0.002) / (len(order) - place)
            address = self._ask(sentinel, share_s)
            if address is not None:
                if place:  # ask this one first from now on
                    with self._lock:
                        self._order = [sentinel, *(at for at in order if at != sentinel)]
                return address
        raise ConnectionError("no Sentinel knows where the master is")

    def connect(self, timeout_s: float) -> RedisConnection:
        """Open a connection to the master; OSError if that cannot be done in time."""
        deadline_s = time.monotonic() + timeout_s
        address = self.find(timeout_s / 2)
        options = self._named.servers[0].at(*address)
        connection = RedisConnection(options, max(deadline_s - time.monotonic(), 0.001))
        try:
            role = connection.command("ROLE", deadline_s=deadline_s)
        except OSError:
            connection.close()
            raise
        # A user who may not ask has to rely on the Sentinels.
        if not isinstance(role, hiredis.ReplyError) and role[0] != b"master":
            connection.close()
            raise ConnectionError("that server is no master (any more, or yet)")
        if address != self.address:
            _log.info("redis_master", host=address[0], port=address[1])
        self.address = address
        return connection

    def _ask(self, sentinel: tuple[str, int], timeout_s: float) -> tuple[str, int] | None:
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
        except (OSError, redis.RedisError) as error:
            _log.debug("redis_sentinel_unanswered", port=sentinel[1], reason=str(error))
            return None
        finally:
            client.close()
        return found and (found[0].decode() if isinstance(found[0], bytes) else found[0], found[1])


class SentinelPool(RedisPool):
    """
    A `RedisTopology` of the master that Sentinels name.

    Args:
        sentinels: Whom to ask.
        connect_timeout_s: The longest that finding and connecting may take.
    """

    def __init__(self, sentinels: RedisSentinels, *, connect_timeout_s: float = 1.0) -> None:
        super().__init__(
            sentinels.connect, (sentinels.master, 0), connect_timeout_s=connect_timeout_s
        )
        self._sentinels = sentinels

    def check(self) -> None:
        if self._sentinels.find(CHECK_TIMEOUT_S / 2) != self._sentinels.address:
            self.drop()
        super().check()
