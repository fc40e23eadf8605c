"""Spans of finished calls, serialized: built from timestamps, after the reply. Pure.

Written as OTLP's bytes, since objects cost more than the calls they tell of: five spans of a call
take 110 µs as OpenTelemetry's `ReadableSpan`s, 10 µs as its protobuf messages, 3 µs as bytes. A
field's tag is taken from protobuf, at import; what does not differ between the calls of a batch is
written once for all of them.

Source: OpenTelemetry protocol, `opentelemetry/proto/trace/v1/trace.proto`; Protocol Buffers,
"Encoding" (fields come in any order, a repeated one is a record each); OpenTelemetry semantic
conventions for RPC.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.trace.v1.trace_pb2 import ScopeSpans, Span, Status

from headrace.telemetry.trace_context import Trace
from headrace.wire import delimited, tag, varint

LINKS_MAX = 128

REQUEST, WAIT, FETCH, INFER, REPLY = range(1, 6)
"""The spans of a call, as `Trace.id_of` numbers them."""


class TracedCalls(NamedTuple):
    """
    The sampled calls of a batch, which were answered: a column for each thing that is told.

    Args:
        traces: Whose.
        methods: As `package.Service/Method`.
        arrivals_s: When each reached the port, on `time.perf_counter`'s clock, as all times here.
        rows: Of each.
        prediction_ids: Of their replies; empty where there are none.
    """

    traces: Sequence[Trace]
    methods: Sequence[str]
    arrivals_s: Sequence[float]
    rows: Sequence[int]
    prediction_ids: Sequence[str]


class TracedBatch(NamedTuple):
    """
    An answered batch with sampled calls in it.

    Args:
        model: Who answered.
        version: Its version.
        rows: Of the whole batch.
        requests: Of the whole batch.
        started_s: When the batch was taken.
        joined_s: When the model's inputs were there.
        inferred_s: When the model had answered.
        replied_s: When the last reply was sent.
        has_features: Whether features were read.
        is_remote: Whether the model runs on another server.
        calls: The sampled ones.
        feature_service: For features without a model, whose `model` is empty; empty itself where
            they were asked for one by one.
    """

    model: str
    version: str
    rows: int
    requests: int
    started_s: float
    joined_s: float
    inferred_s: float
    replied_s: float
    has_features: bool
    is_remote: bool
    calls: TracedCalls
    feature_service: str = ""


class FailedCall(NamedTuple):
    """
    A call that was refused or failed.

    Args:
        method: As `package.Service/Method`.
        code: gRPC's name of its status.
        message: What the caller was told.
        arrival_s: When it reached the port, on `time.perf_counter`'s clock.
        failed_s: When it was refused, likewise.
        model: Whose queue it had reached; empty when none.
        version: Likewise.
        rows: Likewise, 0 when it reached none.
        trace: None for one that was not sampled.
    """

    method: str
    code: str
    message: str
    arrival_s: float
    failed_s: float
    model: str
    version: str
    rows: int
    trace: Trace | None


class Spans(NamedTuple):
    """
    Finished spans.

    Args:
        data: The `spans` of a `ScopeSpans`, serialized. Such data may be put together.
        span_count: How many.
    """

    data: bytes
    span_count: int


def batch_spans(batch: TracedBatch, run: Trace, offset_s: float) -> Spans:
    """
    Write the spans of a batch: its own, and those of each sampled call.

    `batch.run` has a trace of its own, for it belongs to all its members; each links to it and it
    to them. Under each call: `batch.wait`, `features.fetch` (with features), `backend.infer` (with
    a model) and `batch.reply`, which together are the call.

    Args:
        batch: What happened.
        run: The trace of `batch.run`.
        offset_s: From the batch's clock to Unix seconds.
    """
    started, joined, inferred, replied = (
        _nanoseconds(seconds + offset_s)
        for seconds in (batch.started_s, batch.joined_s, batch.inferred_s, batch.replied_s)
    )
    infer = _REMOTE_INFER if batch.is_remote else _INFER
    if not batch.model:
        stages = [_FETCH + _times(started, joined)]
    elif batch.has_features:
        stages = [_FETCH + _times(started, joined), infer + _times(joined, inferred)]
    else:
        stages = [infer + _times(started, inferred)]
    stages.append(_REPLY + _times(inferred, replied))
    stages = [stage + _PARENT_ID for stage in stages]
    of_request = _REQUEST + _END + replied + _LINK + run.trace_id + _LINKED_SPAN + run.span_id
    of_wait = _WAIT + _END + started + _PARENT_ID

    parts = _run_span(batch, run, started, replied)
    frames: dict[tuple[str, int, int, int, bool], _Frame] = {}
    for trace, method, arrival_s, rows, prediction_id in zip(*batch.calls, strict=True):
        context, parent, prediction = _context(trace), trace.parent_id, prediction_id.encode()
        alike = (method, rows, len(context), len(prediction), bool(parent))
        frame = frames.get(alike)
        if frame is None:
            of_call = _of_call(method, batch.model, batch.version, batch.feature_service, rows)
            frame = frames[alike] = _frame(alike, of_request + of_call, of_wait, stages)
        since = _START + int((arrival_s + offset_s) * 1e9).to_bytes(8, "little")
        span_id = trace.span_id
        # Every span begins with `context`, whose last byte its own part brings.
        parts += (frame.request, context, frame.of_call, prediction, frame.of_parent, parent, since)
        parts += (frame.wait, context, of_wait, span_id, since)
        for record, stage in frame.stages:
            parts += (record, context, stage, span_id)
    return Spans(b"".join(parts), 1 + len(batch.calls.traces) * (2 + len(stages)))


def failed_spans(call: FailedCall, offset_s: float) -> Spans:
    """
    Write what there is of a call that failed: nothing for one that was not sampled, its span, and
    that of the call to another server that it led to, so that the part told of there has a parent.
    """
    trace = call.trace
    if trace is None:
        return Spans(b"", 0)
    attributes = {
        **_of_method(call.method),
        "rpc.response.status_code": call.code,
        "error.type": call.code,
    }
    if call.model:
        attributes |= _of_model(call.model, call.version) | {"headrace.rows": call.rows}
    failed = _unix_ns(call.failed_s + offset_s)
    spans = [
        Span(
            trace_id=trace.trace_id,
            span_id=trace.span_id,
            parent_span_id=trace.parent_id,
            trace_state=trace.state,
            name="headrace.request",
            kind=Span.SPAN_KIND_SERVER,
            start_time_unix_nano=_unix_ns(call.arrival_s + offset_s),
            end_time_unix_nano=failed,
            attributes=_pairs(attributes),
            status=Status(code=Status.STATUS_CODE_ERROR, message=call.message),
        )
    ]
    if trace.called_s is not None:
        spans.append(
            Span(
                trace_id=trace.trace_id,
                span_id=trace.id_of(INFER),
                parent_span_id=trace.span_id,
                trace_state=trace.state,
                name="backend.infer",
                kind=Span.SPAN_KIND_CLIENT,
                start_time_unix_nano=_unix_ns(trace.called_s + offset_s),
                end_time_unix_nano=failed,
                status=Status(code=Status.STATUS_CODE_ERROR),
            )
        )
    return Spans(ScopeSpans(spans=spans).SerializeToString(), len(spans))


class _Frame(NamedTuple):
    """
    What the spans of alike calls share.

    Args:
        request: Goes before the call's own span.
        of_call: What is in that, up to the prediction id's characters.
        of_parent: What follows them, up to the parent's id; empty at a root.
        wait: Goes before the span of its wait.
        stages: What goes before each other span, and what is in it, up to its parent's id.
    """

    request: bytes
    of_call: bytes
    of_parent: bytes
    wait: bytes
    stages: Sequence[tuple[bytes, bytes]]


def _frame(
    alike: tuple[str, int, int, int, bool], of_call: bytes, of_wait: bytes, stages: Sequence[bytes]
) -> _Frame:
    """Put together what calls share whose method, rows, lengths and having a parent are alike."""
    _, _, context_length, prediction_length, has_parent = alike
    if prediction_length:
        of_call += _of_prediction(prediction_length)
    of_parent = _PARENT_ID if has_parent else b""
    own = len(of_call) + prediction_length + _TIME_LENGTH
    if has_parent:
        own += len(of_parent) + _ID_LENGTH
    under = context_length + _ID_LENGTH
    return _Frame(
        request=_record(context_length + own),
        of_call=of_call,
        of_parent=of_parent,
        wait=_record(under + len(of_wait) + _TIME_LENGTH),
        stages=[(_record(under + len(stage)), stage) for stage in stages],
    )


def _run_span(batch: TracedBatch, run: Trace, started: bytes, replied: bytes) -> list[bytes]:
    parts = [
        _context(run) + _RUN + _times(started, replied),
        _of_batch(batch.model, batch.version, batch.feature_service, batch.requests, batch.rows),
    ]
    for trace in batch.calls.traces[:LINKS_MAX]:
        parts += (_LINK, trace.trace_id, _LINKED_SPAN, trace.span_id)
    return [_record(sum(map(len, parts))), *parts]


def _context(trace: Trace) -> bytes:
    """Write what every span of a call begins with, up to its id's last byte: its number."""
    state = delimited(_TRACE_STATE, trace.state.encode()) if trace.state else b""
    return state + _TRACE_ID + trace.trace_id + _SPAN_ID + trace.stem


def _times(start: bytes, end: bytes) -> bytes:
    return _START + start + _END + end


def _nanoseconds(unix_s: float) -> bytes:
    return _unix_ns(unix_s).to_bytes(8, "little")


def _unix_ns(unix_s: float) -> int:
    return int(unix_s * 1e9)


@lru_cache(maxsize=4_096)
def _record(size: int) -> bytes:
    """Return what goes before a span of so many bytes."""
    return _SPANS + varint(size)


@lru_cache(maxsize=1_024)
def _of_call(method: str, model: str, version: str, feature_service: str, rows: int) -> bytes:
    return _serialized(
        {
            **_of_method(method),
            "rpc.response.status_code": "OK",
            **(_of_model(model, version) if model else _of_features(feature_service)),
            "headrace.rows": rows,
        }
    )


@lru_cache(maxsize=1_024)
def _of_batch(model: str, version: str, feature_service: str, requests: int, rows: int) -> bytes:
    return _serialized(
        {
            **(_of_model(model, version) if model else _of_features(feature_service)),
            "headrace.batch.requests": requests,
            "headrace.batch.rows": rows,
        }
    )


@lru_cache(maxsize=64)
def _of_prediction(length: int) -> bytes:
    """Return what goes before a prediction id of that length."""
    whole = _serialized({"headrace.prediction_id": "0" * length})
    return whole[: len(whole) - length]


def _of_method(method: str) -> dict[str, str | int]:
    return {"rpc.system.name": "grpc", "rpc.method": method}


def _of_model(model: str, version: str) -> dict[str, str | int]:
    return {"headrace.model": model, "headrace.version": version}


def _of_features(feature_service: str) -> dict[str, str | int]:
    return {"headrace.feature_service": feature_service} if feature_service else {}


def _serialized(attributes: dict[str, str | int]) -> bytes:
    return bytes(Span(attributes=_pairs(attributes)).SerializeToString())


def _pairs(attributes: dict[str, str | int]) -> list[KeyValue]:
    return [
        KeyValue(
            key=key,
            value=AnyValue(string_value=value)
            if isinstance(value, str)
            else AnyValue(int_value=value),
        )
        for key, value in attributes.items()
    ]


def _named(number: int, name: str, kind: Span.SpanKind.ValueType) -> bytes:
    return bytes([number]) + Span(name=name, kind=kind).SerializeToString()


def _before(message: Span | Span.Link, size: int) -> bytes:
    """Return what goes before the value, of so many bytes, of a message's only field."""
    return bytes(message.SerializeToString()[:-size])


_ID, _LONG_ID = bytes(8), bytes(16)
_SPANS = tag(ScopeSpans.SPANS_FIELD_NUMBER)
_TRACE_STATE = tag(Span.TRACE_STATE_FIELD_NUMBER)
_TRACE_ID = _before(Span(trace_id=_LONG_ID), 16)
_SPAN_ID = _before(Span(span_id=_ID), 8)
_PARENT_ID = _before(Span(parent_span_id=_ID), 8)
_START = _before(Span(start_time_unix_nano=1), 8)
_END = _before(Span(end_time_unix_nano=1), 8)
_ID_LENGTH, _TIME_LENGTH = 8, len(_START) + 8
_LINKED_TRACE = _before(Span.Link(trace_id=_LONG_ID), 16)
_LINKED_SPAN = _before(Span.Link(span_id=_ID), 8)
_LINK = (
    tag(Span.LINKS_FIELD_NUMBER)
    + varint(len(_LINKED_TRACE) + 16 + len(_LINKED_SPAN) + 8)
    + _LINKED_TRACE
)
_INTERNAL, _SERVER, _CLIENT = Span.SPAN_KIND_INTERNAL, Span.SPAN_KIND_SERVER, Span.SPAN_KIND_CLIENT
_RUN = _named(REQUEST, "batch.run", _INTERNAL)
_REQUEST = _named(REQUEST, "headrace.request", _SERVER)
_WAIT = _named(WAIT, "batch.wait", _INTERNAL)
_FETCH = _named(FETCH, "features.fetch", _CLIENT)
_INFER = _named(INFER, "backend.infer", _INTERNAL)
_REMOTE_INFER = _named(INFER, "backend.infer", _CLIENT)
_REPLY = _named(REPLY, "batch.reply", _INTERNAL)
