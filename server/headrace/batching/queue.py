"""The requests that wait for one model version: in what order they go, and which go no more.

Pure but for its own contents: times come in, no clock is read and nobody is told anything.
`batcher` locks it, wakes executors and answers those that are dropped; the simulation in the tests
drives it with a clock of its own.

Order: by priority level, in a level by when a request is due (earliest deadline first), at equal
times by arrival. Requests share a batch only with those of the same `batch_key`, which have a lane.
"""

import itertools
import math
from bisect import bisect_left, insort
from collections.abc import Hashable, Iterable, Sequence
from operator import attrgetter
from typing import Generic

from headrace.batching.ahead import Ahead, ahead_in_lanes, answered_in_s, place_of, rows_behind
from headrace.batching.codel import Codel
from headrace.batching.cost import BatchCost
from headrace.batching.heads import Heads, LaneOrder
from headrace.batching.lane import (
    LEVEL,
    NUMBER,
    PATIENCE_S,
    REQUEST,
    START_BY,
    Entry,
    Lane,
    Taken,
)
from headrace.batching.level_room import LevelRoom
from headrace.batching.limits import Limits
from headrace.batching.parts import turns_apart_s
from headrace.batching.policy import UNLIMITED, BatchPolicy, LevelPolicy
from headrace.batching.standing import Standing
from headrace.batching.waiting import RequestT

SPARE_S = 0.002
"""So long before its last moment a request waits for company no more: waking takes a while."""

_rows, _byte_count = attrgetter("rows"), attrgetter("byte_count")


class RequestQueue(Generic[RequestT]):
    """
    Requests in line. Not safe for several threads at once.

    Every request that was `add`ed leaves once: in a batch, among the dropped, or by `remove`.

    Args:
        policy: Decides what makes a batch.
        levels: Policies of the priority levels, of level 1 first.
        default_level: Of a request that names none, or one that is not there.
        cost: How long a batch takes.
        executors: How many batches run side by side.
        codel: Says when the queue stands; whoever has waited too long is dropped then.
        max_queue_size: Most requests waiting at once; whoever owns a queue of one level sees to it.
        max_queue_bytes: Most bytes of them, likewise.

    Attributes:
        executors: As given; may be changed.
        shed: How many were dropped because the queue stood.
    """

    is_impartial = True
    """Whether it makes no difference whose a request is: one is refused as any other would be."""

    REFUSAL = "too many requests of this priority are already waiting"
    """What it means that `add` does not take a request."""

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
        self.count = self.byte_count = self.rows = 0
        self.shed = 0
        self._standing: Standing[RequestT] | None = None if codel is None else Standing(codel)
        self._policy = policy
        self._cost = cost
        self._levels = levels
        self._default_level = default_level
        self.executors = executors
        self._max_queue_size = max_queue_size
        self._max_queue_bytes = max_queue_bytes
        self._counts = [0] * (len(levels) + 1)
        self._room: LevelRoom[RequestT] | None = None
        if len(levels) > 1:
            self._room = LevelRoom(
                len(levels), max_queue_size, max_queue_bytes, by_caller=not self.is_impartial
            )
        self._lanes: dict[Hashable, Lane[RequestT]] = {}
        self._order: LaneOrder[RequestT] = Heads(self._lanes)
        self._numbers = itertools.count()
        self._last_rows = 0
        self._takes_everything = policy.takes_everything
        self._is_plain = len(levels) == 1 and levels[0] == LevelPolicy()
        # Where nothing but deadlines counts, whoever's time is over has his turn soon.
        self._has_limits = not (self._is_plain and self.is_impartial)
        self._limits: Limits[RequestT] = Limits()

    def level_of(self, request: RequestT) -> int:
        """Return the level at which a request waits; Source: Triton, `InferenceRequest`."""
        given = request.priority
        return given if 1 <= given <= len(self._levels) else self._default_level

    def binds(self, request: RequestT) -> bool:
        """Say whether `bind` gives a request a deadline; may be called by any thread."""
        return bool(request.timeout_s) and not self._is_delayed(self.level_of(request))

    def bind(self, request: RequestT, now_s: float) -> None:
        """Make what a request says of its own timeout a part of its deadline, where it counts."""
        if self.binds(request):
            request.deadline_s = min(request.deadline_s, now_s + request.timeout_s)

    def finish_s(self, request: RequestT, now_s: float, free_in_s: float) -> float:
        """
        Predict when a request would have been answered if it were added now.

        Args:
            request: Not in the queue.
            now_s: Unix seconds.
            free_in_s: In how many seconds an executor will be free, about.
        """
        most = self._policy.max_batch_size or 1
        ahead = self._ahead(request, now_s, most)
        return now_s + answered_in_s(
            ahead, self._cost, most, self._last_rows, self.executors, free_in_s
        )

    def soonest_s(self, deadline_s: float, now_s: float, free_in_s: float) -> float:
        """
        Predict when a request would be answered of which only the deadline is known.

        Returns:
            At most what `finish_s` says of any that has this deadline and names no timeout; `now_s`
            where priorities, different shapes or whose it is leave it open.
        """
        lanes = self._lanes.values()
        if len(self._levels) > 1 or len(lanes) > 1 or not self.is_impartial:
            return now_s
        most = self._policy.max_batch_size or 1
        place, before = place_of(self._default_level, deadline_s, now_s), 0
        for lane in lanes:
            before = (lane.rows - rows_behind(lane, place)) // most
        return now_s + answered_in_s(
            (before, before * most, 1),
            self._cost,
            most,
            self._last_rows,
            self.executors,
            free_in_s,
        )

    def is_in_time(self, deadline_s: float, now_s: float) -> bool:
        """Say whether a deadline is so far away that `finish_s` needs no asking."""
        most = self._policy.max_batch_size or 1
        # Of each shape at most one batch that is not full; the rest of one that runs, and its own.
        batches = self.rows // most + len(self._lanes) + 2
        return now_s + batches * self._cost.bound_s(most) <= deadline_s

    def add(self, request: RequestT, now_s: float, later_s: float = 0.0) -> bool:
        """
        Put a request in line, unless its level is full, or a queue of several levels is.

        Args:
            request: Not in the queue.
            now_s: Unix seconds.
            later_s: So much later its turn is than that of one that comes now.
        """
        due_s, start_by_s, level = now_s + later_s + PATIENCE_S, math.inf, 1
        due_s = min(due_s, request.deadline_s)
        if not self._is_plain:
            level = self.level_of(request)
            policy = self._levels[level - 1]
            if policy.max_queue_size and self._counts[level] >= policy.max_queue_size:
                return False
            if self._room is not None and self._lacks(1, request.byte_count):
                return False
            start_by_s = now_s + self._patience_s(request)
        number = next(self._numbers)
        self._insert((level, due_s, number, start_by_s, request))
        if self._standing is not None:
            parts = request.parts
            if not parts or parts[0] is request:  # the others wait while it runs
                self._standing.came(number, request, now_s)
        return True

    def _patience_s(self, request: RequestT) -> float:
        """Return how long a request's level lets it wait."""
        policy = self._levels[self.level_of(request) - 1]
        if request.timeout_s and policy.may_override:
            return min(policy.timeout_s, request.timeout_s)
        return policy.timeout_s

    @property
    def batches(self) -> int:
        """How many batches what waits makes at least, about: each shape has its own."""
        return max(self.rows // (self._policy.max_batch_size or 1), len(self._lanes))

    def yields(self, level: int, byte_count: int, places: int = 1) -> bool:
        """Say whether lower levels can make room for so much of a level in a full queue."""
        return self._room is not None and self._room.fits(level, byte_count, places)

    def has_room(self, request: RequestT, places: int) -> bool:
        """Say whether a request's level has room for so many parts of it, as the queue may have."""
        if self._is_plain:
            return True
        level = self.level_of(request)
        most = self._levels[level - 1].max_queue_size
        return not most or self._counts[level] + places <= most

    def add_all(self, parts: Sequence[RequestT], now_s: float) -> bool:
        """
        Put all parts of one request in line, unless there is no room for all of them.

        Each has its turn as if it came when those before it have been run, as far as the request
        has time for that: who comes meanwhile need not wait for all of it.
        """
        if not self.has_room(parts[0], len(parts)):
            return False
        if self._room is not None and self._lacks(len(parts), sum(map(_byte_count, parts))):
            return False
        self._add_parts(parts, now_s)
        return True

    def _add_parts(self, parts: Sequence[RequestT], now_s: float) -> None:
        most, spare_s = self._policy.max_batch_size or 1, parts[0].deadline_s - now_s
        if not self._is_plain:
            spare_s = min(spare_s, self._patience_s(parts[0]))
        apart_s = turns_apart_s(
            self._cost, most, len(parts), self.rows / most, self.executors, spare_s
        )
        for i, part in enumerate(parts):
            RequestQueue.add(self, part, now_s, i * apart_s)

    def displace(self, requests: Sequence[RequestT], now_s: float) -> list[RequestT]:
        """
        Put a request, or all parts of one, in line in place of others of lower levels.

        Args:
            requests: It, or the parts; `add` or `add_all` did not take them.
            now_s: Unix seconds.

        Returns:
            Who has left the queue for it; nobody, if it was not put.
        """
        first, places = requests[0], len(requests)
        if self._room is None or not self.has_room(first, places):
            return []
        byte_count = sum(map(_byte_count, requests))
        if not self._room.fits(self.level_of(first), byte_count, places):
            return []
        gone = self._make_room(self._room, first, places, byte_count)
        if places == 1:
            RequestQueue.add(self, first, now_s)
        else:
            self._add_parts(requests, now_s)
        return gone

    def _make_room(
        self, room: LevelRoom[RequestT], first: RequestT, places: int, byte_count: int
    ) -> list[RequestT]:
        gone: list[RequestT] = []
        level = self.level_of(first)
        while self._lacks(places, byte_count) and (last := room.newest_below(level)) is not None:
            gone += self._displaced(last)
        return gone

    def _displaced(self, last: RequestT) -> list[RequestT]:
        """Take out a request that makes room, and all other parts of the one it is a part of."""
        gone = [each for each in last.parts or (last,) if self.remove(each)]
        for each in gone:
            each.is_displaced = True
        return gone

    def _lacks(self, places: int, byte_count: int) -> bool:
        """Say whether so much more is more than may wait."""
        return (
            self.count + places > self._max_queue_size
            or self.byte_count + byte_count > self._max_queue_bytes
        )

    def remove(self, request: RequestT) -> bool:
        """Take out a request that nobody waits for any more; say whether it was in line."""
        entry: Entry[RequestT] | None = request.place
        lane = self._lanes.get(request.batch_key)
        if entry is None or lane is None:
            return False
        at = bisect_left(lane.entries, entry)
        if at == len(lane.entries) or lane.entries[at] is not entry:
            return False
        del lane.entries[at]
        self._left(lane, (entry,))
        if not lane.entries:
            del self._lanes[lane.key]
        return True

    def overdue(self, now_s: float) -> list[RequestT]:
        """
        Take out those whose own time is over, be it by their deadline or by their level's policy.

        Where nothing but deadlines counts they are left to `take`: their turn comes soon.
        """
        gone = self._limits.over(now_s)
        for request in gone:
            self.remove(request)
        return gone

    def sweep(self, now_s: float) -> list[RequestT]:
        """Take out every request that has expired. Walks the whole queue."""
        gone = self.overdue(now_s)
        expired = [
            request
            for lane in self._lanes.values()
            for *_, request in self._entries(lane)
            if request.expired(now_s)
        ]
        for request in expired:
            self.remove(request)
        return gone + expired

    def _entries(self, lane: Lane[RequestT]) -> Iterable[Entry[RequestT]]:
        """Return all of a lane's, in any order."""
        return lane.entries

    def take(self, now_s: float, arrived_before_s: float = math.inf) -> Taken[RequestT]:
        """
        Take the batch whose turn it is.

        Args:
            now_s: Unix seconds.
            arrived_before_s: Now, on the clock of `arrival_s`; infinite to wait for no company.
        """
        dropped: list[RequestT] = self.overdue(now_s) if self._has_limits else []
        standing = self._standing
        if standing is not None:
            self._shed(standing, now_s, dropped)
        while True:
            batch, wait_s = self._choose(now_s, arrived_before_s, dropped)
            if not dropped or not self._drop_siblings(batch, dropped) or batch:
                break
        if standing is not None and not batch:
            standing.pause(now_s)
        return Taken(batch, dropped, wait_s)

    def _choose(
        self, now_s: float, arrived_before_s: float, dropped: list[RequestT]
    ) -> tuple[list[RequestT], float | None]:
        """Take the batch whose turn it is; none, and how long to wait, when nothing may leave."""
        held: list[Lane[RequestT]] = []
        batch: list[RequestT] = []
        wait_s: float | None = None
        while not batch and (lane := self._order.pop()) is not None:
            most = self._drop_hopeless(lane, now_s, dropped)
            if not lane.entries:
                self._settle(lane)
                continue
            count = len(lane.entries)
            if self.rows > most or not self._takes_everything:
                policy = self._policy
                waited_s = policy.max_queue_delay_s
                if lane.rows < min(most, policy.max_batch_size):  # a full one leaves anyway
                    waited_s = self._oldest_wait_s(lane, now_s, arrived_before_s)
                decision = policy.decide(
                    [entry[REQUEST].rows for entry in lane.entries[: policy.most_requests]],
                    waited_s,
                    most,
                )
                count = decision.count
                if not count:
                    held.append(lane)
                    self._put_back(lane)
                    own_s = min(decision.wait_s, self._spare_s(lane, now_s))
                    wait_s = own_s if wait_s is None else min(wait_s, own_s)
                    continue
            batch = self._take_from(lane, count, now_s, dropped)
        for lane in held:
            self._settle(lane)
        return batch, wait_s

    def _drop_siblings(self, batch: list[RequestT], dropped: list[RequestT]) -> bool:
        """Drop all parts of a request of which one is dropped; say whether the batch lost any."""
        split = {id(parts): parts for request in dropped if (parts := request.parts)}
        for parts in split.values():
            dropped += [part for part in parts if self.remove(part)]
        lost = [request for request in batch if split and id(request.parts) in split]
        if lost:
            batch[:] = [request for request in batch if id(request.parts) not in split]
            dropped += lost
        return bool(lost)

    def _insert(self, entry: Entry[RequestT]) -> None:
        request = entry[REQUEST]
        request.place = entry
        key = request.batch_key
        lane = self._lanes.get(key)
        if lane is None:
            lane = self._lanes[key] = Lane(key)
        entries = lane.entries
        if not entries or entry > entries[-1]:
            entries.append(entry)
        else:
            insort(entries, entry)
        self._came(lane, entry)
        if entries[0] is entry:
            self._order.file(lane)

    def _came(self, lane: Lane[RequestT], entry: Entry[RequestT]) -> None:
        """Count a request in that was put into its lane."""
        request = entry[REQUEST]
        lane.rows += request.rows
        self.rows += request.rows
        self.count += 1
        self.byte_count += request.byte_count
        if self._has_limits:
            level, _, number, limit_s, _ = entry
            if not self._is_plain:
                self._counts[level] += 1
                if self._room is not None:
                    self._room.came(level, number, request)
                if limit_s != math.inf and self._is_delayed(level):
                    limit_s = math.inf
            limit_s = min(limit_s, request.deadline_s)
            if limit_s != math.inf:
                self._limits.came(number, limit_s, request)

    def _is_delayed(self, level: int) -> bool:
        """Say whether one that has waited as long as its level allows goes last, and is kept."""
        return self._levels[level - 1].is_delayed

    def _ahead(self, request: RequestT, now_s: float, most: int) -> Ahead:
        """Say what goes before a request's own batch, about, if it is added now."""
        level = 1 if self._is_plain else self.level_of(request)
        place = place_of(level, request.deadline_s, now_s)
        return ahead_in_lanes(self._lanes, request.batch_key, request.rows, place, most)

    def _shed(self, standing: Standing[RequestT], now_s: float, dropped: list[RequestT]) -> None:
        """Drop those who have waited too long, while the queue stands; a batch is always left."""
        limit = self._policy.max_batch_size or 1
        for request in standing.overdue(now_s, stays=self.rows > limit):
            whole: Sequence[RequestT] = request.parts or (request,)
            if self.rows - sum(map(_rows, whole)) < limit:
                return
            for each in whole:
                self.remove(each)
                each.is_shed = True
            self.shed += 1
            dropped += whole

    def _put_back(self, lane: Lane[RequestT]) -> None:
        """Note that nothing leaves a lane now that was taken out of the order."""

    def _settle(self, lane: Lane[RequestT], taken: Sequence[Entry[RequestT]] = ()) -> None:  # noqa: ARG002 a fair queue asks
        """
        Give a lane that was taken out its place among the others again, if anybody is left.

        Args:
            lane: Theirs.
            taken: Entries that were taken out of it to be served.
        """
        if lane.entries:
            self._order.file(lane)
        else:
            del self._lanes[lane.key]

    def _drop_hopeless(self, lane: Lane[RequestT], now_s: float, dropped: list[RequestT]) -> int:
        """
        Drop heads that would be answered too late; return how many rows the next one's batch has.

        While more waits than a batch can hold, batches are full, and whoever cannot make it in a
        full one makes room: small batches for the sake of the most urgent would cost more of the
        others. Otherwise the batch is as small as its head needs. The last one of all, or the first
        part of the only one, is never dropped for what is expected of it: something must run for
        the expectation to mend.
        """
        cost, limit = self._cost, self._policy.max_batch_size or 1
        while lane.entries:
            entry = lane.entries[0]
            request = entry[REQUEST]
            if request.deadline_s == math.inf and entry[START_BY] == math.inf:
                if not request.expired(now_s):
                    return limit
                full_s = alone_s = now_s
            else:
                rows = lane.rows
                full_s = now_s + cost.bound_s(max(request.rows, min(limit, rows)))
                alone_s = full_s
                if self._is_all(request):
                    alone_s = now_s
                elif rows <= limit:
                    alone_s = now_s + cost.bound_s(request.rows)
            if request.expired(alone_s) or entry[START_BY] < now_s:
                del lane.entries[0]
                self._pass_over(lane, entry, alone_s, dropped)
                continue
            if request.deadline_s <= full_s:
                return max(request.rows, cost.rows_within(request.deadline_s - now_s))
            return limit
        return 0

    def _is_all(self, request: RequestT) -> bool:
        """Say whether nothing waits but a request, or all parts of the one that it is a part of."""
        return self.count == 1 or self.count == len(request.parts)

    def _pass_over(
        self,
        lane: Lane[RequestT],
        entry: Entry[RequestT],
        soonest_s: float,
        dropped: list[RequestT],
    ) -> None:
        """Let go of a request that was taken out of its lane, or put it behind the others."""
        level, _, number, _, request = entry
        is_kept = self._room is not None and self._room.is_kept(number)
        self._left(lane, (entry,))
        if self._is_delayed(level) and not request.expired(soonest_s):
            self._insert(behind := (level, math.inf, number, math.inf, request))
            if is_kept and self._room is not None:
                self._room.keep((behind,))
        else:
            dropped.append(request)

    def _left(self, lane: Lane[RequestT], entries: Sequence[Entry[RequestT]]) -> None:
        """Count requests out that were taken out of their lane."""
        requests = [entry[REQUEST] for entry in entries]
        rows = sum(map(_rows, requests))
        lane.rows -= rows
        self.rows -= rows
        self.count -= len(requests)
        self.byte_count -= sum(map(_byte_count, requests))
        for request in requests:  # it leads back here: references alone would not free it
            request.place = None
        if self._has_limits:
            if not self._is_plain:
                for entry in entries:
                    self._counts[entry[LEVEL]] -= 1
                if self._room is not None:
                    self._room.left(entries)
            if self._limits:
                self._limits.left([entry[NUMBER] for entry in entries])
        if self._standing is not None:
            for entry in entries:
                self._standing.left(entry[NUMBER])

    def _spare_s(self, lane: Lane[RequestT], now_s: float) -> float:
        """Return how long a lane may wait for company before somebody's time is over."""
        took_s = self._cost.bound_s(min(lane.rows, self._policy.max_batch_size or 1))
        latest_s = min(
            [
                min(entry[REQUEST].deadline_s - took_s, entry[START_BY])
                for entry in self._entries(lane)
            ]
        )
        return latest_s - SPARE_S - now_s

    def _oldest_wait_s(self, lane: Lane[RequestT], now_s: float, arrived_before_s: float) -> float:
        delay_s = self._policy.max_queue_delay_s
        if not delay_s or arrived_before_s == math.inf or self._spare_s(lane, now_s) <= 0:
            return delay_s
        return arrived_before_s - min([entry[REQUEST].arrival_s for entry in self._entries(lane)])

    def _take_from(
        self, lane: Lane[RequestT], count: int, now_s: float, dropped: list[RequestT]
    ) -> list[RequestT]:
        entries = lane.entries
        taken = entries[:count]
        del entries[:count]
        rows = sum([entry[REQUEST].rows for entry in taken])
        soonest_s = now_s + self._cost.bound_s(rows)
        # The head has been looked at: the batch is as it needs it.
        late = [
            entry
            for entry in taken[1:]
            if entry[REQUEST].expired(soonest_s) or entry[START_BY] < now_s
        ]
        if late:
            passed = {entry[NUMBER] for entry in late}
            taken = [entry for entry in taken if entry[NUMBER] not in passed]
        self._settle(lane, taken)
        self._left(lane, taken)
        if self._room is not None:
            parts = [part for entry in taken for part in entry[REQUEST].parts]
            self._room.keep([part.place for part in parts if part.place is not None])
        for entry in late:
            self._pass_over(lane, entry, soonest_s, dropped)
        self._last_rows = rows
        return [entry[REQUEST] for entry in taken]
