"""What became of each request: when it was due, sent and answered, and how it ended.

Requests are numbered in the order in which they are due. Times are of `time.perf_counter`.
"""

import math
from array import array

UNANSWERED = 255
"""In place of a gRPC status: nothing came."""

OK = 0


class Record:
    """
    A few bytes for each request.

    Attributes:
        due_s: When it was to be sent.
        sent_s: When it was; not a number if it never was.
        done_s: When its answer was complete; not a number if it never was.
        statuses: gRPC's code of each, or `UNANSWERED`.
        held: 1 for those that the server's limits kept from being sent when their turn came.
    """

    def __init__(self) -> None:
        self.due_s, self.sent_s, self.done_s = array("d"), array("d"), array("d")
        self.statuses, self.held = bytearray(), bytearray()

    def add(self, due_s: float) -> int:
        """Add a request, due no earlier than the others; return its number."""
        number = len(self.due_s)
        self.due_s.append(due_s)
        self.sent_s.append(math.nan)
        self.done_s.append(math.nan)
        self.statuses.append(UNANSWERED)
        self.held.append(0)
        return number
