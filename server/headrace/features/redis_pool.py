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

from headrace.features.breaker import PATIENCE_S, Attempt, Breaker
from headrace.features.redis_commands import PackedCommands
from headrace.features.redis_connection import RedisConnection
from headrace.features.redis_conversation import Conversation, Exchange, exchanges, reply_limit
from headrace.features.redis_errors import error_word
from headrace.features.redis_options import RedisOptions

MAX_IDLE_CONNECTIONS = 8
CHECK_TIMEOUT_S = 1.0

_PROBE = b"*3\r\n$5\r\nHMGET\r\n$14\r\nheadrace:probe\r\n$1\r\nf\r\n"
_REDIRECTIONS = (b"-MOVED ", b"-ASK ")
_log = structlog.get_logger(__name__)


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
            OversizedReplyError: the replies are larger than `MAX_BATCH_REPLY_BYTES`, or than the
                commands' `max_reply_bytes`.
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
        patience_s: A server that was given less than this has not failed when the deadline passes.
    """

    def __init__(
        self,
        connect: Callable[[float], RedisConnection],
        address: tuple[str, int],
        *,
        connect_timeout_s: float = 1.0,
        patience_s: float = PATIENCE_S,
    ) -> None:
        self.address = address
        self._name = f"{address[0]}:{address[1]}"
        self._connect = connect
        self._connect_timeout_s = connect_timeout_s
        self._patience_s = patience_s
        self._idle: deque[tuple[int, RedisConnection]] = deque()
        self._generation = 0
        self._lock = threading.Lock()
        self._breaker = Breaker()
        self._is_closed = False

    @classmethod
    def to(
        cls,
        options: RedisOptions,
        *,
        connect_timeout_s: float = 1.0,
        patience_s: float = PATIENCE_S,
    ) -> "RedisPool":
        """Return a pool of connections to the server that `options` name."""
        return cls(
            lambda timeout_s: RedisConnection(options, timeout_s),
            (options.host, options.port),
            connect_timeout_s=connect_timeout_s,
            patience_s=patience_s,
        )

    @property
    def location(self) -> tuple[str, int]:
        """Where the server is now."""
        return self.address

    def ask(self, packed: Sequence[PackedCommands], deadline_s: float) -> list[Replies]:
        conversation = self.start(exchanges(packed), deadline_s)
        answers = conversation.finish(reply_limit(packed))
        return [
            Replies(data, commands.inverse) for data, commands in zip(answers, packed, strict=True)
        ]

    def check(self) -> None:
        deadline_s = time.monotonic() + CHECK_TIMEOUT_S
        (reply,) = self.start([[(0, _PROBE)]], deadline_s, is_check=True).finish()
        # A server that is loading its data echoes, and reads nothing.
        if reply.startswith(b"-") and not _is_ready(reply):
            raise OSError(f"HMGET is refused: {error_word(reply.decode(errors='replace'))}")

    def distrust(self) -> None:
        self.drop()

    def masters(self) -> Sequence["RedisPool"]:
        return [self]

    def is_held_off(self) -> bool:
        return self._breaker.is_open

    def close(self) -> None:
        self._is_closed = True
        self.drop()

    @property
    def has_idle(self) -> bool:
        """Whether a connection is open and waits to be used."""
        return bool(self._idle)

    def start(
        self,
        exchanges: Sequence[Exchange],
        deadline_s: float,
        *,
        is_check: bool = False,
        fair_s: float = 0.0,
    ) -> Conversation:
        """
        Send the first exchange; `finish` of what is returned, or `finish_all`, gets the replies.

        Args:
            exchanges: What to ask, part by part. Asked twice, perhaps: they must only read.
            deadline_s: On `time.monotonic`.
            is_check: Try even if the breaker is open.
            fair_s: A server that was given less than this, or than the time to connect, has not
                failed when the deadline passes either: others have used the time.

        Raises:
            BreakerOpenError: the server is not being tried.
            OSError: it cannot be reached.
        """
        attempt = None
        if not is_check:
            attempt = self._breaker.admits(time.monotonic())
            if attempt is None:
                raise BreakerOpenError("held off after repeated failures")
        least_s = max(min(fair_s, self._connect_timeout_s) * 0.9, self._patience_s)
        return Conversation(self, exchanges, deadline_s, attempt, least_s)

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
        """
        Return a new connection; if there is none in time, try once more in the time that is left.

        A packet that was lost is sent again after a second, and a busy machine takes its time.
        """
        remaining_s = deadline_s - time.monotonic()
        if remaining_s <= 0:
            raise TimeoutError("no time to connect")
        try:
            return self._connect(min(remaining_s, self._connect_timeout_s))
        except TimeoutError:
            remaining_s = deadline_s - time.monotonic()
            if remaining_s <= 0:
                raise
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

    def failed(self, attempt: Attempt | None) -> None:
        """Be told that a conversation failed."""
        was_open = self._breaker.is_open
        self._breaker.failed(time.monotonic(), attempt)
        if self._breaker.is_open and not was_open:
            _log.warning("redis_breaker_opened", server=self._name)

    def left_open(self, attempt: Attempt | None) -> None:
        """Be told that a conversation ended for reasons that are not the server's."""
        self._breaker.left_open(time.monotonic(), attempt)

    def drop(self, generation: int | None = None) -> None:
        """Keep no connection opened so far, idle or in use; or none as old as one that died."""
        with self._lock:
            if generation not in {None, self._generation}:
                return
            self._generation += 1
            idle, self._idle = self._idle, deque()
        for _, connection in idle:
            connection.close()


def _is_ready(error: bytes) -> bool:
    """Say whether it is only that key that is forbidden, or another node's: this one reads."""
    if error.startswith(b"-NOPERM "):
        return b" to run " not in error  # as it says of a command
    return error.startswith(_REDIRECTIONS)
