"""Requests that may share a batch, in a line for each of their callers, who take turns. Pure.

`draw` hands them out in turn, on trial: `undraw` lets go of one at once, `settle` says which of the
others went, and whose turn it is next is as if the rest had never been drawn.
"""

import heapq
import itertools
import math
from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from typing import Any, Generic, TypeAlias

from headrace.batching.ahead import Place
from headrace.batching.callers import Caller
from headrace.batching.lane import DUE, LEVEL, NUMBER, REQUEST, Entry
from headrace.batching.places import SPARE_PLACES, prune
from headrace.batching.shares import Share, Shares
from headrace.batching.waiting import RequestT

Turn: TypeAlias = tuple[int, int, int]
"""When a line is served: its rank, then the round and the place of its caller's share."""

Front: TypeAlias = tuple[int, int, int, float, int]
"""Whose turn it is in a line-up: the turn of a line, when its head is due, and its number."""

NEVER: Turn = (1 << 62, 0, 0)


def rank_of(entry: Entry[Any]) -> int:
    """Return which entries go first whoever's they are: by level, in a level the delayed last."""
    return 2 * entry[LEVEL] + (entry[DUE] == math.inf)


class _Line(Generic[RequestT]):
    """What one caller has waiting at one rank, the earliest deadline first."""

    __slots__ = ("drawn", "entries", "filed", "rank", "share", "shares")

    def __init__(self, rank: int, shares: Shares, share: Share) -> None:
        self.rank = rank
        self.shares = shares
        self.share = share
        self.entries: list[Entry[RequestT]] = []
        self.drawn = 0
        """How many of its entries are drawn, on trial."""
        self.filed = NEVER
        """The turn under which it is in the heap; never later than its own."""

    @property
    def turn(self) -> Turn:
        return self.rank, self.share.round, self.share.place


class LineUp(Generic[RequestT]):
    """The lines of one lane. Adding, removing and drawing take steps by the logarithm of lines."""

    def __init__(self) -> None:
        self.filed: Front | None = None
        """Its owner's."""
        self._lines: dict[tuple[int, Caller], _Line[RequestT]] = {}
        # By turn. A line whose share has been charged since is put right when it comes to the top.
        self._heap: list[tuple[int, int, int, int, _Line[RequestT]]] = []
        self._drawn: list[tuple[_Line[RequestT], tuple[int, int, int, int]]] = []

    def add(self, entry: Entry[RequestT], shares: Shares, share: Share) -> bool:
        """
        Put a request in its caller's line; its share counts it already.

        Returns:
            Whether it is the line's head, so that the front may be another one now.
        """
        rank = rank_of(entry)
        key = rank, share.caller
        line = self._lines.get(key)
        if line is None:
            line = self._lines[key] = _Line(rank, shares, share)
        entries = line.entries
        if not entries or entry > entries[-1]:
            entries.append(entry)
        else:
            insort(entries, entry)
        if line.turn < line.filed:
            self._push(line)
        return entries[0] is entry

    def remove(self, entry: Entry[RequestT]) -> bool:
        """Take a request out; say whether it was there."""
        key = rank_of(entry), entry[REQUEST].caller
        line = self._lines.get(key)
        if line is None:
            return False
        at = bisect_left(line.entries, entry)
        if at == len(line.entries) or line.entries[at] is not entry:
            return False
        del line.entries[at]
        if not line.entries:
            del self._lines[key]
        return True

    def behind(self, key: tuple[int, Caller], place: Place) -> int:
        """Return how many of those of a rank and a caller go after one at a place."""
        line = self._lines.get(key)
        if line is None:
            return 0
        entries: list[Any] = line.entries
        return len(entries) - bisect_left(entries, place)

    def front(self) -> Front | None:
        """Say whose turn it is; None when nobody is left."""
        line = self._first()
        if line is None:
            return None
        head = line.entries[0]
        return *line.turn, head[DUE], head[NUMBER]

    def draw(self) -> Entry[RequestT] | None:
        """Hand out whose turn it is and charge his caller, on trial; None when nobody is left."""
        line = self._first()
        if line is None:
            return None
        heapq.heappop(self._heap)
        line.filed = NEVER
        entry = line.entries.pop(0)
        self._drawn.append((line, line.shares.state(line.share)))
        line.drawn += 1
        line.shares.spend(line.share, entry[REQUEST].rows)
        if line.entries:
            self._push(line)
        return entry

    def undraw(self) -> None:
        """Charge nothing for the last one drawn: it leaves, and it is again its caller's turn."""
        line, state = self._drawn.pop()
        line.drawn -= 1
        line.shares.restore(line.share, state)
        if line.entries:
            if line.turn < line.filed:
                self._push(line)
        elif not line.drawn:
            del self._lines[line.rank, line.share.caller]

    def settle(self, taken: Sequence[Entry[RequestT]], back: Sequence[Entry[RequestT]]) -> None:
        """
        End the trial: charge for what was taken, and for nothing else.

        Args:
            taken: Of those drawn since the last time.
            back: Others of them, which wait on. The rest has left the queue.
        """
        drawn, self._drawn = self._drawn, []
        if len(taken) != len(drawn):
            for line, state in reversed(drawn):
                line.shares.restore(line.share, state)
            for entry in taken:
                line = self._line_of(entry)
                line.shares.spend(line.share, entry[REQUEST].rows)
            for entry in back:
                insort(self._line_of(entry).entries, entry)
            for line in {id(line): line for line, _ in drawn}.values():
                if line.entries and line.turn < line.filed:
                    self._push(line)
        for line, _ in drawn:
            line.drawn = 0
            if not line.entries:
                self._lines.pop((line.rank, line.share.caller), None)

    def __iter__(self) -> Iterator[Entry[RequestT]]:
        """Yield all who wait."""
        return itertools.chain.from_iterable([line.entries for line in self._lines.values()])

    def __bool__(self) -> bool:
        """Whether anybody waits."""
        return bool(self._lines)

    def _line_of(self, entry: Entry[RequestT]) -> _Line[RequestT]:
        return self._lines[rank_of(entry), entry[REQUEST].caller]

    def _push(self, line: _Line[RequestT]) -> None:
        line.filed = turn = line.turn
        heap = self._heap
        heapq.heappush(heap, (*turn, line.entries[0][NUMBER], line))
        if len(heap) > 2 * len(self._lines) + SPARE_PLACES:
            prune(heap, _counts)

    def _first(self) -> _Line[RequestT] | None:
        """Return the line whose turn it is; it is at the top of the heap."""
        heap = self._heap
        while heap:
            line, own = heap[0][-1], heap[0][-1].turn
            if not _counts(heap[0]):
                heapq.heappop(heap)
            elif own != line.filed:  # charged since
                line.filed = own
                heapq.heapreplace(heap, (*own, line.entries[0][NUMBER], line))
            else:
                return line
        return None


def _counts(place: tuple[int, int, int, int, _Line[Any]]) -> bool:
    """Say whether a line is not gone, and was not filed anew since."""
    line = place[-1]
    return bool(line.entries) and place[:3] == line.filed
