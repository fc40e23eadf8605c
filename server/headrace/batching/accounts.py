"""Who calls, and whether his quota lets him in; what he takes of it and gets back.

The pure `callers` and `quotas`, with a clock and a lock.
"""

import threading
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from headrace.batching.callers import Caller, caller_of
from headrace.batching.queued import QueuedRequest
from headrace.batching.quotas import Quotas
from headrace.errors import QuotaExceeded

RequestT = TypeVar("RequestT", bound=QueuedRequest)


class CallerAccounts:
    """
    The callers of one server. Any thread may call any method.

    `enter` comes before anything is read of a request, `pass_on` when it is known what it asks for.

    Args:
        header: Key of the metadata that says who calls, in lower case.
        quotas: How many rows each may ask for; None for any number.
        clock: Seconds, from anywhere.

    Attributes:
        refused: Requests refused because their callers had used up their quotas.
    """

    def __init__(
        self,
        header: str,
        quotas: Quotas | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.refused = 0
        self._header = header
        self._quotas = quotas
        self._clock = clock
        self._lock = threading.Lock()

    def enter(self, metadata: Sequence[tuple[str, str | bytes]]) -> Caller:
        """
        Say who calls.

        Raises:
            QuotaExceeded: he has used up his quota for now.
        """
        caller = caller_of(metadata, self._header)
        quotas = self._quotas
        if quotas is not None:
            with self._lock:
                wait_s = quotas.wait_s(caller, self._clock())
                if wait_s > 0:
                    self.refused += 1
            if wait_s > 0:
                raise QuotaExceeded(
                    f"the caller has used up its quota of {quotas.rate_per_s:g} rows per second",
                    retry_after_s=wait_s,
                )
        return caller

    def pass_on(
        self, caller: Caller, request: RequestT, submit: Callable[[RequestT], None]
    ) -> None:
        """
        Charge a caller for a request and submit it; one that is refused is not charged for.

        Args:
            caller: What `enter` returned.
            request: His.
            submit: Queues it, or raises.
        """
        request.caller = caller
        quotas = self._quotas
        if quotas is None:
            submit(request)
            return
        with self._lock:
            quotas.charge(caller, request.rows, self._clock())
        request.paid_from = self
        try:
            submit(request)
        except BaseException:
            request.refund()
            raise

    def refund(self, caller: Caller, rows: int) -> None:
        """Take rows back that were not served."""
        if self._quotas is not None:
            with self._lock:
                self._quotas.refund(caller, rows)
