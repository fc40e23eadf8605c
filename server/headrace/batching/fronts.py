"""The lanes of a fair queue, by whose turn it is. Pure."""

import heapq
from collections.abc import Hashable, Mapping
from typing import Generic

from headrace.batching.lane import Lane
from headrace.batching.line_up import LineUp
from headrace.batching.places import SPARE_PLACES, prune
from headrace.batching.waiting import RequestT

_Place = tuple[int, int, int, float, int, Hashable]
"""The fields of a line-up's front, and its lane's key."""


class Fronts(Generic[RequestT]):
    """
    A place for each line-up's front; those of former fronts are passed over.

    Args:
        lanes: The queue's, by key, which it adds to and takes from.
        line_ups: Likewise; each lane has one.
    """

    def __init__(
        self,
        lanes: Mapping[Hashable, Lane[RequestT]],
        line_ups: Mapping[Hashable, LineUp[RequestT]],
    ) -> None:
        self._lanes = lanes
        self._line_ups = line_ups
        self._heap: list[_Place] = []

    def __len__(self) -> int:
        """How many places there are, those of former fronts among them."""
        return len(self._heap)

    def file(self, lane: Lane[RequestT]) -> None:
        """Give a lane the place of its line-up's front, if it has one."""
        line_up = self._line_ups[lane.key]
        front = line_up.front()
        if front is not None and front != line_up.filed:
            line_up.filed = front
            heap = self._heap
            heapq.heappush(heap, (*front, lane.key))
            if len(heap) > 2 * len(self._line_ups) + SPARE_PLACES:
                prune(heap, self._counts)

    def pop(self) -> Lane[RequestT] | None:
        """Take out the lane whose turn it is; None when nobody waits."""
        while self._heap:
            place = heapq.heappop(self._heap)
            if not self._counts(place):  # gone, or filed anew since
                continue
            line_up, lane = self._line_ups[place[-1]], self._lanes[place[-1]]
            is_right = line_up.front() == line_up.filed
            line_up.filed = None
            if is_right:
                return lane
            self.file(lane)
        return None

    def _counts(self, place: _Place) -> bool:
        """Say whether a line-up is there still, and was filed at that place last."""
        line_up = self._line_ups.get(place[-1])
        return line_up is not None and place[:-1] == line_up.filed
