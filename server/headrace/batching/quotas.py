"""How many rows each caller may ask for: a token bucket each. Pure: times come in.

A bucket holds `burst` rows and fills at the rate. A request is let in while at least one row is
there, whatever it asks for, and takes all it asks for: the bucket may be overdrawn, and its caller
waits for as long as that takes to fill. So nobody need know how large a request is before it is
let in, no request is too large for its bucket, and in the long run the rate holds exactly.

Source: the token bucket in its "virtual scheduling" form (ITU-T I.371, Annex A, GCRA): one number
for each caller, the time when his bucket will be full, which moves only when he asks.
"""

from headrace.batching.callers import Caller
from headrace.batching.eviction import CALLERS_MAX, idlest

ROUNDING_S = 1e-6
"""What sums of times may be off by: nobody is refused for less."""


class Quotas:
    """
    The buckets of all callers; not safe for several threads at once.

    In any t seconds a caller is let in with at most `burst + rate_per_s * t` rows, one request, and
    as many rows as are refunded meanwhile. A caller who is not remembered has a full bucket.

    Args:
        rate_per_s: Rows per second; above 0.
        burst: Rows in a full bucket; at least 1.
        most: Callers remembered; the idlest make room.
    """

    def __init__(self, rate_per_s: float, burst: float, most: int = CALLERS_MAX) -> None:
        self.rate_per_s = rate_per_s
        self._row_s = 1.0 / rate_per_s
        # So far may a bucket be from full, in seconds, and still have a row.
        self._slack_s = (burst - 1.0) / rate_per_s
        self._most = most
        self._full_at_s: dict[Caller, float] = {}

    def wait_s(self, caller: Caller, now_s: float) -> float:
        """Return in how many seconds the caller's next request would be let in; 0 for now."""
        wait_s = self._full_at_s.get(caller, now_s) - now_s - self._slack_s
        return wait_s if wait_s > ROUNDING_S else 0.0

    def charge(self, caller: Caller, rows: int, now_s: float) -> None:
        """Take rows out of a caller's bucket, whatever is in it."""
        full_at_s = self._full_at_s
        full_at_s[caller] = max(full_at_s.get(caller, now_s), now_s) + rows * self._row_s
        if len(full_at_s) > self._most:
            for idle in idlest(full_at_s, now_s, self._most):
                del full_at_s[idle]

    def refund(self, caller: Caller, rows: int) -> None:
        """
        Put back what a request took that was not served; a full bucket takes no more.

        One that has filled up since, and was asked again, gets it back all the same: a single
        number does not tell how much of it has been filled already.
        """
        if caller in self._full_at_s:
            self._full_at_s[caller] -= rows * self._row_s

    def __len__(self) -> int:
        """Callers remembered."""
        return len(self._full_at_s)
