"""Connections to one Redis server: kept, replaced when they die, and not tried in vain.

A connection serves one thread at a time and is closed at the first irregularity. One that turns out
to have died while idle is replaced, and what was asked is asked once more. A server that keeps
failing is left alone (`breaker`) but for a probe now and then.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import structlog
from numpy.typing import NDArray

from headrace.features.breaker import Breaker
from headrace.features.redis_commands import MAX_PART_BYTES, PackedCommands
from headrace.features.redis_connection import RedisConnection
from headrace.features.redis_options import RedisOptions

MAX_IDLE_CONNECTIONS = 8
CHECK_TIMEOUT_S = 1.0

_PROBE = b"*3\r\n$5\r\nHMGET\r\n$14\r\nheadrace:probe\r\n$1\r\nf\r\n"
_READY_ERRORS = (b"-NOPERM", b"-MOVED", b"-ASK")
"""That key may be forbidden, or another node's: this one reads nevertheless."""
_log = structlog.get_logger(__name__)

Exchange = Sequence[tuple[int, Any]]
"""(Place of the key group, commands) each."""


class BreakerOpenError(OSError):
    """The server has failed so often that it is not being tried."""


class Replies(NamedTuple):
    """
    What a key group's commands were answered.

    Args:
        data: The replies, one after another.
        inverse: Which of them each row of the batch asked for; None when that is its own.
    """

    data: bytes
    inverse: NDArray[np.intp] | None


class RedisTopology(Protocol):
    """Redis servers that are asked as one. Safe for several threads at once."""

    def ask(self, packed: Sequence[PackedCommands], deadline_s: float) -> list[Replies]:
        """
        Send each key group's commands and return its replies.

        Args:
            packed: The commands of each key group.
            deadline_s: On `time.monotonic`.

        Raises:
            OSError: not all could be answered in time.
        """
        ...

    def check(self) -> None:
        """
        Raise OSError unless every server answers, even if a breaker is open; if so, close it.

        Takes `CHECK_TIMEOUT_S` at most, for each server.
        """
        ...

    def distrust(self) -> None:
        """Be told that a server answered, and not as a reader of features may expect."""
        ...

    def is_held_off(self) -> bool:
        """Return whether a breaker is open."""
        ...

    def masters(self) -> Sequence["RedisPool"]:
        """
        Return the servers that are read, as far as is known.

        Raises:
            OSError: none is known.
        """
        ...

    def close(self) -> None: ...


class RedisPool:
    """
    A `RedisTopology` of one server.

    Args:
        connect: Opens a connection within the seconds given, or raises OSError.
        address: Of the server, or what stands for it in the log.
        connect_timeout_s: The longest that connecting may take, within the time of what is asked.
    """

    def __init__(
        self,
        connect: Callable[[float], RedisConnection],
        address: tuple[str, int],
        *,
        connect_timeout_s: float = 1.0,
    ) -> None:
        self.address = address
        self._name = f"{address[0]}:{address[1]}"
        self._connect = connect
        self._connect_timeout_s = connect_timeout_s
        self._idle: deque[tuple[int, RedisConnection]] = deque()
        self._generation = 0
        self._lock = threading.Lock()
        self._breaker = Breaker()
        self._is_closed = False

    @classmethod
    def to(cls, options: RedisOptions, *, connect_timeout_s: float = 1.0) -> "RedisPool":
        """Return a pool of connections to the server that `options` name."""
        return cls(
            lambda timeout_s: RedisConnection(options, timeout_s),
            (options.host, options.port),
            connect_timeout_s=connect_timeout_s,
        )

    def ask(self, packed: Sequence[PackedCommands], deadline_s: float) -> list[Replies]:
        answers = self.start(exchanges(packed), deadline_s).finish()
        return [
            Replies(data, commands.inverse) for data, commands in zip(answers, packed, strict=True)
        ]

    def check(self) -> None:
        deadline_s = time.monotonic() + CHECK_TIMEOUT_S
        (reply,) = self.start([[(0, _PROBE)]], deadline_s, is_check=True).finish()
        # A server that is loading its data echoes, and reads nothing.
        if reply.startswith(b"-") and not reply.startswith(_READY_ERRORS):
            raise OSError(reply.decode(errors="replace").strip())

    def distrust(self) -> None:
        self.drop()

    def masters(self) -> Sequence["RedisPool"]:
        return [self]

    def is_held_off(self) -> bool:
        return self._breaker.is_open

    def close(self) -> None:
        self._is_closed = True
        self.drop()

    def start(
        self, exchanges: Sequence[Exchange], deadline_s: float, *, is_check: bool = False
    ) -> "Conversation":
        """
        Send the first exchange; `finish` of what is returned gets the replies.

        Args:
            exchanges: What to ask, part by part. Asked twice, perhaps: they must only read.
            deadline_s: On `time.monotonic`.
            is_check: Try even if the breaker is open.

        Raises:
            BreakerOpenError: the server is not being tried.
            OSError: it cannot be reached.
        """
        if not (is_check or self._breaker.admits(time.monotonic())):
            raise BreakerOpenError("held off after repeated failures")
        try:
            return Conversation(self, exchanges, deadline_s)
        except OSError:
            self.failed()
            raise

    def command(self, *words: str, deadline_s: float) -> Any:
        """Run one command on a new connection; the reply is as `RedisConnection.command` has it."""
        connection = self.open(deadline_s)
        try:
            return connection.command(*words, deadline_s=deadline_s)
        finally:
            connection.close()

    # What conversations use.

    def take(self) -> tuple[int, RedisConnection] | None:
        """Return an idle connection and its generation, if there is one."""
        try:
            return self._idle.pop()
        except IndexError:
            return None

    def open(self, deadline_s: float) -> RedisConnection:
        remaining_s = max(deadline_s - time.monotonic(), 0.001)
        return self._connect(min(remaining_s, self._connect_timeout_s))

    @property
    def generation(self) -> int:
        return self._generation

    def keep(self, generation: int, connection: RedisConnection) -> None:
        """Take a connection back that has answered."""
        was_open = self._breaker.is_open
        self._breaker.succeeded()
        if was_open:
            _log.info("redis_breaker_closed", server=self._name)
        with self._lock:
            is_wanted = (
                not self._is_closed
                and generation == self._generation
                and len(self._idle) < MAX_IDLE_CONNECTIONS
            )
            if is_wanted:
                self._idle.append((generation, connection))
        if not is_wanted:
            connection.close()

    def failed(self) -> None:
        """Be told that a conversation failed."""
        was_open = self._breaker.is_open
        self._breaker.failed(time.monotonic())
        if self._breaker.is_open and not was_open:
            _log.warning("redis_breaker_opened", server=self._name)

    def drop(self, generation: int | None = None) -> None:
        """Keep no connection opened so far, idle or in use; or none as old as one that died."""
        with self._lock:
            if generation not in {None, self._generation}:
                return
            self._generation += 1
            idle, self._idle = self._idle, deque()
        for _, connection in idle:
            connection.close()


class Conversation:
    """
    Commands on their way to a server. `finish` must follow.

    Unless it does, and gets every reply, the connection is not used again: what is still on its way
    would be taken for the answer to something else.

    Args: as `RedisPool.start` takes them.
    """

    def __init__(self, pool: RedisPool, exchanges: Sequence[Exchange], deadline_s: float) -> None:
        self._pool = pool
        self._exchanges = exchanges
        self._deadline_s = deadline_s
        taken = pool.take()
        self._was_idle = taken is not None
        if taken is None:
            self._generation, self._connection = pool.generation, pool.open(deadline_s)
        else:
            self._generation, self._connection = taken
        try:
            self._send_first()
        except OSError as error:
            self._renew(error)
            self._send_first()

    def finish(self) -> list[bytes]:
        """
        Return each key group's replies.

        Raises:
            OSError: the connection failed, or the deadline passed.
        """
        try:
            try:
                replies = self._rest()
            except OSError as error:
                self._renew(error)
                self._send_first()
                replies = self._rest()
        except OSError:
            self._connection.close()
            self._pool.failed()
            raise
        self._pool.keep(self._generation, self._connection)
        return replies

    def _renew(self, error: OSError) -> None:
        """Go on with a new connection if an idle one has died; else raise the error."""
        self._connection.close()
        if self._was_idle:  # and the others have died with it
            self._pool.drop(self._generation)
        if not self._was_idle or isinstance(error, TimeoutError):
            raise error
        self._was_idle = False
        self._generation = self._pool.generation
        self._connection = self._pool.open(self._deadline_s)

    def _send_first(self) -> None:
        commands = [commands for _, commands in self._exchanges[0]]
        try:
            self._connection.send(commands, self._deadline_s)
        except OSError:
            self._connection.close()
            raise

    def _rest(self) -> list[bytes]:
        pieces = self._connection.receive(self._deadline_s)
        if len(self._exchanges) == 1:
            return pieces
        replies: dict[int, list[bytes]] = {}
        for place, exchange in enumerate(self._exchanges):
            if place:
                commands = [commands for _, commands in exchange]
                pieces = self._connection.exchange(commands, self._deadline_s)
            for (group, _), piece in zip(exchange, pieces, strict=True):
                replies.setdefault(group, []).append(piece)
        return [b"".join(pieces) for pieces in replies.values()]


def exchanges(packed: Sequence[PackedCommands]) -> list[Exchange]:
    """All at once when that is little enough, else part by part."""
    if sum(commands.byte_count for commands in packed) <= MAX_PART_BYTES:
        return [[(group, commands.parts[0]) for group, commands in enumerate(packed)]]
    return [[(group, part)] for group, commands in enumerate(packed) for part in commands.parts]
