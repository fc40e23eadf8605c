"""The numbers of the server, as Prometheus collects them.

The hot path folds its numbers in once per batch, into plain integers under one lock; Prometheus
text is made only when somebody asks. Labels are of bounded size: model names and versions, gRPC
codes.
"""

import threading
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from headrace.telemetry.instruments import METRICS

SECONDS_BOUNDS = (
    *(0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01),
    *(0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0),
)
ROWS_BOUNDS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
FEATURE_STATUSES = ("INVALID", "PRESENT", "NULL_VALUE", "NOT_FOUND", "OUTSIDE_MAX_AGE")


class Histogram:
    """Counts in buckets; not safe for several threads at once."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        """Fold in one value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def observe_since(self, starts_s: Sequence[float], end_s: float) -> None:
        """Fold in `end_s` less each of `starts_s`, which ascend: a step per bucket, not per one."""
        first, stop = 0, len(starts_s)
        self.total += stop * end_s - sum(starts_s)
        while first < stop:  # the longest first
            bucket = bisect_left(self.bounds, end_s - starts_s[first])
            if bucket == bisect_left(self.bounds, end_s - starts_s[stop - 1]):
                self.counts[bucket] += stop - first
                return
            # All that are longer than the bucket's lower bound share it.
            after = bisect_left(starts_s, end_s - self.bounds[bucket - 1], first + 1)
            self.counts[bucket] += after - first
            first = after

    def buckets(self) -> list[tuple[str, float]]:
        """Return upper bounds and cumulative counts, as Prometheus takes them."""
        edges = [*(str(bound) for bound in self.bounds), "+Inf"]
        return list(zip(edges, accumulate(self.counts), strict=True))


class QueueNumbers(Protocol):
    """What a model version's queue says of itself."""

    refused_full: int
    refused_late: int
    dropped: int
    shed: int

    def __len__(self) -> int:
        """Return how many requests wait."""


class PaddingNumbers(Protocol):
    """What a backend that fills batches up says of itself."""

    rows_added: int


class OrderNumbers(Protocol):
    """What keeps replies in order says of itself."""

    held: int


class ModelMetrics:
    """Numbers of one model version. Any thread may fold into it."""

    def __init__(self, model: str, version: str) -> None:
        self.labels = [model, version]
        self.queue: QueueNumbers | None = None
        self.padding: PaddingNumbers | None = None
        self.order: OrderNumbers | None = None
        self._lock = threading.Lock()
        self.requests = self.requests_failed = self.batches = 0
        self.request_s = Histogram(SECONDS_BOUNDS)
        self.queue_s = Histogram(SECONDS_BOUNDS)
        self.features_s = Histogram(SECONDS_BOUNDS)
        self.infer_s = Histogram(SECONDS_BOUNDS)
        self.batch_rows = Histogram(ROWS_BOUNDS)
        self.statuses = np.zeros(len(FEATURE_STATUSES), np.int64)

    def answered(
        self,
        *,
        arrivals_s: Sequence[float],
        rows: int,
        started_s: float,
        features_s: float | None,
        infer_s: float,
        finished_s: float,
        statuses: NDArray[np.int64] | None,
    ) -> None:
        """
        Fold in one answered batch.

        Args:
            arrivals_s: When each request arrived, ascending, on `time.perf_counter`'s clock.
            rows: Rows of the batch.
            started_s: When the batch was taken, on that clock.
            features_s: How long its features took; None for a model without features.
            infer_s: How long the model took.
            finished_s: When the last reply was sent, on that clock.
            statuses: How many values there were of each of Feast's status numbers.
        """
        with self._lock:
            self.requests += len(arrivals_s)
            self.batches += 1
            self.request_s.observe_since(arrivals_s, finished_s)
            self.queue_s.observe_since(arrivals_s, started_s)
            self.batch_rows.observe(rows)
            self.infer_s.observe(infer_s)
            if features_s is not None:
                self.features_s.observe(features_s)
            if statuses is not None:
                self.statuses += statuses

    def failed(self, requests: int) -> None:
        """Count requests that reached a batch and got an error."""
        with self._lock:
            self.requests_failed += requests


class AccountNumbers(Protocol):
    """What the callers' accounts say of themselves."""

    refused: int


class SpanNumbers(Protocol):
    """What the span exporter says of itself."""

    exported: int
    dropped: int


class CallNumbers(Protocol):
    """What the call recorder says of itself."""

    dropped: int

    @property
    def exporter(self) -> SpanNumbers | None:
        """Where spans go."""


class PredictionStreamNumbers(Protocol):
    """What the prediction stream says of itself."""

    rows_sent: int
    rows_dropped: int
    rows_refused: int
    is_connected: bool

    @property
    def queued_bytes(self) -> int:
        """Bytes that wait."""


class SkewLogNumbers(Protocol):
    """What the skew log says of itself."""

    rows_written: int
    rows_dropped: int
    rows_failed: int

    @property
    def queued_bytes(self) -> int:
        """Bytes that wait."""

    @property
    def files_deleted(self) -> int:
        """Files removed to make room."""


class Metrics(Collector):
    """All numbers of the process, as Prometheus collects them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._models: dict[tuple[str, str], ModelMetrics] = {}
        self._rpc_errors: dict[tuple[str, str], int] = {}
        self._model_loads: dict[tuple[str, str], int] = {}
        self.open_calls: Callable[[], int] = int
        self.open_streams: Callable[[], int] = int
        self.calls: CallNumbers | None = None
        self.accounts: AccountNumbers | None = None
        self.stream: PredictionStreamNumbers | None = None
        self.more: list[Collector] = []
        """Numbers that others keep."""
        self.skew_log: SkewLogNumbers | None = None

    def model(self, name: str, version: str) -> ModelMetrics:
        """Return the numbers of one model version, the same object each time."""
        with self._lock:
            return self._models.setdefault((name, version), ModelMetrics(name, version))

    def forget(self, name: str, version: str) -> None:
        """Drop the numbers of a version that is out of service: versions come without end."""
        with self._lock:
            self._models.pop((name, version), None)

    def model_load(self, model: str, succeeded: bool) -> None:  # noqa: FBT001 the outcome
        """Count one attempt to load a version."""
        with self._lock:
            key = (model, "ready" if succeeded else "failed")
            self._model_loads[key] = self._model_loads.get(key, 0) + 1

    def rpc_error(self, method: str, code: str) -> None:
        """Count one hot call that ended with an error."""
        with self._lock:
            key = (method, code)
            self._rpc_errors[key] = self._rpc_errors.get(key, 0) + 1

    def collect(self) -> Iterable[Metric]:
        with self._lock:
            models = list(self._models.values())
            rpc_errors = dict(self._rpc_errors)
            model_loads = dict(self._model_loads)
        yield from _model_counters(models)
        yield from _model_histograms(models)
        errors = _counter("headrace_rpc_errors_total", ["method", "code"])
        for key, count in rpc_errors.items():
            errors.add_metric(list(key), count)
        yield errors
        loads = _counter("headrace_model_loads_total", ["model", "result"])
        for key, count in model_loads.items():
            loads.add_metric(list(key), count)
        yield loads
        for gauge, count in (
            ("headrace_rpc_open_calls", self.open_calls()),
            ("headrace_rpc_open_streams", self.open_streams()),
        ):
            yield GaugeMetricFamily(gauge, METRICS[gauge], value=count)
        unread = _counter("headrace_calls_refused_total", ["reason"])
        unread.add_metric(["quota"], 0 if self.accounts is None else self.accounts.refused)
        yield unread
        if self.calls is not None:
            yield from _call_metrics(self.calls)
        if self.stream is not None:
            yield from _stream_metrics(self.stream)
        for collector in self.more:
            yield from collector.collect()
        if self.skew_log is not None:
            yield from _skew_log_metrics(self.skew_log)


_LABELS = ["model", "version"]


def _counter(name: str, labels: Sequence[str] = _LABELS) -> CounterMetricFamily:
    return CounterMetricFamily(name.removesuffix("_total"), METRICS[name], labels=labels)


def _call_metrics(calls: CallNumbers) -> Iterable[Metric]:
    dropped = _counter("headrace_call_records_dropped_total", [])
    dropped.add_metric([], calls.dropped)
    yield dropped
    spans = _counter("headrace_spans_total", ["result"])
    if calls.exporter is not None:
        spans.add_metric(["exported"], calls.exporter.exported)
        spans.add_metric(["dropped"], calls.exporter.dropped)
    yield spans


def _stream_metrics(stream: PredictionStreamNumbers) -> Iterable[Metric]:
    rows = _counter("headrace_stream_rows_total", ["result"])
    rows.add_metric(["sent"], stream.rows_sent)
    rows.add_metric(["dropped"], stream.rows_dropped)
    rows.add_metric(["refused"], stream.rows_refused)
    yield rows
    for name, value in (
        ("headrace_stream_queue_bytes", stream.queued_bytes),
        ("headrace_stream_connected", int(stream.is_connected)),
    ):
        yield GaugeMetricFamily(name, METRICS[name], value=value)


def _skew_log_metrics(log: SkewLogNumbers) -> Iterable[Metric]:
    rows = _counter("headrace_skew_log_rows_total", ["result"])
    rows.add_metric(["written"], log.rows_written)
    rows.add_metric(["dropped"], log.rows_dropped)
    rows.add_metric(["failed"], log.rows_failed)
    yield rows
    queued = "headrace_skew_log_queue_bytes"
    yield GaugeMetricFamily(queued, METRICS[queued], value=log.queued_bytes)
    deleted = _counter("headrace_skew_log_files_deleted_total", [])
    deleted.add_metric([], log.files_deleted)
    yield deleted


def _model_counters(models: Sequence[ModelMetrics]) -> Iterable[Metric]:
    requests = _counter("headrace_requests_total")
    failed = _counter("headrace_requests_failed_total")
    batches = _counter("headrace_batches_total")
    values = _counter("headrace_feature_values_total", [*_LABELS, "status"])
    queue = GaugeMetricFamily(
        "headrace_queue_requests", METRICS["headrace_queue_requests"], labels=_LABELS
    )
    refused = _counter("headrace_requests_refused_total", [*_LABELS, "reason"])
    dropped = _counter("headrace_requests_dropped_total")
    padding = _counter("headrace_padding_rows_total")
    held = GaugeMetricFamily(
        "headrace_replies_held", METRICS["headrace_replies_held"], labels=_LABELS
    )
    shed = _counter("headrace_requests_shed_total")
    for model in models:
        requests.add_metric(model.labels, model.requests)
        if model.order is not None:
            held.add_metric(model.labels, model.order.held)
        if model.padding is not None:
            padding.add_metric(model.labels, model.padding.rows_added)
        failed.add_metric(model.labels, model.requests_failed)
        batches.add_metric(model.labels, model.batches)
        if model.queue is not None:
            queue.add_metric(model.labels, len(model.queue))
            refused.add_metric([*model.labels, "queue_full"], model.queue.refused_full)
            refused.add_metric([*model.labels, "deadline"], model.queue.refused_late)
            dropped.add_metric(model.labels, model.queue.dropped)
            shed.add_metric(model.labels, model.queue.shed)
        for status, count in zip(FEATURE_STATUSES[1:], model.statuses[1:].tolist(), strict=True):
            values.add_metric([*model.labels, status], count)
    return [requests, failed, refused, dropped, shed, batches, padding, values, queue, held]


def _model_histograms(models: Sequence[ModelMetrics]) -> Iterable[Metric]:
    readers: dict[str, Callable[[ModelMetrics], Histogram]] = {
        "headrace_request_seconds": lambda model: model.request_s,
        "headrace_queue_seconds": lambda model: model.queue_s,
        "headrace_features_seconds": lambda model: model.features_s,
        "headrace_infer_seconds": lambda model: model.infer_s,
        "headrace_batch_rows": lambda model: model.batch_rows,
    }
    for name, read in readers.items():
        family = HistogramMetricFamily(name, METRICS[name], labels=_LABELS)
        for model in models:
            histogram = read(model)
            family.add_metric(model.labels, histogram.buckets(), histogram.total)
        yield family
