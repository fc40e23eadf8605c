"""Which waiting requests make a batch, and how long it may wait for more.

Decisions only: no clock, no queue, no lock. `batcher` asks, this module answers.

Source: Triton, "Dynamic Batcher" (`max_batch_size`, `preferred_batch_size`,
`max_queue_delay_microseconds`; here in seconds). With the default delay of 0 the policy is
work-conserving: an executor that is free takes what waits, which beat every fixed delay in
simulation on one executor.
"""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Dispatch:
    """
    What to do with the requests at the head of a queue.

    Args:
        count: Requests to take now; 0 to wait.
        wait_s: How long to wait for more when `count` is 0, on the caller's clock.
    """

    count: int
    wait_s: float = 0.0


@dataclass(frozen=True, slots=True)
class BatchPolicy:
    """
    How much company a request accepts, and how long it waits for it.

    Args:
        max_batch_size: Most rows in one batch; 0 for a model without a batch dimension, whose
            requests run one by one.
        max_queue_delay_s: Longest that the oldest request waits for a better batch, in seconds.
            0 never waits.
        preferred_batch_sizes: Row counts worth waiting for, ascending. With a delay, a batch
            leaves early only at one of these (or full); without preferences, only when full.
    """

    max_batch_size: int
    max_queue_delay_s: float = 0.0
    preferred_batch_sizes: tuple[int, ...] = ()

    def decide(self, rows: Iterable[int], oldest_wait_s: float) -> Dispatch:
        """
        Decide about the requests at the head of one queue.

        Args:
            rows: Rows of each waiting request, oldest first, each in [1, max_batch_size]; read
                only as far as one batch can reach. At least one request.
            oldest_wait_s: How long the oldest has waited.

        Returns:
            How many to take now, at least one; or how long to wait.
        """
        if not self.max_batch_size:
            return Dispatch(1)
        preferred_sizes = self.preferred_batch_sizes
        total = fitting = preferred = 0
        is_full = False
        for request_rows in rows:
            if total + request_rows > self.max_batch_size:
                is_full = True
                break
            total += request_rows
            fitting += 1
            if preferred_sizes and total in preferred_sizes:
                preferred = fitting
            if total == self.max_batch_size:
                is_full = True
                break
        if preferred:
            return Dispatch(preferred)
        remaining_s = self.max_queue_delay_s - oldest_wait_s
        if is_full or remaining_s <= 0:
            return Dispatch(fitting)
        return Dispatch(0, remaining_s)
