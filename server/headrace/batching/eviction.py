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
    more than `most` are left then, the ones who would be free of it soonest are forgotten too, an
    eighth of `most` more than need be: so rarely is this asked that a newcomer's part of it is a
    few steps, however many come.

    Args:
        free_at: When each one's past will weigh on him no longer, in any unit.
        now: In the same unit.
        most: How many may be left; at least 1.
    """
    gone = [key for key, at in free_at.items() if at <= now]
    excess = len(free_at) - len(gone) - most
    if excess > 0:
        left = ((at, order, key) for order, (key, at) in enumerate(free_at.items()) if at > now)
        gone += [key for _, _, key in heapq.nsmallest(excess + most // _PART, left)]
    return gone
