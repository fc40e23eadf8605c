"""Numbers of requests for features, and of every feature view that is read."""

import threading
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from typing import NamedTuple, Protocol

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
from headrace.telemetry.metrics import (
    FEATURE_STATUSES,
    ROWS_BOUNDS,
    SECONDS_BOUNDS,
    Histogram,
    QueueNumbers,
)

AGE_BOUNDS_S = (
    *(1.0, 10.0, 60.0, 300.0, 900.0, 3600.0, 21_600.0),
    *(86_400.0, 172_800.0, 604_800.0, 2_592_000.0, 31_536_000.0),
)
COMBINATIONS_MAX = 1_024
"""Of views that are read together, until they are added up."""

_STATUS_COUNT = len(FEATURE_STATUSES)
_AGE_COUNT = len(AGE_BOUNDS_S) + 1


class FeatureReadMetrics(Collector):
    """Numbers of requests for features. Any thread may fold into it."""

    def __init__(self) -> None:
        self.queues: Sequence[QueueNumbers] = ()
        self._lock = threading.Lock()
        self._requests = self._requests_failed = 0
        self._request_s = Histogram(SECONDS_BOUNDS)
        self._read_s = Histogram(SECONDS_BOUNDS)
        self._batch_rows = Histogram(ROWS_BOUNDS)

    def answered(
        self, *, arrivals_s: Sequence[float], rows: int, read_s: float, finished_s: float
    ) -> None:
        """
        Fold in one answered batch.

        Args:
            arrivals_s: When each request arrived, ascending, on `time.perf_counter`'s clock.
            rows: Rows of the batch.
            read_s: How long finding, reading and decoding them took.
            finished_s: When the last reply was sent, on that clock.
        """
        with self._lock:
            self._requests += len(arrivals_s)
            self._request_s.observe_since(arrivals_s, finished_s)
            self._read_s.observe(read_s)
            self._batch_rows.observe(rows)

    def failed(self, requests: int) -> None:
        """Count requests that reached a batch and got an error."""
        with self._lock:
            self._requests_failed += requests

    def collect(self) -> Iterable[Metric]:
        """Make Prometheus' numbers of it."""
        for name, count in (
            ("headrace_feature_requests_total", self._requests),
            ("headrace_feature_requests_failed_total", self._requests_failed),
        ):
            yield CounterMetricFamily(name.removesuffix("_total"), METRICS[name], value=count)
        name = "headrace_feature_queue_requests"
        yield GaugeMetricFamily(name, METRICS[name], value=sum(map(len, self.queues)))
        name = "headrace_feature_requests_shed_total"
        shed = sum([queue.shed for queue in self.queues])
        yield CounterMetricFamily(name.removesuffix("_total"), METRICS[name], value=shed)
        with self._lock:
            histograms = [
                (name, histogram.buckets(), histogram.total)
                for name, histogram in (
                    ("headrace_feature_request_seconds", self._request_s),
                    ("headrace_feature_read_seconds", self._read_s),
                    ("headrace_feature_batch_rows", self._batch_rows),
                )
            ]
        for name, buckets, total in histograms:
            yield HistogramMetricFamily(name, METRICS[name], buckets=buckets, sum_value=total)


class StoreNumbers(Protocol):
    """What an online store says of itself."""

    @property
    def mismatches(self) -> int: ...

    @property
    def cache_hits(self) -> int: ...

    @property
    def cache_misses(self) -> int: ...

    @property
    def cache_invalidations(self) -> int: ...

    def is_held_off(self) -> bool: ...


class StoreMetrics(Collector):
    """
    Numbers of the online store.

    Args:
        store: The store.
        is_readable: Whether it answered when it was last looked at.
    """

    def __init__(self, store: StoreNumbers, is_readable: Callable[[], bool]) -> None:
        self._store = store
        self._is_readable = is_readable

    def collect(self) -> Iterable[Metric]:
        """Make Prometheus' numbers of it."""
        for name, holds in (
            ("headrace_feature_store_readable", self._is_readable()),
            ("headrace_feature_store_held_off", self._store.is_held_off()),
        ):
            yield GaugeMetricFamily(name, METRICS[name], value=int(holds))
        for name, count in (
            ("headrace_stored_value_mismatches_total", self._store.mismatches),
            ("headrace_feature_cache_hits_total", self._store.cache_hits),
            ("headrace_feature_cache_misses_total", self._store.cache_misses),
            ("headrace_feature_cache_invalidations_total", self._store.cache_invalidations),
        ):
            yield CounterMetricFamily(name.removesuffix("_total"), METRICS[name], value=count)


class RegistryNumbers(Protocol):
    """What the registry's watch says of itself."""

    is_readable: bool
    reads: int
    failures: int


class RegistryMetrics(Collector):
    """
    Numbers of the feature registry.

    Args:
        watch: Reads it.
    """

    def __init__(self, watch: RegistryNumbers) -> None:
        self._watch = watch

    def collect(self) -> Iterable[Metric]:
        """Make Prometheus' numbers of it."""
        name = "headrace_registry_readable"
        yield GaugeMetricFamily(name, METRICS[name], value=int(self._watch.is_readable))
        name = "headrace_registry_reads_total"
        reads = CounterMetricFamily(name.removesuffix("_total"), METRICS[name], labels=["result"])
        reads.add_metric(["changed"], self._watch.reads)
        reads.add_metric(["failed"], self._watch.failures)
        yield reads


class _Counts(NamedTuple):
    """Of some views: by status, by age, and the ages' sums."""

    statuses: NDArray[np.int64]
    ages: NDArray[np.int64]
    age_sums_s: NDArray[np.float64]


class ViewMetrics(Collector):
    """Statuses and ages of what is read, by feature view. Any thread may fold into it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # By the views that are read together, so that a batch is a few additions of arrays.
        self._counts: dict[tuple[str, ...], _Counts] = {}
        self._totals: dict[str, _Counts] = {}

    def read(
        self,
        views: tuple[str, ...],
        view_of_feature: NDArray[np.intp],
        statuses: NDArray[np.uint8],
        ages_s: NDArray[np.float64],
    ) -> None:
        """
        Fold in what a batch read.

        Args:
            views: The names under which the store holds them.
            view_of_feature: Each feature's place in `views`.
            statuses: Feast's status numbers, shape (features, n).
            ages_s: Shape (views, n); NaN where nothing was found.
        """
        places = statuses + (view_of_feature * _STATUS_COUNT)[:, None]
        by_status = np.bincount(places.ravel(), minlength=len(views) * _STATUS_COUNT)
        buckets = np.searchsorted(_AGE_BOUNDS, ages_s)
        buckets += (np.arange(len(views)) * (_AGE_COUNT + 1))[:, None]
        is_unknown = np.isnan(ages_s)
        if is_unknown.any():
            buckets += is_unknown  # they are in the last bucket; the one after it is nobody's
            sums_s = np.where(is_unknown, 0.0, ages_s).sum(1)
        else:
            sums_s = ages_s.sum(1)
        by_age = np.bincount(buckets.ravel(), minlength=len(views) * (_AGE_COUNT + 1))
        with self._lock:
            counts = self._counts.get(views)
            if counts is None:
                if len(self._counts) >= COMBINATIONS_MAX:  # callers may select as they like
                    self._add_up()
                counts = self._counts[views] = _Counts(
                    np.zeros(len(views) * _STATUS_COUNT, np.int64),
                    np.zeros(len(views) * (_AGE_COUNT + 1), np.int64),
                    np.zeros(len(views)),
                )
            counts.statuses[:] += by_status
            counts.ages[:] += by_age
            counts.age_sums_s[:] += sums_s

    def collect(self) -> Iterable[Metric]:
        """Make Prometheus' numbers of it."""
        with self._lock:
            self._add_up()
            totals = dict(sorted(self._totals.items()))
        name = "headrace_view_values_total"
        values = CounterMetricFamily(
            name.removesuffix("_total"), METRICS[name], labels=["view", "status"]
        )
        name = "headrace_view_age_seconds"
        ages = HistogramMetricFamily(name, METRICS[name], labels=["view"])
        for view, counts in totals.items():
            for status, count in zip(
                FEATURE_STATUSES[1:], counts.statuses[1:].tolist(), strict=True
            ):
                values.add_metric([view, status], count)
            ages.add_metric(
                [view],
                list(zip(_EDGES, accumulate(counts.ages[:-1].tolist()), strict=True)),
                float(counts.age_sums_s[0]),
            )
        return [values, ages]

    def _add_up(self) -> None:
        """Add up what was read of each view, whatever it was read together with."""
        for views, counts in self._counts.items():
            parts = zip(
                views,
                counts.statuses.reshape(len(views), -1),
                counts.ages.reshape(len(views), -1),
                counts.age_sums_s[:, None],
                strict=True,
            )
            for view, *own in parts:
                before = self._totals.get(view, (0, 0, 0.0))
                self._totals[view] = _Counts(
                    *(old + new for old, new in zip(before, own, strict=True))
                )
        self._counts.clear()


_AGE_BOUNDS = np.array(AGE_BOUNDS_S)
_EDGES = [*(str(bound) for bound in AGE_BOUNDS_S), "+Inf"]
