"""Numbers of several workers as one page.

Counters and histograms are summed, gauges combined as `telemetry.instruments.GAUGES` says. What a
worker had counted stays when it has ended and another counts from zero, so that no sum falls.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from headrace.telemetry.instruments import GAUGES, METRICS

Page = list[list[Any]]
"""Families as JSON has them: [name, type, help, [[sample, {label: value}, number], …]]."""

_Series = tuple[str, str, tuple[tuple[str, str], ...]]
"""Family, sample, labels in order."""

_COMBINE: Mapping[str, Callable[[float, float], float]] = {
    "sum": lambda one, other: one + other,
    "min": min,
    "max": max,
}


def page_of(families: Iterable[Metric]) -> Page:
    """Write down what a process has collected."""
    return [
        [
            family.name,
            family.type,
            family.documentation,
            [[sample.name, sample.labels, sample.value] for sample in family.samples],
        ]
        for family in families
    ]


def supervisor_families(ready: int, restarts: Mapping[int, int]) -> list[Metric]:
    """
    Return the supervisor's own numbers.

    Args:
        ready: How many workers are.
        restarts: By worker, all that there should be.
    """
    name = "headrace_worker_restarts_total"
    replaced = CounterMetricFamily(name.removesuffix("_total"), METRICS[name], labels=["worker"])
    for worker, times in restarts.items():
        replaced.add_metric([str(worker)], times)
    gauges = {"headrace_workers": len(restarts), "headrace_workers_ready": ready}
    return [
        *(GaugeMetricFamily(name, METRICS[name], value=value) for name, value in gauges.items()),
        replaced,
    ]


class Ledger:
    """
    The last page of each worker, and what those before them had counted. One thread's own.

    Args:
        workers: How many there are; they are numbered from 1.
    """

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._pages: dict[int, Page] = {}
        self._counted: dict[int, dict[_Series, float]] = {}
        self._kept: dict[_Series, float] = {}
        self._families: dict[str, tuple[str, str]] = {}

    def report(self, worker: int, page: Page) -> None:
        """Take a worker's page in place of its last one."""
        counted: dict[_Series, float] = {}
        for name, kind, documentation, samples in page:
            self._families[name] = (kind, documentation)
            if kind != "gauge":
                for sample, labels, number in samples:
                    counted[name, sample, tuple(sorted(labels.items()))] = number
        # A version that has gone out of service here may still serve elsewhere.
        self._keep(self._counted.get(worker, {}), but=counted)
        self._pages[worker] = page
        self._counted[worker] = counted
        if len(self._pages) == self._workers:
            self._forget_versions()

    def ended(self, worker: int) -> None:
        """Keep what a worker had counted when it was last asked."""
        self._pages.pop(worker, None)
        self._keep(self._counted.pop(worker, {}), but={})

    def together(self, present: Iterable[int]) -> list[Metric]:
        """
        Return one page of all workers.

        Args:
            present: Those that have just answered. Of the others only what they had counted is in.
        """
        families = self._empty_families()
        sums = dict(self._kept)
        for counted in self._counted.values():
            for series, number in counted.items():
                sums[series] = sums.get(series, 0.0) + number
        for worker in present:
            for name, kind, _, samples in self._pages.get(worker, []):
                if kind != "gauge":
                    continue
                combine = _COMBINE[GAUGES.get(name, "sum")]
                for sample, labels, number in samples:
                    series = (name, sample, tuple(sorted(labels.items())))
                    sums[series] = combine(sums[series], number) if series in sums else number
        for (name, sample, labels), number in sums.items():
            families[name].add_sample(sample, dict(labels), number)
        return list(families.values())

    def one_by_one(self, present: Iterable[int]) -> list[Metric]:
        """Return a page on which each series has a label `worker`."""
        families = self._empty_families()
        for worker in present:
            for name, _, _, samples in self._pages.get(worker, []):
                for sample, labels, number in samples:
                    families[name].add_sample(sample, {"worker": str(worker), **labels}, number)
        return list(families.values())

    def _empty_families(self) -> dict[str, Metric]:
        return {
            name: Metric(name, documentation, kind)
            for name, (kind, documentation) in self._families.items()
        }

    def _keep(self, counted: Mapping[_Series, float], but: Mapping[_Series, float]) -> None:
        for series, number in counted.items():
            if series not in but:
                self._kept[series] = self._kept.get(series, 0.0) + number

    def _forget_versions(self) -> None:
        """Drop what was counted of versions that no worker serves: versions come without end."""
        serving = {
            version
            for counted in self._counted.values()
            for series in counted
            if (version := _version(series[2])) is not None
        }
        self._kept = {
            series: number
            for series, number in self._kept.items()
            if (version := _version(series[2])) is None or version in serving
        }


def _version(labels: Sequence[tuple[str, str]]) -> tuple[str, str] | None:
    found = dict(labels)
    return (found.get("model", ""), found["version"]) if "version" in found else None
