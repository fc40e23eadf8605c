"""Spans on their way to a collector, through OpenTelemetry's OTLP exporter."""

import os
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from ipaddress import ip_address
from queue import SimpleQueue
from typing import Any
from urllib.parse import urlsplit

import structlog
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import ResourceSpans, ScopeSpans
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExportResult
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import INVALID_SPAN_CONTEXT

import headrace
from headrace.telemetry.spans import Spans
from headrace.telemetry.trace_context import Rule, parse_sampler
from headrace.wire import tag, varint

_LOG = structlog.get_logger(__name__)

TIMEOUT_S = 2.0
"""Of one export, unless OTEL_EXPORTER_OTLP_TIMEOUT says otherwise."""

PAUSE_S = 10.0
"""After a failed export nothing is tried for so long; spans of that time are dropped."""

WAITING_BYTES_MAX = 16 << 20
"""
Of spans that wait for their export or are in it; newer ones are dropped. A second of a core that
traces every call, about: as long as an export may well take.
"""

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")


def tracing_rule() -> Rule | None:
    """
    Read from OpenTelemetry's environment whether calls are traced, and which.

    Returns:
        None when nothing is: no endpoint, switched off, or another exporter than `otlp`.

    Raises:
        StartupError: the sampler makes no sense.
    """
    environment = os.environ
    if environment.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return None
    if environment.get("OTEL_TRACES_EXPORTER", "otlp") != "otlp":
        return None
    if not any(environment.get(name) for name in _ENDPOINTS):
        return None
    return parse_sampler(
        environment.get("OTEL_TRACES_SAMPLER"), environment.get("OTEL_TRACES_SAMPLER_ARG")
    )


def worker_attributes(named: Mapping[str, Any], worker: int) -> dict[str, str | int]:
    """
    Return what tells one of several processes from the others.

    Source: OpenTelemetry's semantic conventions, "Service": `service.instance.id` must be unique
    for each instance of a service.

    Args:
        named: The attributes that all share.
        worker: Which one.
    """
    instance = str(named.get("service.instance.id") or uuid.uuid4())
    return {"service.instance.id": f"{instance}-{worker}", "headrace.worker": worker}


class SpanExporter:
    """
    Sends spans; endpoint, headers, TLS and compression are those of the environment.

    `export` never blocks and may be called by any thread: a thread of its own waits for the
    collector, and nobody waits for it but spans. An export takes at most its timeout; after one
    that failed, spans are dropped for `PAUSE_S`, so that a collector that hangs costs next to
    nothing.

    Args:
        worker: Which of several processes this is.
    """

    def __init__(self, worker: int | None = None) -> None:
        endpoint = next(os.environ[name] for name in _ENDPOINTS if os.environ.get(name))
        options: Any = None
        if _is_loopback(endpoint):  # a proxy has no business between us and ourselves
            options = (("grpc.enable_http_proxy", 0),)
        timed = any(
            os.environ.get(name)
            for name in ("OTEL_EXPORTER_OTLP_TIMEOUT", "OTEL_EXPORTER_OTLP_TRACES_TIMEOUT")
        )
        self._exporter = _Exporter(timeout=None if timed else TIMEOUT_S, channel_options=options)
        named = Resource({"service.version": headrace.__version__}).merge(Resource.create())
        if str(named.attributes["service.name"]).startswith("unknown_service"):
            named = named.merge(Resource({"service.name": "headrace"}))
        if worker is not None:
            named = named.merge(Resource(worker_attributes(named.attributes, worker)))
        self._envelope = _Envelope(named)
        self._resume_s = 0.0
        self._lock = threading.Lock()
        self._waiting: SimpleQueue[Sequence[Spans] | None] = SimpleQueue()
        self._waiting_bytes = 0
        self._thread = threading.Thread(target=self._run, name="span-export", daemon=True)
        self.exported = 0
        self.dropped = 0
        """Not exported: the collector did not take them, or had not taken others."""

    def start(self) -> None:
        """Begin to send."""
        self._thread.start()

    def export(self, spans: Sequence[Spans]) -> None:
        """Have spans sent in one message, or count them as dropped when too many wait."""
        size = _size(spans)
        with self._lock:
            if self._waiting_bytes + size > WAITING_BYTES_MAX:
                self.dropped += _count(spans)
                return
            self._waiting_bytes += size
        self._waiting.put(spans)

    def stop(self, timeout_s: float) -> None:
        """Send what waits, if it can be done in time; close the connection."""
        self._waiting.put(None)
        if self._thread.ident is not None:
            self._thread.join(timeout_s)

    def _run(self) -> None:
        while (spans := self._waiting.get()) is not None:
            is_sent = time.monotonic() >= self._resume_s and self._send(spans)
            with self._lock:
                self._waiting_bytes -= _size(spans)
                if is_sent:
                    self.exported += _count(spans)
                else:
                    self.dropped += _count(spans)
            del spans  # while there is nothing to do, none are kept
        self._exporter.shutdown()

    def _send(self, spans: Sequence[Spans]) -> bool:
        """Say whether the collector has taken spans; if not, none are sent for a while."""
        try:
            message = self._envelope.enclose([some.data for some in spans])
            result = self._exporter.export(message)  # type: ignore[arg-type]
        except Exception:  # noqa: BLE001 the next ones may fare better
            _LOG.exception("span_export_failed")
            result = SpanExportResult.FAILURE
        if result is SpanExportResult.SUCCESS:
            return True
        self._resume_s = time.monotonic() + PAUSE_S
        _LOG.warning("spans_not_exported", spans=_count(spans), retry_in_s=PAUSE_S)
        return False


class _Exporter(OTLPSpanExporter):
    """OpenTelemetry's exporter, for requests that are serialized already."""

    def _initialize_channel_and_stub(self) -> None:
        super()._initialize_channel_and_stub()  # type: ignore[no-untyped-call]
        self._client = _Client(self._channel)  # type: ignore[assignment]

    def _translate_data(self, data: Any) -> Any:
        return data

    def _count_data(self, data: Any) -> int:  # noqa: ARG002
        return 1  # for OpenTelemetry's metrics of itself, which nobody reads here


class _Client:
    """The collector's one method, bytes in and out."""

    def __init__(self, channel: Any) -> None:
        path = "/opentelemetry.proto.collector.trace.v1.TraceService/Export"
        self.Export = channel.unary_unary(path)


class _Envelope:
    """What goes around serialized spans: their resource and scope."""

    def __init__(self, resource: Resource) -> None:
        # Encoded as OpenTelemetry does it, by way of a span that is thrown away.
        span = ReadableSpan(
            "",
            context=INVALID_SPAN_CONTEXT,
            resource=resource,
            instrumentation_scope=InstrumentationScope("headrace", headrace.__version__),
        )
        (encoded,) = encode_spans([span]).resource_spans
        self._resource = ResourceSpans(resource=encoded.resource).SerializeToString()
        self._scope = ScopeSpans(scope=encoded.scope_spans[0].scope).SerializeToString()

    def enclose(self, spans: Sequence[bytes]) -> bytes:
        """
        Return a serialized `ExportTraceServiceRequest`.

        Megabytes of them are copied once: the kernel has to find new pages for each copy, which
        took more time than any other part of an export.
        """
        size = len(self._scope) + sum(map(len, spans))
        before_scope = _SCOPE_SPANS + varint(size)
        size += len(self._resource) + len(before_scope)
        before_resource = _RESOURCE_SPANS + varint(size)
        return b"".join((before_resource, self._resource, before_scope, self._scope, *spans))


_SCOPE_SPANS = tag(ResourceSpans.SCOPE_SPANS_FIELD_NUMBER)
_RESOURCE_SPANS = tag(ExportTraceServiceRequest.RESOURCE_SPANS_FIELD_NUMBER)


def _size(spans: Sequence[Spans]) -> int:
    return sum([len(some.data) for some in spans])


def _count(spans: Sequence[Spans]) -> int:
    return sum([some.span_count for some in spans])


def _is_loopback(endpoint: str) -> bool:
    host = urlsplit(endpoint if "//" in endpoint else f"//{endpoint}").hostname or ""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
