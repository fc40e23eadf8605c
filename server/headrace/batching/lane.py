"""Requests that may share a batch, what is noted of each that waits, and what leaves a queue."""

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Final, Generic, NamedTuple

from headrace.batching.waiting import RequestT

PATIENCE_S: Final = 1.0
"""
A request without a deadline, or with a later one, has its turn as if it were due after so long:
whoever asks with a short deadline goes first, and nobody waits for ever.
"""

NOT_FILED: Final = -1

Entry = tuple[int, float, int, float, RequestT]
"""
A request in line: its level, when it is due, its number, until when it waits for a batch under its
level's policy, itself. A plain tuple: one is made for each request. They sort by the first three,
and no two numbers are equal. Times are Unix seconds.
"""

LEVEL: Final = 0
DUE: Final = 1
NUMBER: Final = 2
START_BY: Final = 3
REQUEST: Final = 4


@dataclass(slots=True)
class Lane(Generic[RequestT]):
    """Requests that may share a batch, in the order in which they go."""

    key: Hashable
    entries: list[Entry[RequestT]] = field(default_factory=list)
    rows: int = 0
    filed: int = NOT_FILED
    """Number of the head that was filed last, while it has its place among the heads."""


class Taken(NamedTuple, Generic[RequestT]):
    """
    What an executor gets.

    Args:
        batch: Requests of one lane; none when nothing may leave yet.
        dropped: Those that were passed over, and have left the queue.
        wait_s: How long to wait for more when `batch` is empty; None for as long as it takes.
    """

    batch: list[RequestT]
    dropped: list[RequestT]
    wait_s: float | None
