"""Whom to forget when more callers come than are remembered: the idlest. Pure."""

import heapq
from collections.abc import Hashable, Mapping
from typing import TypeVar

KeyT = TypeVar("KeyT", bound=Hashable)

CALLERS_MAX = 4_096
"""Remembered at once, by each quota and each queue: some 200 bytes for each."""

_PART = 8


def idlest(free_at: Mapping[KeyT, float], now: float, most: int) -> list[KeyT]:
    """
    Choose whom to forget.

    Those whose past weighs on them no longer are forgotten all, which changes nothing for them. If
    more than seven eighths of `most` are left then, so are the ones who would be free of it
    soonest: there is always room for as many newcomers, so that one's part of this is a few steps,
    however many come.

    Args:
        free_at: When each one's past will weigh on him no longer, in any unit.
        now: In the same unit.
        most: How many may be remembered; at least 1.
    """
    gone = [key for key, at in free_at.items() if at <= now]
    excess = len(free_at) - len(gone) - (most - most // _PART)
    if excess > 0:
        left = ((at, order, key) for order, (key, at) in enumerate(free_at.items()) if at > now)
        gone += [key for _, _, key in heapq.nsmallest(excess, left)]
    return gone
