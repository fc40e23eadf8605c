"""Numbers of requests for features, and of every feature view that is read."""

import threading
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from typing import Any, NamedTuple, Protocol

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

HELD_MAX = 4_096
"""Ages and statuses that wait to be counted, of each combination of views."""

HELD_BATCHES_MAX = 32
"""Batches of them: counting one costs as much as counting many."""

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
    """Of one view: by status, by age, and the ages' sum."""

    statuses: NDArray[np.int64]
    ages: NDArray[np.int64]
    age_sum_s: float


class _Tally:
    """
    What was read of some views together. Batches are kept and counted some at a time.

    Args:
        views: How many views there are.
    """

    def __init__(self, views: int) -> None:
        self._views = views
        self._present: list[tuple[NDArray[np.intp], int]] = []  # each feature's view, and rows
        self._others: list[tuple[NDArray[np.intp], NDArray[np.uint8]]] = []
        self._ages_s: list[NDArray[np.float64]] = []
        self._held = 0
        self._statuses = np.zeros((views, _STATUS_COUNT), np.int64)
        self._ages = np.zeros((views, _AGE_COUNT), np.int64)
        self._age_sums_s = np.zeros(views)

    def add(
        self,
        view_of_feature: NDArray[np.intp],
        statuses: NDArray[np.uint8] | None,
        ages_s: NDArray[np.float64],
    ) -> None:
        """Fold in a batch, as `ViewMetrics.read` takes it."""
        self._ages_s.append(ages_s)
        self._held += ages_s.size
        if statuses is not None:
            self._others.append((view_of_feature, statuses))
            self._held += statuses.size
        else:
            rows = ages_s.shape[1]
            if self._present and self._present[-1][0] is view_of_feature:
                rows += self._present.pop()[1]
            self._present.append((view_of_feature, rows))
        if self._held >= HELD_MAX or len(self._ages_s) >= HELD_BATCHES_MAX:
            self._count()

    def counts(self) -> Iterable[_Counts]:
        """Return what was counted of each view."""
        self._count()
        sums_s = self._age_sums_s.tolist()
        return [_Counts(*of) for of in zip(self._statuses, self._ages, sums_s, strict=True)]

    def _count(self) -> None:
        for view_of_feature, rows in self._present:
            features = np.bincount(view_of_feature, minlength=self._views)
            self._statuses[:, _PRESENT] += features * rows
        for view_of_feature, statuses in self._others:
            self._statuses += _by_view(statuses, view_of_feature, self._views, _STATUS_COUNT)
        if self._ages_s:
            ages_s = np.concatenate(self._ages_s, 1)
            is_unknown = np.isnan(ages_s)
            buckets = np.searchsorted(_AGE_BOUNDS, ages_s)
            buckets += is_unknown  # they are in the last one, and go to the one after it
            each = np.arange(self._views)
            self._ages += _by_view(buckets, each, self._views, _AGE_COUNT + 1)[:, :-1]
            self._age_sums_s += np.where(is_unknown, 0.0, ages_s).sum(1)
        self._present.clear()
        self._others.clear()
        self._ages_s.clear()
        self._held = 0


def _by_view(
    numbers: NDArray[Any], view_of_row: NDArray[np.intp], views: int, count: int
) -> NDArray[np.int64]:
    """Count small numbers, a row of them for something of a view: shape (views, count)."""
    places = numbers + (view_of_row * count)[:, None]
    return np.bincount(places.ravel(), minlength=views * count).reshape(views, count)


class ViewMetrics(Collector):
    """Statuses and ages of what is read, by feature view. Any thread may fold into it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # By the views that are read together, so that a batch is a few entries of lists.
        self._tallies: dict[tuple[str, ...], _Tally] = {}
        self._totals: dict[str, _Counts] = {}

    def read(
        self,
        views: tuple[str, ...],
        view_of_feature: NDArray[np.intp],
        statuses: NDArray[np.uint8] | None,
        ages_s: NDArray[np.float64],
    ) -> None:
        """
        Fold in what a batch read. The arrays may be kept for some batches.

        Args:
            views: The names under which the store holds them.
            view_of_feature: Each feature's place in `views`.
            statuses: Feast's status numbers, shape (features, n); None when all are PRESENT.
            ages_s: Shape (views, n); NaN where nothing was found.
        """
        with self._lock:
            tally = self._tallies.get(views)
            if tally is None:
                if len(self._tallies) >= COMBINATIONS_MAX:  # callers may select as they like
                    self._add_up()
                tally = self._tallies[views] = _Tally(len(views))
            tally.add(view_of_feature, statuses, ages_s)

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
                list(zip(_EDGES, accumulate(counts.ages.tolist()), strict=True)),
                counts.age_sum_s,
            )
        return [values, ages]

    def _add_up(self) -> None:
        """Add up what was read of each view, whatever it was read together with."""
        for views, tally in self._tallies.items():
            for view, own in zip(views, tally.counts(), strict=True):
                before = self._totals.get(view)
                if before is None:
                    self._totals[view] = own
                    continue
                self._totals[view] = _Counts(
                    before.statuses + own.statuses,
                    before.ages + own.ages,
                    before.age_sum_s + own.age_sum_s,
                )
        self._tallies.clear()


_PRESENT = FEATURE_STATUSES.index("PRESENT")
_AGE_BOUNDS = np.array(AGE_BOUNDS_S)
_EDGES = [*(str(bound) for bound in AGE_BOUNDS_S), "+Inf"]
