"""Whether to try a server that keeps failing. The caller brings the clock and the outcomes.

Closed, everything is tried. After `FAILURES` failures in a row, or `FAILING_S` of nothing but
failures, it opens: callers are refused at once, where each would have waited for its timeout. One
at a time is then let through as a probe, and its success closes the breaker.

Source: M. Nygard, Release It!, "Circuit Breaker".
"""

import math
import threading

FAILURES = 5
FAILING_S = 1.0
"""Timeouts come one per timeout: waiting for five of them would take seconds."""
PROBE_PERIOD_S = 0.25
PROBE_LIMIT_S = 10.0
"""A probe of which nothing was heard for so long no longer keeps others from probing."""
PATIENCE_S = 0.05
"""
Whoever was given less than this and got no answer has learned nothing of the server: the time was
his callers', and one of them in a hurry must not keep the store from the others.
"""


def patience_of(timeout_s: float) -> float:
    """
    Return how long an attempt must have had for its timeout to be a failure.

    Args:
        timeout_s: What attempts have when no caller is in a hurry; where that is little, it counts.
    """
    return min(PATIENCE_S, timeout_s / 2)


class Attempt:
    """Leave to try once. A probe's is its own."""

    __slots__ = ()


_FREE = Attempt()


class Breaker:
    """Safe for several threads at once. Times are on one clock, in seconds."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._failures = 0
        self._first_failure_s = math.inf
        self._is_open = False
        self._next_probe_s = 0.0
        self._probe: Attempt | None = None

    @property
    def is_open(self) -> bool:
        return self._is_open

    @property
    def is_failing(self) -> bool:
        """Whether what was heard last was a failure; true of every open one."""
        return self._failures > 0

    def admits(self, now_s: float) -> Attempt | None:
        """
        Return leave to try now, or None.

        Whoever has it must report `succeeded`, `failed` or `left_open`.
        """
        if not self._is_open:
            return _FREE
        with self._lock:
            if now_s < self._next_probe_s:
                return None
            self._next_probe_s = now_s + PROBE_LIMIT_S
            self._probe = Attempt()
            return self._probe

    def succeeded(self) -> None:
        if self._failures:
            with self._lock:
                self._failures = 0
                self._is_open = False
                self._probe = None

    def failed(self, now_s: float, attempt: Attempt | None = None) -> None:
        """
        Be told of a failure.

        Args:
            now_s: When.
            attempt: Which; None of one that was made without asking. Once the breaker is open
                only the probe that is out counts: others were begun before.
        """
        with self._lock:
            if self._is_open:
                self._end_probe(now_s, attempt)
                return
            if not self._failures:
                self._first_failure_s = now_s
            self._failures += 1
            is_long = self._failures > 1 and now_s - self._first_failure_s >= FAILING_S
            if self._failures >= FAILURES or is_long:
                self._is_open = True
                self._next_probe_s = now_s + PROBE_PERIOD_S

    def left_open(self, now_s: float, attempt: Attempt | None) -> None:
        """Be told that an attempt has ended and says nothing of the server."""
        with self._lock:
            self._end_probe(now_s, attempt)

    def _end_probe(self, now_s: float, attempt: Attempt | None) -> None:
        if attempt is not None and attempt is self._probe:
            self._probe = None
            self._next_probe_s = now_s + PROBE_PERIOD_S
