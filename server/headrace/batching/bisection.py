"""Which parts of a failed batch to try next, until it is known who is to blame.

Decisions only: nothing is run here and no clock is read.
"""

import math
from collections import deque
from collections.abc import Sequence
from typing import Generic, NamedTuple, TypeVar

from headrace.errors import ServingError

ItemT = TypeVar("ItemT")

CULPRITS_SURE = 4
"""So many culprits are always found, whatever the size of the batch."""


def attempts_max(count: int) -> int:
    """
    Return how many parts of a failed batch of `count` requests may be tried.

    One culprit is found within 2 ⌈log₂ count⌉ attempts: on each level both halves are tried. The
    bound is that of `CULPRITS_SURE` of them; in up to 16 requests any number is found.
    """
    return 2 * CULPRITS_SURE * math.ceil(math.log2(max(count, 2)))


class Blame(NamedTuple, Generic[ItemT]):
    """
    Items that failed together, because of something in one of them or in several.

    Args:
        items: Nobody has been told yet. At least one.
        error: Of the attempt with all of them.
    """

    items: Sequence[ItemT]
    error: ServingError


class Bisection(Generic[ItemT]):
    """
    The search for those who make a batch fail.

    Every item leaves once: in a part that `next_part` returned and that did not fail, or among
    those that `failed` or `rest` returned. The largest parts go first: most of those who are not to
    blame are answered soon, and what is left when the attempts are used up is little.

    Args:
        batch: It was tried, and failed. At least one item.
    """

    def __init__(self, batch: Sequence[ItemT]) -> None:
        self.attempts_left = attempts_max(len(batch))
        self._parts: deque[Sequence[ItemT]] = deque()
        self._divide(batch)

    def next_part(self) -> Sequence[ItemT]:
        """Return the part to try next; nothing when the search is over."""
        if not self._parts or not self.attempts_left:
            return ()
        self.attempts_left -= 1
        return self._parts.popleft()

    def failed(self, part: Sequence[ItemT]) -> Sequence[ItemT]:
        """
        Take note that a part failed, whatever of it was tried.

        Returns:
            Those who are to blame: the part's only item, or nothing while it is not known.
        """
        if len(part) == 1:
            return part
        self._divide(part)
        return ()

    def rest(self) -> list[ItemT]:
        """End the search; return whoever is still in question."""
        rest = [item for part in self._parts for item in part]
        self._parts.clear()
        return rest

    def _divide(self, part: Sequence[ItemT]) -> None:
        middle = (len(part) + 1) // 2
        self._parts.extend(half for half in (part[:middle], part[middle:]) if half)
