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


class Breaker:
    """Safe for several threads at once. Times are on one clock, in seconds."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._failures = 0
        self._first_failure_s = math.inf
        self._is_open = False
        self._next_probe_s = 0.0

    @property
    def is_open(self) -> bool:
        return self._is_open

    def admits(self, now_s: float) -> bool:
        """Return whether to try now. Whoever is told to must report `succeeded` or `failed`."""
        if not self._is_open:
            return True
        with self._lock:
            if now_s < self._next_probe_s:
                return False
            self._next_probe_s = now_s + PROBE_LIMIT_S
            return True

    def succeeded(self) -> None:
        if self._failures:
            with self._lock:
                self._failures = 0
                self._is_open = False

    def failed(self, now_s: float) -> None:
        with self._lock:
            if not self._failures:
                self._first_failure_s = now_s
            self._failures += 1
            is_long = self._failures > 1 and now_s - self._first_failure_s >= FAILING_S
            if self._failures >= FAILURES or is_long:
                self._is_open = True
                self._next_probe_s = now_s + PROBE_PERIOD_S
