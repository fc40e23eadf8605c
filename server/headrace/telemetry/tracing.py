"""Spans on their way to a collector, through OpenTelemetry's OTLP exporter."""

import os
import time
from collections.abc import Sequence
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

import structlog
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import ResourceSpans, ScopeSpans, Span
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExportResult
from opentelemetry.trace import INVALID_SPAN_CONTEXT

import headrace
from headrace.telemetry.trace_context import Rule, parse_sampler

_LOG = structlog.get_logger(__name__)

TIMEOUT_S = 2.0
"""Of one export, unless OTEL_EXPORTER_OTLP_TIMEOUT says otherwise."""

PAUSE_S = 10.0
"""After a failed export nothing is tried for so long; spans of that time are dropped."""

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


class SpanExporter:
    """
    Sends spans; endpoint, headers, TLS and compression are those of the environment.

    One thread's own. An export takes at most its timeout; after one that failed, spans are dropped
    for `PAUSE_S`, so that a collector that hangs costs next to nothing.
    """

    def __init__(self) -> None:
        endpoint = next(os.environ[name] for name in _ENDPOINTS if os.environ.get(name))
        options: Any = None
        if _is_loopback(endpoint):  # a proxy has no business between us and ourselves
            options = (("grpc.enable_http_proxy", 0),)
        timed = any(
            os.environ.get(name)
            for name in ("OTEL_EXPORTER_OTLP_TIMEOUT", "OTEL_EXPORTER_OTLP_TRACES_TIMEOUT")
        )
        self._exporter = _Exporter(timeout=None if timed else TIMEOUT_S, channel_options=options)
        attributes = {"service.name": "headrace", "service.version": headrace.__version__}
        named = Resource.create()
        if named.attributes.get("service.name", "").startswith("unknown_service"):  # type: ignore[union-attr]
            named = named.merge(Resource(attributes))
        self._resource = _encoded(named)
        self._resume_s = 0.0
        self.exported = 0
        self.dropped = 0
        """Not exported: the collector did not take them, or had not taken others."""

    def export(self, spans: Sequence[Span]) -> None:
        """Send spans, or count them as dropped."""
        if time.monotonic() < self._resume_s:
            self.dropped += len(spans)
            return
        request = ExportTraceServiceRequest(
            resource_spans=[
                ResourceSpans(
                    resource=self._resource.resource,
                    scope_spans=[
                        ScopeSpans(scope=self._resource.scope_spans[0].scope, spans=spans)
                    ],
                )
            ]
        )
        result = self._exporter.export(request)  # type: ignore[arg-type]
        if result is SpanExportResult.SUCCESS:
            self.exported += len(spans)
        else:
            self.dropped += len(spans)
            self._resume_s = time.monotonic() + PAUSE_S
            _LOG.warning("spans_not_exported", spans=len(spans), retry_in_s=PAUSE_S)

    def close(self) -> None:
        """Close the connection."""
        self._exporter.shutdown()


class _Exporter(OTLPSpanExporter):
    """OpenTelemetry's exporter, for requests that are encoded already."""

    def _translate_data(self, data: Any) -> Any:
        return data

    def _count_data(self, data: Any) -> int:
        return sum(len(s.spans) for r in data.resource_spans for s in r.scope_spans)


def _encoded(resource: Resource) -> ResourceSpans:
    """Encode resource and scope as OpenTelemetry does, by way of a span that is thrown away."""
    from opentelemetry.sdk.util.instrumentation import InstrumentationScope  # noqa: PLC0415

    span = ReadableSpan(
        "",
        context=INVALID_SPAN_CONTEXT,
        resource=resource,
        instrumentation_scope=InstrumentationScope("headrace", headrace.__version__),
    )
    encoded: ResourceSpans = encode_spans([span]).resource_spans[0]
    return encoded


def _is_loopback(endpoint: str) -> bool:
    host = urlsplit(endpoint if "//" in endpoint else f"//{endpoint}").hostname or ""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
