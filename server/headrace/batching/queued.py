"""What every request that waits for a batch has, whatever it asks for."""

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from typing import Any, Protocol

from headrace.batching.callers import NOBODY, Caller
from headrace.batching.leaving import ran_out
from headrace.errors import CallerLeft, DeadlineExceeded, Overloaded, ServingError


class WaitingPlace(Protocol):
    """Where a request waits."""

    def leave(self, request: Any, /) -> bool:
        """Let go of it; say whether it still waited, so that whoever calls answers it."""


class Account(Protocol):
    """What was charged with a request's rows."""

    def refund(self, caller: Caller, rows: int) -> None:
        """Take rows back that were not served."""


class QueuedRequest(ABC):
    """
    One caller's rows on their way through a `Batcher`.

    The first of its answer, `fail` and `drop` replies; a later one does nothing. They are called by
    whichever thread owns the request, and do not raise because a caller has left.

    Args:
        rows: How many; at least 1.
        batch_key: Requests share a batch only when their keys are equal.
        deadline_s: Unix seconds; infinite when the caller gave none.
        arrival_s: When it reached the port, on `time.perf_counter`'s clock.
        byte_count: Size of its message.
    """

    __slots__ = (
        "arrival_s",
        "batch_key",
        "byte_count",
        "caller",
        "deadline_s",
        "is_displaced",
        "is_shed",
        "paid_from",
        "place",
        "priority",
        "retry_after_s",
        "rows",
        "timeout_s",
        "waits_in",
    )

    def __init__(
        self,
        rows: int,
        batch_key: Hashable,
        *,
        deadline_s: float,
        arrival_s: float,
        byte_count: int,
    ) -> None:
        self.rows = rows
        self.batch_key = batch_key
        self.deadline_s = deadline_s
        self.arrival_s = arrival_s
        self.byte_count = byte_count
        self.priority = 0
        """1 is served first; 0 when the caller names none."""
        self.timeout_s = 0.0
        """Longest wait for a batch that the caller asks for; 0 when he does not."""
        self.caller: Caller = NOBODY
        """Who asks."""
        self.paid_from: Account | None = None
        """Whose rows it has taken that it gives back if it is not served."""
        self.is_shed = False
        """Whether it is dropped because the queue stands."""
        self.is_displaced = False
        """Whether it is dropped to make room for one of a higher level."""
        self.retry_after_s: float | None = None
        """When it may come again if it is dropped for what waits."""
        self.place: Any = None
        """The queue's own."""
        self.waits_in: WaitingPlace | None = None
        """The batcher, or whatever else took it, which sets this."""

    @property
    def parts(self) -> Sequence[Any]:
        """Of a part of a request, all of them; the queue lets go of them together."""
        return ()

    @abstractmethod
    def expired(self, now_s: float) -> bool:
        """Say whether the caller has left or the deadline has passed (Unix seconds)."""

    @abstractmethod
    def fail(self, error: ServingError) -> None:
        """Reply with an error."""

    def drop(self) -> None:
        """Give up on a request that waits: whoever still listens learns that its time is over."""
        if self.left_early():  # he has had what he asked for
            self.fail(CallerLeft("the caller left while the request waited"))
            return
        self.refund()
        if self.is_shed:
            self.fail(Overloaded("too much has been waiting for too long", self.retry_after_s))
        elif self.is_displaced:
            why = "requests of a higher priority needed the room"
            self.fail(Overloaded(why, self.retry_after_s))
        else:
            self.fail(DeadlineExceeded("the deadline came too close while the request waited"))

    def left_early(self) -> bool:
        """Say whether the caller gave up although there was time left."""
        return self.expired(-math.inf) and not ran_out(
            self.deadline_s - time.time(), time.perf_counter() - self.arrival_s
        )

    def refund(self) -> None:
        """Give back, once, what the request took of its caller's quota."""
        account, self.paid_from = self.paid_from, None
        if account is not None:
            account.refund(self.caller, self.rows)

    def leave(self) -> None:
        """Leave the queue at once, if it is still there: its caller has gone."""
        place = self.waits_in  # read once: whoever settles the request clears it, on any thread
        if place is not None and place.leave(self):
            self.drop()  # nobody hears it, but only what is answered ends
