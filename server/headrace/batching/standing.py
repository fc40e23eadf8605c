"""Who waits in a queue since when, and who of them is given up because the queue stands. Pure."""

from collections import OrderedDict
from collections.abc import Iterator
from typing import Generic, TypeVar

from headrace.batching.codel import Codel

T = TypeVar("T")


class Standing(Generic[T]):
    """
    The ages of those who wait. Coming and leaving cost the same however many there are.

    Args:
        codel: Says when the queue stands.
    """

    def __init__(self, codel: Codel) -> None:
        self._codel = codel
        self._came: OrderedDict[int, tuple[float, T]] = OrderedDict()

    def came(self, number: int, one: T, now_s: float) -> None:
        """Note one who waits from now on, under a number of its own."""
        self._came[number] = now_s, one

    def left(self, number: int) -> None:
        """Note that it waits no longer."""
        self._came.pop(number, None)

    def overdue(self, now_s: float, *, stays: bool) -> Iterator[T]:
        """
        Yield those who have waited longer than may be waited, the oldest first.

        Each must have `left` before the next is asked for. Asked each time that some are served.

        Args:
            now_s: Unix seconds.
            stays: Whether more wait than are served now.
        """
        oldest_s = self._oldest_s(now_s)
        limit_s = self._codel.limit_s(now_s, now_s - oldest_s if stays else 0.0)
        while self._came and now_s - self._oldest_s(now_s) > limit_s:
            yield next(iter(self._came.values()))[1]

    def pause(self, now_s: float) -> None:
        """Note that nobody is served for want of anybody who may leave: it does not stand."""
        self._codel.limit_s(now_s, 0.0)

    def _oldest_s(self, now_s: float) -> float:
        for came_s, _ in self._came.values():
            return came_s
        return now_s
