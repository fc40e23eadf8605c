"""Commands on their way to a Redis server, over a connection of a pool, and the replies to them.

A connection that turns out to have died while idle is replaced, and what was asked is asked once
more. Whether the server has failed is for its pool to know.
"""

import select
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from headrace.features.breaker import Attempt
from headrace.features.redis_commands import MAX_PART_BYTES, PackedCommands
from headrace.features.redis_connection import RedisConnection
from headrace.features.redis_errors import OversizedReplyError

if TYPE_CHECKING:  # it begins the conversations
    from headrace.features.redis_pool import RedisPool

MAX_BATCH_REPLY_BYTES = 256 << 20
"""Of the replies to one batch, of all servers together."""

Exchange = Sequence[tuple[int, Any]]
"""(Place of the key group, commands) each."""


class Conversation:
    """
    Commands on their way to a server. `finish`, or `finish_all`, must follow.

    Unless it does, and gets every reply, the connection is not used again: what is still on its way
    would be taken for the answer to something else.

    Args: as `RedisPool.start` takes them.
        attempt: Leave to try, of the pool's breaker.
        least_s: A server that was given less has not failed when the deadline passes.
    """

    def __init__(
        self,
        pool: "RedisPool",
        exchanges: Sequence[Exchange],
        deadline_s: float,
        attempt: Attempt | None,
        least_s: float,
    ) -> None:
        self.deadline_s = deadline_s
        self._pool = pool
        self._exchanges = exchanges
        self._attempt = attempt
        self._least_s = least_s
        self._waiting_since_s = time.monotonic()
        self._place = 0  # of the exchange under way
        self._replies: dict[int, list[bytes]] = {}
        self._connection: RedisConnection | None = None
        taken = pool.take()
        self._was_idle = taken is not None
        try:
            if taken is None:
                self._open()
            else:
                self._generation, self._connection = taken
            self._begin()
        except OSError as error:
            self._recover(error)

    def fileno(self) -> int:
        assert self._connection is not None
        return self._connection.fileno()

    @property
    def events(self) -> int:
        assert self._connection is not None
        return self._connection.events

    def finish(self, max_bytes: int = MAX_BATCH_REPLY_BYTES) -> list[bytes]:
        """
        Return each key group's replies.

        Raises:
            OversizedReplyError: they have more than `max_bytes`.
            OSError: the connection failed, or the deadline passed.
        """
        (replies,) = finish_all([self], max_bytes)
        if isinstance(replies, OSError):
            raise replies
        return replies

    def begin_waiting(self) -> None:
        """Count the server's time from now: until then, connecting to others may have taken it."""
        self._waiting_since_s = time.monotonic()

    def advance(self, max_bytes: int) -> tuple[int, list[bytes] | None]:
        """
        Do what can be done without waiting.

        Returns:
            How many bytes came, and each key group's replies once all have come.

        Raises:
            OversizedReplyError: there are more than `max_bytes`.
            OSError: the connection failed; this conversation is over.
        """
        assert self._connection is not None
        try:
            before = self._connection.received_bytes
            pieces = self._connection.advance(before + max_bytes)
            count = self._connection.received_bytes - before
            return count, None if pieces is None else self._take(pieces)
        except OSError as error:
            self._recover(error)
            return 0, None

    def time_out(self) -> TimeoutError:
        """End this conversation because its deadline has passed; return what to raise."""
        error = TimeoutError("no answer in time")
        self._give_up(error)
        return error

    def _take(self, pieces: list[bytes]) -> list[bytes] | None:
        for (group, _), piece in zip(self._exchanges[self._place], pieces, strict=True):
            self._replies.setdefault(group, []).append(piece)
        self._place += 1
        if self._place < len(self._exchanges):
            self._begin()
            return None
        assert self._connection is not None
        self._pool.keep(self._generation, self._connection)
        return [b"".join(own) for own in self._replies.values()]

    def _open(self) -> None:
        self._generation = self._pool.generation
        self._connection = None
        self._connection = self._pool.open(self.deadline_s)

    def _begin(self) -> None:
        assert self._connection is not None
        self._connection.begin([commands for _, commands in self._exchanges[self._place]])

    def _recover(self, error: OSError) -> None:
        """Begin again with a new connection if an idle one has died; else give up and raise."""
        if not self._was_idle or isinstance(error, TimeoutError | OversizedReplyError):
            self._give_up(error)
            raise error
        assert self._connection is not None
        self._connection.close()
        self._pool.drop(self._generation)  # the others have died with it
        self._was_idle = False
        self._place = 0
        self._replies.clear()
        try:
            self._open()
            self.begin_waiting()  # what connecting took was not given to the read
            self._begin()
        except OSError as another:
            self._give_up(another)
            raise

    def _give_up(self, error: OSError) -> None:
        if self._connection is not None:
            self._connection.close()
        is_late = isinstance(error, TimeoutError)
        # What it was given, and not when that was noticed: the machine may be busy.
        had_its_time = self.deadline_s - self._waiting_since_s >= self._least_s
        if isinstance(error, OversizedReplyError) or (is_late and not had_its_time):
            self._pool.left_open(self._attempt)
            return
        if self._was_idle and is_late:  # the other idle ones would be silent, too
            self._pool.drop(self._generation)
        self._pool.failed(self._attempt)


def finish_all(
    conversations: Sequence[Conversation], max_bytes: int = MAX_BATCH_REPLY_BYTES
) -> list[list[bytes] | OSError]:
    """
    Bring conversations to their ends, whichever server answers first.

    What has come by the deadline is read, so that nobody fails for having been looked at late.

    Returns:
        Per conversation each key group's replies, or why there are none.
    """
    outcomes: list[list[bytes] | OSError] = [_UNFINISHED] * len(conversations)
    poll = select.poll()
    places: dict[int, int] = {}
    for place, conversation in enumerate(conversations):
        conversation.begin_waiting()
        poll.register(conversation, conversation.events)
        places[conversation.fileno()] = place
    while places:
        remaining_s = min(conversations[at].deadline_s for at in places.values())
        remaining_s -= time.monotonic()
        for fileno, _ in poll.poll(max(remaining_s, 0.0) * 1e3):
            place = places.pop(fileno)
            conversation = conversations[place]
            poll.unregister(fileno)
            try:
                count, replies = conversation.advance(max_bytes)
            except OSError as error:
                outcomes[place] = error
                continue
            max_bytes -= count
            if replies is not None:
                outcomes[place] = replies
                continue
            poll.register(conversation, conversation.events)
            places[conversation.fileno()] = place
        if remaining_s <= 0:
            for place in places.values():
                outcomes[place] = conversations[place].time_out()
            break
    return outcomes


def exchanges(packed: Sequence[PackedCommands]) -> list[Exchange]:
    """All at once when that is little enough, else part by part."""
    if sum(commands.byte_count for commands in packed) <= MAX_PART_BYTES:
        return [[(group, commands.parts[0]) for group, commands in enumerate(packed)]]
    return [[(group, part)] for group, commands in enumerate(packed) for part in commands.parts]


def reply_limit(packed: Sequence[PackedCommands]) -> int:
    """Return how many bytes the replies to a batch may have."""
    limits = [commands.max_reply_bytes or MAX_BATCH_REPLY_BYTES for commands in packed]
    return min(sum(limits), MAX_BATCH_REPLY_BYTES)


_UNFINISHED = OSError("not asked to the end")
