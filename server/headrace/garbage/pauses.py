"""How long collections stop everybody, measured where the interpreter says that one begins."""

import time
from collections.abc import Iterable, Mapping
from typing import Any

from prometheus_client.core import HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from headrace.telemetry.instruments import METRICS
from headrace.telemetry.metrics import SECONDS_BOUNDS, Histogram

_NAME = "headrace_gc_pause_seconds"
_GENERATIONS = ("young", "middle", "old")


class Pauses(Collector):
    """
    The pauses of a process, whoever began the collection.

    `on_gc` goes into `gc.callbacks`. It takes no lock: a collection may begin at any allocation, in
    a thread that holds that very lock. None is needed, since one collection excludes another.
    """

    def __init__(self) -> None:
        self._histograms = tuple(Histogram(SECONDS_BOUNDS) for _ in _GENERATIONS)
        self._began_s: float | None = None

    def on_gc(self, phase: str, info: Mapping[str, Any]) -> None:
        """Note that a collection begins or ends; Source: Python, `gc.callbacks`."""
        if phase == "start":
            self._began_s = time.perf_counter()
        elif self._began_s is not None:
            self._histograms[info["generation"]].observe(time.perf_counter() - self._began_s)
            self._began_s = None

    def collect(self) -> Iterable[Metric]:
        """Make Prometheus' numbers of it."""
        family = HistogramMetricFamily(_NAME, METRICS[_NAME], labels=["generation"])
        for name, histogram in zip(_GENERATIONS, self._histograms, strict=True):
            family.add_metric([name], histogram.buckets(), histogram.total)
        yield family
