"""The lanes of a queue, by whose head goes first. Pure."""

import heapq
from collections.abc import Hashable, Mapping
from typing import Generic, Protocol

from headrace.batching.lane import NOT_FILED, NUMBER, Lane
from headrace.batching.places import SPARE_PLACES, prune
from headrace.batching.waiting import RequestT

_Place = tuple[int, float, int, Hashable]
"""A head's level, when it is due, its number, and its lane's key."""


class LaneOrder(Protocol[RequestT]):
    """Which lane goes first. One that was taken out has no place until it is filed again."""

    def file(self, lane: Lane[RequestT], /) -> None:
        """Give a lane, in which somebody waits, its place."""

    def pop(self) -> Lane[RequestT] | None:
        """Take out the lane that goes first; None when nobody waits."""

    def __len__(self) -> int:
        """How many places there are, those left behind among them."""


class Heads(Generic[RequestT]):
    """
    A place for each lane's head; those of former heads are passed over.

    Args:
        lanes: The queue's, by key, which it adds to and takes from.
    """

    def __init__(self, lanes: Mapping[Hashable, Lane[RequestT]]) -> None:
        self._lanes = lanes
        self._heap: list[_Place] = []

    def __len__(self) -> int:
        """How many places there are, those of former heads among them."""
        return len(self._heap)

    def file(self, lane: Lane[RequestT]) -> None:
        """Give a lane, in which somebody waits, the place of its head."""
        level, due_s, number, _, _ = lane.entries[0]
        if number == lane.filed:
            return
        lane.filed = number
        heap = self._heap
        heapq.heappush(heap, (level, due_s, number, lane.key))
        if len(heap) > 2 * len(self._lanes) + SPARE_PLACES:
            prune(heap, self._counts)

    def pop(self) -> Lane[RequestT] | None:
        """Take out the lane whose head goes first; None when nobody waits."""
        while self._heap:
            _, _, number, key = heapq.heappop(self._heap)
            lane = self._lanes.get(key)
            if lane is not None:
                head = lane.entries[0][NUMBER]
                if head == number:
                    lane.filed = NOT_FILED
                    return lane
                if head != lane.filed:
                    self.file(lane)
        return None

    def _counts(self, place: _Place) -> bool:
        """Say whether a lane is there still, and was filed at that place last."""
        lane = self._lanes.get(place[-1])
        return lane is not None and lane.filed == place[NUMBER]
