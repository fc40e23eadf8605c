"""Who waits at which priority level, and who of a lower one makes room for a higher. Pure.

A limit that all levels share is everybody's only as long as nobody of a higher level wants in: to
him those of lower levels are room. Who came last of the lowest level goes first, as if he had been
refused when he came; who was put behind the others because his time was over (DELAY) counts as
the last. Each level's own newest is found in one step, however many wait.
"""

from collections.abc import Iterable
from typing import Generic

from headrace.batching.callers import Caller
from headrace.batching.lane import Entry
from headrace.batching.waiting import RequestT


class _Group(Generic[RequestT]):
    """Some who wait, by number, in the order in which they came."""

    __slots__ = ("byte_count", "waiting")

    def __init__(self) -> None:
        self.byte_count = 0
        self.waiting: dict[int, RequestT] = {}

    def newest(self) -> RequestT:
        """Return who came last of them; there are some."""
        # Popping forgets the places of those who have left; `reversed` would walk them each time.
        number, request = self.waiting.popitem()
        self.waiting[number] = request
        return request


class LevelRoom(Generic[RequestT]):
    """
    What waits at each level, for a queue of several.

    Args:
        levels: How many there are.
        most: Requests that may wait in all.
        most_bytes: Bytes of them, likewise.
        by_caller: Whether callers' own are asked for.
    """

    def __init__(self, levels: int, most: int, most_bytes: int, *, by_caller: bool) -> None:
        self._most = most
        self._most_bytes = most_bytes
        self._by_caller = by_caller
        # From 1 on; the first is of those who give way to nobody.
        self._levels: list[_Group[RequestT]] = [_Group() for _ in range(levels + 1)]
        self._own: dict[tuple[int, Caller], _Group[RequestT]] = {}

    def came(self, level: int, number: int, request: RequestT) -> None:
        """Note one who waits from now on, under a number of its own, as the last of its level."""
        group = self._levels[level]
        group.waiting[number] = request
        group.byte_count += request.byte_count
        if self._by_caller:
            key = level, request.caller
            own = self._own.get(key)
            if own is None:
                own = self._own[key] = _Group()
            own.waiting[number] = request
            own.byte_count += request.byte_count

    def left(self, entries: Iterable[Entry[RequestT]]) -> None:
        """Note that some wait no longer."""
        kept = self._levels[0]
        for level, _, number, _, request in entries:
            if not self._goes(level, number, request):
                del kept.waiting[number]
                kept.byte_count -= request.byte_count

    def keep(self, entries: Iterable[Entry[RequestT]]) -> None:
        """Note that some give way to nobody any more: parts of a request of which one is run."""
        kept = self._levels[0]
        for level, _, number, _, request in entries:
            if self._goes(level, number, request):
                kept.waiting[number] = request
                kept.byte_count += request.byte_count

    def is_kept(self, number: int) -> bool:
        """Say whether one who waits gives way to nobody."""
        return number in self._levels[0].waiting

    def _goes(self, level: int, number: int, request: RequestT) -> bool:
        """Count one out of its level; say whether it was there."""
        group = self._levels[level]
        if number not in group.waiting:
            return False
        del group.waiting[number]
        group.byte_count -= request.byte_count
        if self._by_caller:
            own = self._own[level, request.caller]
            del own.waiting[number]
            own.byte_count -= request.byte_count
            if not own.waiting:
                del self._own[level, request.caller]
        return True

    def fits(self, level: int, byte_count: int, places: int = 1) -> bool:
        """Say whether so much more of a level has room, if lower ones need none."""
        free, free_bytes = self.free(level)
        return places <= free and byte_count <= free_bytes

    def free(self, level: int) -> tuple[int, int]:
        """Return how many requests, and bytes, are free but for those of lower levels."""
        free, free_bytes = self._most, self._most_bytes
        for group in self._levels[: level + 1]:
            free -= len(group.waiting)
            free_bytes -= group.byte_count
        return free, free_bytes

    def own_below(self, level: int, caller: Caller) -> tuple[int, int]:
        """Return how many requests, and bytes, a caller has waiting at lower levels."""
        count = byte_count = 0
        for lower in range(level + 1, len(self._levels)):
            own = self._own.get((lower, caller))
            if own is not None:
                count += len(own.waiting)
                byte_count += own.byte_count
        return count, byte_count

    def newest_below(self, level: int) -> RequestT | None:
        """Return who came last of the lowest level below one; None when nobody waits there."""
        for group in reversed(self._levels[level + 1 :]):
            if group.waiting:
                return group.newest()
        return None

    def own_newest_below(self, level: int, caller: Caller) -> RequestT | None:
        """Return a caller's own, likewise."""
        for lower in range(len(self._levels) - 1, level, -1):
            own = self._own.get((lower, caller))
            if own is not None:
                return own.newest()
        return None

    @property
    def is_empty(self) -> bool:
        """Whether nobody is noted, and nothing counted."""
        return not self._own and not any(g.waiting or g.byte_count for g in self._levels)
