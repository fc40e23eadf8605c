"""Calls that are refused before their messages are read, judged by their deadlines alone.

While a queue refuses, what a refusal costs decides what is left to serve with: a call that would be
refused whatever it says is not received, parsed, checked or copied.
"""

from collections.abc import Callable, Iterator

from headrace.catalog import Catalog
from headrace.errors import Overloaded
from headrace.rpc.ingress import HotCall
from headrace.rpc.status import Status, statuses_of
from headrace.telemetry.calls import CallRecorder, failed_call


class Unread:
    """
    Looks at the calls of one method as they come.

    Only where one model version serves, so that it is clear which queue a call is for.

    Args:
        catalog: Returns the models as they are now.
        calls: Decides which calls are traced, and is told of those that are refused.
        method: As `package.Service/Method`.
    """

    def __init__(self, catalog: Callable[[], Catalog], calls: CallRecorder, method: str) -> None:
        self._catalog = catalog
        self._calls = calls
        self._sample = calls.sample
        self._method = method
        self._statuses: dict[Overloaded, Iterator[Status]] = {}

    def glance(self, call: HotCall) -> Status | None:
        """Return the status to refuse a call with; None to receive its message."""
        model = self._catalog().sole
        if model is None or not model.queue.pressure:
            return None
        error = model.refuses(call.deadline_s)
        return None if error is None else self._refusal(call, error)

    def _refusal(self, call: HotCall, error: Overloaded) -> Status:
        statuses = self._statuses.get(error)
        if statuses is None:  # there are a few errors, always the same objects
            statuses = self._statuses[error] = statuses_of(error)
        status = next(statuses)
        trace = None if self._sample is None else self._sample(call.metadata)
        self._calls.failed(
            failed_call(self._method, status.code.name, status.details, call.arrival_s, trace=trace)
        )
        return status
