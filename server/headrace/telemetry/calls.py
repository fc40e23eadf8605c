"""What is told of single calls: one line for each that failed or was sampled, and its spans.

Callers hand over what happened and go on; a thread of its own writes lines and spans, a few times a
second. It waits for nobody: spans are sent by the exporter's thread.
"""

import threading
import time
from collections import deque
from typing import Any, NamedTuple

import structlog

from headrace.telemetry.line_limit import LineLimit
from headrace.telemetry.metrics import Metrics
from headrace.telemetry.spans import (
    FailedCall,
    Spans,
    TracedBatch,
    batch_spans,
    failed_spans,
)
from headrace.telemetry.trace_context import Sampler, Trace
from headrace.telemetry.tracing import SpanExporter

_LOG = structlog.get_logger("headrace.calls")

CALLS_MAX = 16_384
"""
Sampled and failed calls that wait to be told of; newer ones are dropped and counted. Three times as
many as one core answers between two tellings, if every call is traced.
"""

LINES_MAX = 1_024
"""Failed calls that have a line, beyond those: what is sampled does not crowd them out."""

PERIOD_S = 0.2
SLICE_CALLS = 256
"""Told of at a stretch: half a millisecond, then others have their turn at the interpreter."""

PAUSE_S = 0.001
EXPORT_PERIOD_S = 1.0
"""Rarely: a thread that waits for a collector polls the server's own epoll set (decision 0009)."""

EXPORT_BYTES = 2 << 20
"""Spans of one export, about; collectors take 4 MiB unless told otherwise."""

LINES_PER_S = 10.0
"""Of each status code, lest a flood fill a disk. The next line says how many were held back."""


class _Failure(NamedTuple):
    """A failed call; how many lines were held back before its own, None if it has none."""

    call: FailedCall
    suppressed: int | None


class CallRecorder:
    """
    Tells of single calls. `failed` and `answered` never block and may be called by any thread.

    Args:
        metrics: Counts every failed call.
        sampler: Decides which calls are traced; None traces none.
        exporter: Gets the spans; required with a sampler.
    """

    def __init__(
        self,
        metrics: Metrics,
        sampler: Sampler | None = None,
        exporter: SpanExporter | None = None,
    ) -> None:
        self._metrics = metrics
        self._sampler = sampler
        self._exporter = exporter
        self.sample = None if sampler is None else sampler.sample
        """Decides about a call by its metadata; None while no call is ever traced."""
        self.another = None if sampler is None else sampler.another
        """Returns a trace for one more message of a stream that is sampled."""
        self._lock = threading.Lock()
        self._records: deque[TracedBatch | _Failure] = deque()
        self._waiting = 0
        self.dropped = 0
        """Calls that came while too many waited."""
        self._spans: list[Spans] = []
        self._span_bytes = 0
        self._export_s = 0.0
        self._failure_lines: dict[str, LineLimit] = {}
        self._answer_lines = LineLimit(LINES_PER_S)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="call-records", daemon=True)

    @property
    def exporter(self) -> SpanExporter | None:
        """Where spans go."""
        return self._exporter

    def failed(self, call: FailedCall) -> None:
        """
        Note a call that was refused or failed.

        One that nothing will be told of, neither a line nor a span, is counted and forgotten: most
        are, when a server is asked too much.
        """
        self._metrics.rpc_error(call.method.rpartition("/")[2], call.code)
        with self._lock:
            limit = self._failure_lines.get(call.code)
            if limit is None:  # as many as gRPC has codes
                limit = self._failure_lines[call.code] = LineLimit(LINES_PER_S)
            suppressed = limit.take(call.failed_s)
            if suppressed is not None or call.trace is not None:
                most = CALLS_MAX if suppressed is None else CALLS_MAX + LINES_MAX
                is_kept = self._put(_Failure(call, suppressed), 1, most)
                if suppressed is not None and not is_kept:
                    limit.lose(suppressed)

    def answered(self, batch: TracedBatch) -> None:
        """Note a batch with sampled calls in it."""
        with self._lock:
            self._put(batch, len(batch.calls.traces))

    def start(self) -> None:
        """Begin to tell."""
        if self._exporter is not None:
            self._exporter.start()
        self._thread.start()

    def stop(self, timeout_s: float) -> None:
        """Tell of what waits, if it can be done in time; end."""
        deadline_s = time.monotonic() + timeout_s
        self._stopping.set()
        if self._thread.ident is not None:
            self._thread.join(timeout_s)
        if self._exporter is not None:
            self._exporter.stop(max(0.0, deadline_s - time.monotonic()))

    def _put(self, record: "TracedBatch | _Failure", calls: int, most: int = CALLS_MAX) -> bool:
        """Let a record wait, if there is room for it."""
        if self._waiting + calls > most:
            self.dropped += calls
            return False
        self._waiting += calls
        self._records.append(record)
        return True

    def _run(self) -> None:
        while True:
            is_last = self._stopping.wait(PERIOD_S)
            try:
                self._tell()
                self._export(now=is_last)
            except Exception:  # noqa: BLE001 the next ones may fare better
                _LOG.exception("call_records_failed")
            if is_last:
                return

    def _tell(self) -> None:
        offset_s = time.time() - time.perf_counter()
        with self._lock:
            records, self._records = self._records, deque()
            self._waiting = 0
        told = 0
        for record in records:
            try:
                told += self._tell_of(record, offset_s)
            except Exception:  # noqa: BLE001 one bad record must not silence the others
                _LOG.exception("call_record_failed")
            if told >= SLICE_CALLS:
                told = 0
                time.sleep(PAUSE_S)

    def _tell_of(self, record: "TracedBatch | _Failure", offset_s: float) -> int:
        """Tell of one record; return how many calls that were."""
        if isinstance(record, _Failure):
            if record.suppressed is not None:
                _tell_failed(record.call, record.suppressed)
            self._keep(failed_spans(record.call, offset_s))
            return 1
        self._tell_answered(record)
        assert self._sampler is not None
        self._keep(batch_spans(record, self._sampler.begin(), offset_s))
        return len(record.calls.traces)

    def _keep(self, spans: Spans) -> None:
        if not spans.span_count:
            return
        self._spans.append(spans)
        self._span_bytes += len(spans.data)
        if self._span_bytes >= EXPORT_BYTES:
            self._export(now=True)

    def _export(self, *, now: bool) -> None:
        if not self._spans or self._exporter is None:
            return
        if now or time.monotonic() >= self._export_s:
            spans, self._spans, self._span_bytes = self._spans, [], 0
            self._export_s = time.monotonic() + EXPORT_PERIOD_S
            self._exporter.export(spans)

    def _tell_answered(self, batch: TracedBatch) -> None:
        for i, call in enumerate(zip(*batch.calls, strict=True)):
            suppressed = self._answer_lines.take(time.monotonic(), len(batch.calls.traces) - i)
            if suppressed is None:
                return
            trace, method, arrival_s, rows, prediction_id = call
            _LOG.info(
                "request",
                method=method,
                code="OK",
                **_subject(batch),
                rows=rows,
                batch_rows=batch.rows,
                duration_s=_s(batch.replied_s - arrival_s),
                queue_s=_s(batch.started_s - arrival_s),
                features_s=_s(batch.joined_s - batch.started_s) if batch.has_features else None,
                infer_s=_s(batch.inferred_s - batch.joined_s) if batch.model else None,
                prediction_id=prediction_id or None,
                trace_id=trace.trace_id.hex(),
                **({"suppressed": suppressed} if suppressed else {}),
            )


def failed_call(
    method: str,
    code: str,
    message: str,
    arrival_s: float,
    *,
    model: str = "",
    version: str = "",
    rows: int = 0,
    trace: Trace | None = None,
) -> FailedCall:
    """Put together what is known of a call that fails now."""
    now_s = time.perf_counter()
    return FailedCall(method, code, message, arrival_s, now_s, model, version, rows, trace)


def _tell_failed(call: FailedCall, suppressed: int) -> None:
    fields: dict[str, Any] = {"code": call.code, "message": call.message}
    if call.model:
        fields |= {"model": call.model, "version": call.version, "rows": call.rows}
    if call.trace is not None:
        fields["trace_id"] = call.trace.trace_id.hex()
    if suppressed:
        fields["suppressed"] = suppressed
    _LOG.info(
        "request", method=call.method, duration_s=_s(call.failed_s - call.arrival_s), **fields
    )


def _subject(batch: TracedBatch) -> dict[str, str]:
    if batch.model:
        return {"model": batch.model, "version": batch.version}
    return {"feature_service": batch.feature_service} if batch.feature_service else {}


def _s(seconds: float) -> float:
    return round(seconds, 6)
