"""How a hot call is refused: the status goes out, and is told of."""

from headrace.request import Request
from headrace.rpc.ingress import HotCall
from headrace.rpc.status import status_of
from headrace.telemetry.calls import CallRecorder, failed_call
from headrace.telemetry.trace_context import Trace


def refuse(
    call: HotCall,
    error: Exception,
    calls: CallRecorder,
    method: str,
    trace: Trace | None,
    request: Request | None = None,
) -> None:
    """
    Answer a call with an error.

    Args:
        call: Not answered yet.
        error: Why.
        calls: Is told.
        method: As `package.Service/Method`.
        trace: Of a sampled call.
        request: What it asked, if it got that far.
    """
    status = status_of(error, trace)
    call.refuse(status)
    served = None if request is None else request.served
    calls.failed(
        failed_call(
            method,
            status.code.name,
            status.details,
            call.arrival_s,
            model="" if served is None else served.name,
            version="" if served is None else served.version,
            rows=0 if request is None else request.rows,
            trace=trace,
        )
    )
