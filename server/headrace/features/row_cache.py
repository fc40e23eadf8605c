"""Decoded rows of one key group, kept for a while.

What is kept are the columns that decoding made, so that a hit costs a dictionary's look-up and its
share of one copy per kind of value. Ages are judged when a row is served, not when it was read:
a cached row goes out of date like any other.

A row is as old as the beginning of the read that brought it, so that a value written meanwhile is
seen at most `max_age_s` after it was written. No clock in here: the caller brings it.
"""

import math
import threading
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headrace.features.cells import DecodedGroup
from headrace.features.plan import FeatureStatus

FIRST_ROWS = 256

WRITTEN_SLOTS = 4096
"""
Of the times when keys were written, by hash. Two keys of one slot are taken for one another, which
costs a row its place in the cache and nothing else.
"""


class RowCache:
    """
    Safe for several threads at once. When it is full, the row that came first goes first.

    Args:
        max_age_s: How long a row is served after its read began.
        max_rows: How many are kept.
    """

    def __init__(self, max_age_s: float, max_rows: int) -> None:
        self._max_age_s = max_age_s
        self._max_rows = max_rows
        self._lock = threading.Lock()
        self._slots: dict[Hashable, int] = {}
        self._keys: list[Hashable] = []  # of each slot
        self._next = 0  # the slot to be taken over, once all are taken
        self._read_s: NDArray[np.float64] = np.empty(0)
        self._written_s = [-math.inf] * WRITTEN_SLOTS
        self._rows: DecodedGroup | None = None

    def __len__(self) -> int:
        return len(self._slots)

    def get(
        self, keys: Sequence[Hashable], now_s: float
    ) -> tuple[NDArray[np.intp], DecodedGroup | None]:
        """
        Look rows up.

        Returns:
            Which of `keys` are there and young enough, ascending; and their rows, copied (None if
            there are none).
        """
        with self._lock:
            slots = np.array([self._slots.get(key, -1) for key in keys], np.intp)
            is_hit = slots >= 0
            if is_hit.any():
                is_hit[is_hit] = self._read_s[slots[is_hit]] >= now_s - self._max_age_s
            places = np.flatnonzero(is_hit)
            if self._rows is None or not len(places):
                return places, None
            return places, take(self._rows, slots[places])

    def put(self, keys: Sequence[Hashable], rows: DecodedGroup, read_s: float) -> None:
        """
        Keep rows.

        Args:
            keys: Of each row, all different.
            rows: What was read.
            read_s: When reading them began. A row that is there and was read later stays.
        """
        with self._lock:
            slots, chosen = [], []
            # Of more rows than there are slots some take a slot twice: the last one stays.
            for row, key in enumerate(keys):
                if self._written_s[hash(key) % WRITTEN_SLOTS] >= read_s:
                    continue
                slot = self._slots.get(key)
                if slot is None:
                    slot = self._take_slot(key, rows)
                elif self._read_s[slot] > read_s:
                    continue
                slots.append(slot)
                chosen.append(row)
            if not slots:
                return
            assert self._rows is not None
            self._read_s[slots] = read_s
            for (_, kept), (_, new) in zip(self._rows.columns, rows.columns, strict=True):
                kept[slots] = new[chosen]
            assert self._rows.statuses is not None
            statuses = FeatureStatus.PRESENT if rows.statuses is None else rows.statuses[chosen]
            self._rows.statuses[slots] = statuses
            self._rows.event_times_s[slots] = rows.event_times_s[chosen]

    def forget(self, keys: Iterable[Hashable], now_s: float) -> int:
        """
        Serve rows no more, nor keep what was read of them until now; return how many were there.

        A read that is under way may have seen a row before it was written.
        """
        count = 0
        with self._lock:
            for key in keys:
                place = hash(key) % WRITTEN_SLOTS
                # One who tells of another server's writes may have come with a later time.
                self._written_s[place] = max(self._written_s[place], now_s)
                slot = self._slots.get(key)
                if slot is not None and self._read_s[slot] != -np.inf:
                    self._read_s[slot] = -np.inf
                    count += 1
        return count

    def clear(self, now_s: float) -> None:
        """Forget every row, as `forget` does."""
        with self._lock:
            self._written_s = [max(written_s, now_s) for written_s in self._written_s]
            self._read_s[:] = -np.inf

    def _take_slot(self, key: Hashable, like: DecodedGroup) -> int:
        slot = len(self._keys)
        if slot < self._max_rows:
            if slot == len(self._read_s):
                self._grow(min(max(2 * slot, FIRST_ROWS), self._max_rows), like)
            self._keys.append(key)
        else:
            slot = self._next
            self._next = (slot + 1) % self._max_rows
            del self._slots[self._keys[slot]]
            self._keys[slot] = key
        self._slots[key] = slot
        return slot

    def _grow(self, rows: int, like: DecodedGroup) -> None:
        kept, count = self._rows, len(self._read_s)

        def grown(old: NDArray[Any] | None, shape: Any, dtype: Any) -> NDArray[Any]:
            new = np.empty((rows, *shape), dtype)
            if old is not None:
                new[:count] = old
            return new

        self._read_s = grown(self._read_s, (), np.float64)
        self._rows = DecodedGroup(
            columns=[
                (at, grown(None if kept is None else kept.columns[i][1], new.shape[1:], new.dtype))
                for i, (at, new) in enumerate(like.columns)
            ],
            statuses=grown(
                None if kept is None else kept.statuses, (_features(like),), np.dtype(np.uint8)
            ),
            event_times_s=grown(
                None if kept is None else kept.event_times_s,
                like.event_times_s.shape[1:],
                np.dtype(np.float64),
            ),
        )


def take(rows: DecodedGroup, places: NDArray[np.intp]) -> DecodedGroup:
    """Copy some rows."""
    return DecodedGroup(
        columns=[(at, values[places]) for at, values in rows.columns],
        statuses=None if rows.statuses is None else rows.statuses[places],
        event_times_s=rows.event_times_s[places],
    )


def concatenate(first: DecodedGroup, second: DecodedGroup) -> DecodedGroup:
    """Put rows of one key group behind others of it."""
    return DecodedGroup(
        columns=[
            (at, np.concatenate([one, other]))
            for (at, one), (_, other) in zip(first.columns, second.columns, strict=True)
        ],
        statuses=np.concatenate([_statuses(first), _statuses(second)]),
        event_times_s=np.concatenate([first.event_times_s, second.event_times_s]),
    )


def _statuses(rows: DecodedGroup) -> NDArray[np.uint8]:
    if rows.statuses is not None:
        return rows.statuses
    shape = len(rows.event_times_s), _features(rows)
    return np.full(shape, FeatureStatus.PRESENT, np.uint8)


def _features(rows: DecodedGroup) -> int:
    return sum(values.shape[1] for _, values in rows.columns)
