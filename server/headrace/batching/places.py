"""Heaps in which whoever leaves leaves his place behind: it is passed over when it is popped. Pure.

Where others always go first such a place is never popped, so that there would be more of them with
every batch. Who pushes has them taken out when they are more than those that count, which costs
each push the same on average, however many there are.
"""

import heapq
from collections.abc import Callable
from typing import Any, Final, TypeVar

SPARE_PLACES: Final = 32
"""So many places left behind are put up with, whatever else there is."""

PlaceT = TypeVar("PlaceT", bound=tuple[Any, ...])


def prune(heap: list[PlaceT], counts: Callable[[PlaceT], bool]) -> None:
    """
    Take out the places that do not count any more, and all but one of those that are the same.

    Args:
        heap: Of places whose last field says whose they are.
        counts: Says whether one is not to be passed over.
    """
    heap[:] = {place[-1]: place for place in heap if counts(place)}.values()
    heapq.heapify(heap)
