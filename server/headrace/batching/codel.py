"""When a queue stands, and how long may be waited in it then: controlled delay. Pure.

A queue that is emptied now and then takes up bursts, whatever the longest wait in it. One that
*stands* only makes everybody wait: for a whole interval nobody who was oldest had waited less than
the target. From then on whoever has waited longer is given up, until the oldest has not, or nothing
stays behind.

Source: Nichols and Jacobson, "Controlling queue delay", ACM Queue 2012, and RFC 8289, section 3,
for when a queue stands. What is done about it is Facebook's ("Fail at scale", ACM Queue 2015):
CoDel's own schedule drops one at a time, a little sooner each time, for senders who slow down when
they lose a packet. Callers do not (decision 0020).
"""

import math

DEFAULT_INTERVAL_S = 0.1
"""Source: RFC 8289, section 4.2."""


class Codel:
    """
    Watches one queue; not safe for several threads at once.

    Args:
        target_s: The wait that is put up with; more than a batch takes.
        interval_s: How long more than that is put up with.
    """

    def __init__(self, target_s: float, interval_s: float = DEFAULT_INTERVAL_S) -> None:
        self._target_s = target_s
        self._interval_s = interval_s
        self._above_since_s: float | None = None

    def limit_s(self, now_s: float, oldest_wait_s: float) -> float:
        """
        Return how long may have been waited by those who still wait; infinite for any time.

        Args:
            now_s: On any clock, the same each time.
            oldest_wait_s: How long the oldest of those who wait has waited; 0 when no more wait
                than are served now. To be told each time that some are served.
        """
        since_s = self._above_since_s
        if oldest_wait_s < self._target_s:
            self._above_since_s = None
        elif since_s is None or now_s < since_s:  # a clock that was set back begins anew
            self._above_since_s = now_s
        elif now_s - since_s >= self._interval_s:
            return self._target_s
        return math.inf
