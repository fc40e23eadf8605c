"""Until when each of those who wait may wait, and whose time is over. Pure."""

import heapq
from collections.abc import Iterable
from typing import Generic, TypeVar

from headrace.batching.places import SPARE_PLACES, prune

T = TypeVar("T")


class Limits(Generic[T]):
    """
    The times of those who do not wait for ever.

    Coming takes steps by the logarithm of how many there are; so does finding one whose time is
    over, and finding that nobody's is takes one.
    """

    def __init__(self) -> None:
        self._waiting: dict[int, T] = {}
        self._heap: list[tuple[float, int]] = []

    def came(self, number: int, limit_s: float, one: T) -> None:
        """
        Note one who waits from now on.

        Args:
            number: Its own; one that was noted before has the same time again.
            limit_s: Until when, Unix seconds.
            one: Who.
        """
        self._waiting[number] = one
        heap = self._heap
        heapq.heappush(heap, (limit_s, number))
        if len(heap) > 2 * len(self._waiting) + SPARE_PLACES:
            prune(heap, lambda place: place[-1] in self._waiting)

    def left(self, numbers: Iterable[int]) -> None:
        """Note that some wait no longer, those of them that were noted."""
        for number in numbers:
            self._waiting.pop(number, None)

    def over(self, now_s: float) -> list[T]:
        """Return those whose time is over, the longest first; they are noted no more."""
        heap, over = self._heap, []
        while heap and heap[0][0] < now_s:
            number = heapq.heappop(heap)[1]
            if number in self._waiting:
                over.append(self._waiting.pop(number))
        return over

    def __bool__(self) -> bool:
        """Whether anybody is noted."""
        return bool(self._waiting)
