"""What goes before a request that comes now, and when it would be answered. Pure; an estimate.

Batches are counted lane by lane: whoever is at the head takes others of its lane along, as many as
fit, and nobody else, so that each lane whose head goes first costs at least one.
"""

import itertools
import math
from bisect import bisect_left
from collections.abc import Hashable, Iterable, Mapping
from typing import Any, Final, TypeAlias

from headrace.batching.cost import BatchCost
from headrace.batching.lane import DUE, LEVEL, PATIENCE_S, REQUEST, START_BY, Entry, Lane

COUNTED_MAX: Final = 64
"""
Requests whose rows are added up, in all lanes together; where more are before and behind, their
mean will do.
"""

LANES_COUNTED_MAX: Final = 128
"""
Lanes that are looked at, some 10 µs, or ten times that where each has more than a batch: what waits
in more counts as nothing, so that nobody is refused for it who would be in time. Who is late after
all is given up when his turn comes.
"""

Place: TypeAlias = tuple[int, float, float]
"""
As an entry's level, when it is due, and its number: where a request stands, or would.
"""

Ahead: TypeAlias = tuple[int, int, int]
"""
Batches before a request's own, the rows that run in them, and those of its own, as far as it waits.
"""


def place_of(level: int, deadline_s: float, now_s: float) -> Place:
    """Say where a request stands that comes now: behind all others that are due when it is."""
    return level, min(deadline_s, now_s + PATIENCE_S), math.inf


def rows_behind(lane: Lane[Any], place: Any) -> int:
    """
    Count the rows of a lane that somebody at a place would overtake.

    Exact where all have one, or `COUNTED_MAX` at most are before or behind it; otherwise as if all
    had as many.
    """
    return _rows_behind(lane, place, COUNTED_MAX)[0]


def _rows_behind(lane: Lane[Any], place: Any, counted_max: int) -> tuple[int, int]:
    """Return the rows behind a place, and how many requests were looked at for that."""
    entries: list[Entry[Any]] = lane.entries
    if place > entries[-1]:
        return 0, 0
    at, count = bisect_left(entries, place), len(entries)
    if count - at <= counted_max:
        return sum([entry[REQUEST].rows for entry in entries[at:]]), count - at
    if at <= counted_max:
        return lane.rows - sum([entry[REQUEST].rows for entry in entries[:at]]), at
    return lane.rows * (count - at) // count, 0


def _share_before(lane: Lane[Any], place: Any) -> float:
    """Return which share of a lane goes before a place, if at all, as if dues lay evenly."""
    first, last = lane.entries[0], lane.entries[-1]
    if place > last:
        return 1.0
    if first[LEVEL] != last[LEVEL] or last[DUE] == first[DUE]:
        return 0.0
    share: float = (place[DUE] - first[DUE]) / (last[DUE] - first[DUE])
    return share


def ahead_in_lanes(
    lanes: Mapping[Hashable, Lane[Any]], key: Hashable, rows: int, place: Place, most: int
) -> Ahead:
    """
    Say what goes before a request where the earliest deadline of the highest level does.

    Args:
        lanes: By key; somebody waits in each.
        key: Of the request's own lane, which may not be there yet.
        rows: The request's; what is more than a batch holds runs in batches before its last one.
        place: Where it stands.
        most: Rows that a batch holds.
    """
    own = lanes.get(key)
    if own is None:
        before = (rows - 1) // most
        last = rows - before * most
        if not lanes:
            return before, before * most, last
    else:
        own_rows = own.rows
        ahead = own_rows - rows_behind(own, place)
        before = (ahead + rows - 1) // most
        last = own_rows + rows - before * most
        if len(lanes) == 1:
            return before, before * most, last
        if ahead > before * most:
            # Somebody else is at the head of its batch: as if all before it had as many rows.
            entries: list[Any] = own.entries
            place = entries[bisect_left(entries, place) * before * most // ahead][:START_BY]
    batches, run = _ahead_in_others(lanes.values(), own, place, most)
    return before + batches, before * most + run, last


def _ahead_in_others(
    lanes: Iterable[Lane[Any]], own: Lane[Any] | None, place: Any, most: int
) -> tuple[int, int]:
    """Return the batches that are begun before a place in other lanes than one, and their rows."""
    batches = run = 0
    counted_max = COUNTED_MAX
    for lane in itertools.islice(lanes, LANES_COUNTED_MAX):
        if lane is own or lane.entries[0] > place:
            continue
        rows = lane.rows
        if rows <= most:
            batches += 1
            run += rows
        else:
            if counted_max > 0:
                behind, counted = _rows_behind(lane, place, counted_max)
                counted_max -= 1 + counted
                count = -((behind - rows) // most)
            else:
                count = max(1, int(rows * _share_before(lane, place)) // most)
            batches += count
            run += min(rows, count * most)
    return batches, run


def answered_in_s(
    ahead: Ahead,
    cost: BatchCost,
    most: int,
    usual_rows: int,
    executors: int,
    free_in_s: float,
) -> float:
    """
    Predict in how many seconds a request is answered.

    Args:
        ahead: Of it.
        cost: Of a batch.
        most: Rows that a batch holds.
        usual_rows: Of a batch while others come: its own has as many, if it does not begin at once.
        executors: How many batches run side by side.
        free_in_s: In how many seconds an executor will be free.
    """
    before, run, last = ahead
    if free_in_s or before:
        last = max(last, usual_rows)
    if not before:
        return free_in_s + cost.bound_s(min(most, last))
    wait_s = before * cost.estimate_s(run / before) / executors
    return free_in_s + wait_s + cost.bound_s(min(most, last))
