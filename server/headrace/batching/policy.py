"""Which waiting requests make a batch, and how long it may wait for more.

Decisions only: no clock, no queue, no lock. `batcher` asks, this module answers.

Source: Triton, "Dynamic Batcher" (`max_batch_size`, `preferred_batch_size`,
`max_queue_delay_microseconds`; here in seconds). Unlike there a preferred size only ends a wait for
company: it makes no full batch smaller, and has no effect without a delay, since batches would be
small just when much waits. With the default delay of 0 the policy is work-conserving: an executor
that is free takes what waits, which beat every fixed delay in simulation on one executor.
"""

import math
from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

UNLIMITED = 1 << 62


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


class LevelPolicy(NamedTuple):
    """
    How requests of one priority level wait.

    Args:
        max_queue_size: Most of them waiting at once; 0 for the queue's own limit alone.
        timeout_s: Longest that one waits for its batch, in seconds.
        is_delayed: Whether one that has waited so long goes after all others of its level, instead
            of being given up.
        may_override: Whether a request may ask for a shorter time.

    Source: Triton, `ModelQueuePolicy`.
    """

    max_queue_size: int = 0
    timeout_s: float = math.inf
    is_delayed: bool = False
    may_override: bool = False


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
            leaves early only at one of these (or full); without preferences, only when full. What
            is full or has waited out the delay is never made smaller for their sake.
        allowed_batch_sizes: Row counts that are run, ascending, to which others are filled up;
            empty for all. What fills one of them exactly leaves without the rest when filling up
            would take more rows than the rest has.

    Source of the last one: TensorFlow Serving, `allowed_batch_sizes`.
    """

    max_batch_size: int
    max_queue_delay_s: float = 0.0
    preferred_batch_sizes: tuple[int, ...] = ()
    allowed_batch_sizes: tuple[int, ...] = ()

    @property
    def takes_everything(self) -> bool:
        """Whether what waits and fits into one batch leaves at once, without asking `decide`."""
        return not self.max_queue_delay_s and not self.allowed_batch_sizes

    @property
    def most_requests(self) -> int:
        """How many requests at the head of a queue `decide` may have to look at."""
        return self.max_batch_size + 1

    def decide(
        self, rows: Iterable[int], oldest_wait_s: float, most_rows: int = UNLIMITED
    ) -> Dispatch:
        """
        Decide about the requests at the head of one queue.

        Args:
            rows: Rows of each waiting request, oldest first, each in [1, max_batch_size]; read
                only as far as one batch can reach. At least one request.
            oldest_wait_s: How long the oldest has waited.
            most_rows: What the batch may hold besides, for the sake of somebody's deadline.

        Returns:
            How many to take now, at least one; or how long to wait.
        """
        if not self.max_batch_size:
            return Dispatch(1)
        preferred_sizes = self.preferred_batch_sizes
        most = min(self.max_batch_size, most_rows)
        allowed_sizes = self.allowed_batch_sizes
        total = fitting = preferred = exact = exact_rows = 0
        is_full = False
        for request_rows in rows:
            if fitting and total + request_rows > most:
                is_full = True
                break
            total += request_rows
            fitting += 1
            if preferred_sizes and total in preferred_sizes:
                preferred = fitting
            if allowed_sizes and total in allowed_sizes:
                exact, exact_rows = fitting, total
            if total >= most:
                is_full = True
                break
        remaining_s = self.max_queue_delay_s - oldest_wait_s
        if is_full or remaining_s <= 0:
            if exact and self._padding(total) > total - exact_rows:
                return Dispatch(exact)
            return Dispatch(fitting)
        if preferred:
            return Dispatch(preferred)
        return Dispatch(0, remaining_s)

    def _padding(self, rows: int) -> int:
        """Return by how many rows a batch is filled up."""
        return self.allowed_batch_sizes[bisect_left(self.allowed_batch_sizes, rows)] - rows
