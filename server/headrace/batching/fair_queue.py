"""The requests that wait for one model version, when their callers take turns.

As `queue`, but for the order: within a priority level callers have their turns by rows
(`shares`), and within one caller's requests the earliest deadline goes first. No caller may take
up more of the queue than a multiple of what is left of it, so that there is room for others.

A lane's `entries` are those whose turn it is, as many as a batch may take: they are drawn from its
line-up when an executor comes, and those that it does not take go back. All others wait in the
line-up.
"""

import itertools
import math
from collections.abc import Hashable, Iterable, Sequence
from typing import Final

from headrace.batching.ahead import Ahead, place_of
from headrace.batching.callers import Caller
from headrace.batching.codel import Codel
from headrace.batching.cost import BatchCost
from headrace.batching.fronts import Fronts
from headrace.batching.lane import REQUEST, START_BY, Entry, Lane
from headrace.batching.level_room import LevelRoom
from headrace.batching.line_up import LineUp, rank_of
from headrace.batching.policy import UNLIMITED, BatchPolicy, LevelPolicy
from headrace.batching.queue import RequestQueue
from headrace.batching.shares import Shares
from headrace.batching.waiting import RequestT

FREE_SHARE: Final = 4
"""
A caller may have waiting at most so many times what is left of the queue: four fifths of it if he
is alone, four ninths each if two do so, and there is always room for one more.

Source: Choudhury and Hahne, "Dynamic queue length thresholds for shared-memory packet switches",
IEEE/ACM Transactions on Networking, 1998.
"""

LANES_COUNTED_MAX: Final = 64
"""Lanes that are looked at to predict a wait, some 30 µs; others count by their rows alone."""


class FairQueue(RequestQueue[RequestT]):
    """
    Requests in line, with fair shares for their callers. Not safe for several threads at once.

    Of those who wait throughout, each gets as many rows as any other of the same level, within the
    rows of a batch. What `put` and `take` cost depends on how many callers wait by its logarithm.

    Args:
        policy: Decides what makes a batch.
        cost: How long a batch takes.
        levels: Policies of the priority levels, of level 1 first.
        default_level: Of a request that names none, or one that is not there.
        executors: How many batches run side by side.
        codel: Says when the queue stands; whoever has waited too long is dropped then.
        max_queue_size: Most requests waiting at once; whoever owns the queue sees to it.
        max_queue_bytes: Most bytes of them, likewise.
    """

    is_impartial = False

    REFUSAL = "too many requests of this priority, or of this caller, are already waiting"

    def __init__(
        self,
        policy: BatchPolicy,
        cost: BatchCost,
        levels: Sequence[LevelPolicy] = (LevelPolicy(),),
        default_level: int = 1,
        executors: int = 1,
        codel: Codel | None = None,
        *,
        max_queue_size: int = UNLIMITED,
        max_queue_bytes: int = UNLIMITED,
    ) -> None:
        super().__init__(
            *(policy, cost, levels, default_level, executors, codel),
            max_queue_size=max_queue_size,
            max_queue_bytes=max_queue_bytes,
        )
        self._line_ups: dict[Hashable, LineUp[RequestT]] = {}
        self._order = Fronts(self._lanes, self._line_ups)
        self._shares: dict[int, Shares] = {}
        self._held: dict[Caller, tuple[int, int]] = {}  # requests and bytes that each has waiting

    def add(self, request: RequestT, now_s: float, later_s: float = 0.0) -> bool:
        """Put a request in line, unless its level is full, or its caller's part of the queue."""
        return self._has_room(request) and super().add(request, now_s, later_s)

    def has_room(self, request: RequestT, places: int) -> bool:
        """
        Say whether a request's level, and its caller's part of the queue, have room for it.

        As with one that stays whole, a caller's part of the queue is what he holds before it:
        otherwise a request that may be as large as the queue would be refused whenever it came.
        """
        return self._may_have(request) and super().has_room(request, places)

    def add_all(self, parts: Sequence[RequestT], now_s: float) -> bool:
        """As `add`, for all parts of one request or none."""
        return self._has_room(parts[0]) and super().add_all(parts, now_s)

    def _make_room(
        self, room: LevelRoom[RequestT], first: RequestT, places: int, byte_count: int
    ) -> list[RequestT]:
        """
        As `queue`, but whose own part is full makes the room himself, as far as he can.

        If that is not enough others make as much as he takes: they have no less room than before.
        """
        gone: list[RequestT] = []
        level, caller = self.level_of(first), first.caller
        most, most_bytes = self.count - places, self.byte_count - byte_count
        while not self._has_part(caller) and (self.count > most or self.byte_count > most_bytes):
            last = room.own_newest_below(level, caller) or room.newest_below(level)
            if last is None:
                break
            gone += self._displaced(last)
        return gone + super()._make_room(room, first, places, byte_count)

    def remove(self, request: RequestT) -> bool:
        """Take out a request that nobody waits for any more; say whether it was in line."""
        entry: Entry[RequestT] | None = request.place
        key = request.batch_key
        line_up = self._line_ups.get(key)
        if entry is None or line_up is None or not line_up.remove(entry):
            return False
        self._left(self._lanes[key], (entry,))
        if not line_up:
            del self._lanes[key], self._line_ups[key]
        return True

    def _has_room(self, request: RequestT) -> bool:
        """Say whether a caller may have one more waiting, as things are."""
        return self._has_part(request.caller) and self._has_part_of_level(request)

    def _may_have(self, request: RequestT) -> bool:
        """Say the same, if lower levels need no room."""
        if not self._has_part_of_level(request):
            return False
        if self._room is None or self._has_part(request.caller):
            return self._has_part(request.caller)
        level = self.level_of(request)
        requests, byte_count = self._held.get(request.caller, (0, 0))
        below, bytes_below = self._room.own_below(level, request.caller)
        free, free_bytes = self._room.free(level)
        return (
            requests - below < FREE_SHARE * free
            and byte_count - bytes_below <= FREE_SHARE * free_bytes
        )

    def _has_part(self, caller: Caller) -> bool:
        requests, byte_count = self._held.get(caller, (0, 0))
        return requests < FREE_SHARE * (
            self._max_queue_size - self.count
        ) and byte_count <= FREE_SHARE * (self._max_queue_bytes - self.byte_count)

    def _has_part_of_level(self, request: RequestT) -> bool:
        if self._is_plain:
            return True
        level = self.level_of(request)
        most = self._levels[level - 1].max_queue_size
        shares = self._shares.get(2 * level)
        share = None if shares is None else shares.find(request.caller)
        return not most or share is None or share.count < FREE_SHARE * (most - self._counts[level])

    def _ahead(self, request: RequestT, now_s: float, most: int) -> Ahead:
        lanes, rows = self._lanes, request.rows
        ahead = self._rows_ahead(request, now_s)
        before = (ahead + rows - 1) // most
        own = lanes.get(request.batch_key)
        if len(lanes) <= (own is not None):
            return before, before * most, self.rows + rows - before * most
        last = rows if own is None else max(rows, own.rows + rows - before * most)
        batches = max(before, self._lanes_ahead(request, ahead))
        if own is not None and own.rows + rows <= most:
            batches = min(batches, self._batches_sooner(own, most))
        return batches, min(batches * most, max(before * most, ahead)), last

    def _lanes_ahead(self, request: RequestT, ahead: int) -> int:
        """
        Return in how many lanes, other than its own, somebody goes before a request, if rows do.

        As if those who wait at its level, or a higher one, were spread evenly over their lanes.
        """
        rank, key = 2 * self.level_of(request), request.batch_key
        rows = sum([shares.rows for other, shares in self._shares.items() if other <= rank])
        others = 0
        for other, line_up in itertools.islice(self._line_ups.items(), LANES_COUNTED_MAX):
            front = line_up.filed
            others += front is not None and front[0] <= rank and other != key
        return others * min(ahead, rows) // rows if rows else 0

    def _batches_sooner(self, lane: Lane[RequestT], most: int) -> int:
        """Return how many batches may go before the front of a lane, whom a request joins."""
        own_front = self._line_ups[lane.key].front()
        assert own_front is not None
        batches = 0
        for key, line_up in itertools.islice(self._line_ups.items(), LANES_COUNTED_MAX):
            filed = line_up.filed  # never later than its front
            if filed is not None and filed < own_front and key != lane.key:
                front = line_up.front()
                if front is not None and front < own_front:
                    batches -= -self._lanes[key].rows // most
        return batches

    def _rows_ahead(self, request: RequestT, now_s: float) -> int:
        """Return how many rows go before a request's own, about, if it is added now."""
        level, caller = self.level_of(request), request.caller
        rank = 2 * level
        ahead = sum([shares.rows for other, shares in self._shares.items() if other < rank])
        shares = self._shares.get(rank)
        if shares is None:
            return ahead
        own, share = 0, shares.find(caller)
        if share is not None and share.count:
            key, place = (rank, caller), place_of(level, request.deadline_s, now_s)
            behind = 0
            for line_up in itertools.islice(self._line_ups.values(), LANES_COUNTED_MAX):
                behind += line_up.behind(key, place)
            own = share.rows * (share.count - behind) // share.count  # as if all had as many rows
        return ahead + own + shares.rows_before(caller, own + request.rows)

    def _insert(self, entry: Entry[RequestT]) -> None:
        request = entry[REQUEST]
        request.place = entry
        key = request.batch_key
        lane = self._lanes.get(key)
        if lane is None:
            lane = self._lanes[key] = Lane(key)
            self._line_ups[key] = LineUp()
        self._came(lane, entry)
        rank, line_up = rank_of(entry), self._line_ups[key]
        shares = self._shares.get(rank)
        if shares is None:
            shares = self._shares[rank] = Shares()
        is_head = line_up.add(entry, shares, shares.came(request.caller, request.rows))
        requests, byte_count = self._held.get(request.caller, (0, 0))
        self._held[request.caller] = requests + 1, byte_count + request.byte_count
        if is_head:
            self._order.file(lane)

    def _left(self, lane: Lane[RequestT], entries: Sequence[Entry[RequestT]]) -> None:
        super()._left(lane, entries)
        held = self._held
        for entry in entries:
            request = entry[REQUEST]
            caller = request.caller
            shares = self._shares[rank_of(entry)]
            share = shares.find(caller)
            assert share is not None
            shares.went(share, request.rows)
            requests, byte_count = held[caller]
            if requests == 1:
                del held[caller]
            else:
                held[caller] = requests - 1, byte_count - request.byte_count

    def _entries(self, lane: Lane[RequestT]) -> Iterable[Entry[RequestT]]:
        return itertools.chain(lane.entries, self._line_ups[lane.key])

    def _drop_hopeless(self, lane: Lane[RequestT], now_s: float, dropped: list[RequestT]) -> int:
        """
        Draw what a batch may hold, less who would be answered too late, as `queue` has it.

        What is taken is cut short for the sake of the most urgent only where everything fits: then
        the earliest deadlines go, whose ever they are.
        """
        cost, limit = self._cost, self._policy.max_batch_size or 1
        line_up, entries = self._line_ups[lane.key], lane.entries
        drawn = 0
        while drawn < limit and (entry := line_up.draw()) is not None:
            request, soonest_s = entry[REQUEST], now_s
            rows = request.rows
            if request.deadline_s != math.inf and not self._is_all(request):
                soonest_s += cost.bound_s(rows if lane.rows <= limit else max(rows, limit))
            if request.expired(soonest_s) or entry[START_BY] < now_s:
                line_up.undraw()
                self._pass_over(lane, entry, soonest_s, dropped)
            else:
                entries.append(entry)
                drawn += rows
        if not entries or lane.rows > limit:
            return limit
        head = min(entries)
        deadline_s, rows = head[REQUEST].deadline_s, head[REQUEST].rows
        if deadline_s > now_s + cost.bound_s(max(rows, lane.rows)):
            return limit
        entries.sort()
        return max(rows, cost.rows_within(deadline_s - now_s))

    def _put_back(self, lane: Lane[RequestT]) -> None:
        self._line_ups[lane.key].settle((), lane.entries)
        lane.entries.clear()

    def _settle(self, lane: Lane[RequestT], taken: Sequence[Entry[RequestT]] = ()) -> None:
        line_up = self._line_ups[lane.key]
        line_up.settle(taken, lane.entries)
        lane.entries.clear()
        if line_up:
            self._order.file(lane)
        else:
            del self._lanes[lane.key], self._line_ups[lane.key]
