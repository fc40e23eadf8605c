"""The monitor's metrics. They are read off the monitor by its own thread, when somebody asks."""

from collections.abc import Callable, Iterable
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

METRICS: dict[str, str] = {
    "headrace_monitor_rows_total": "Rows counted since the monitor started.",
    "headrace_monitor_rows_lost_total": "Rows that were answered and never came.",
    "headrace_monitor_predictions_kept": "Predictions that outcomes can be joined to.",
    "headrace_monitor_predictions_not_kept_total": "Predictions that there was no place for.",
    "headrace_monitor_outcomes_total": "Outcomes reported, by what became of them.",
    "headrace_monitor_alarm": "1 while an incident is open, by signal and column.",
    "headrace_monitor_psi_excess": "PSI of the last judged window, less its mean without drift.",
    "headrace_monitor_missing_ratio": "Share of missing values in the last window.",
    "headrace_monitor_out_of_range_ratio": "Share of values out of the reference's range.",
    "headrace_monitor_stale_ratio": "Share of values found and too old.",
    "headrace_monitor_error_ratio": "Median relative error of the last window with outcomes.",
    "headrace_monitor_label_coverage_ratio": "Share of its kept predictions with an outcome.",
    "headrace_monitor_webhook_total": "Notices posted, by result.",
    "headrace_monitor_queue_messages": "Messages that wait to be counted.",
}
"""Name and help. `docs/monitoring.md` lists the same."""

_VERSION = ["model", "version"]
_COLUMN = [*_VERSION, "kind", "column"]
"""A feature and an output may have one name: `kind` tells them apart."""


class MonitorMetrics(Collector):
    """
    Makes metrics of a report.

    Args:
        report: Returns it; it needs no history.
        webhook: Returns (delivered, given up).
        waiting: Returns how many messages wait.
    """

    def __init__(
        self,
        report: Callable[[], dict[str, Any]],
        webhook: Callable[[], tuple[int, int]],
        waiting: Callable[[], int],
    ) -> None:
        self._report = report
        self._webhook = webhook
        self._waiting = waiting

    def describe(self) -> Iterable[Metric]:
        """Say nothing: asking would need the monitor's thread, which may not run yet."""
        return []

    def collect(self) -> Iterable[Metric]:
        document = self._report()
        families = {name: _family(name) for name in METRICS}
        families["headrace_monitor_rows_lost_total"].add_metric([], document["rows_lost"])
        families["headrace_monitor_predictions_kept"].add_metric([], document["predictions_kept"])
        families["headrace_monitor_predictions_not_kept_total"].add_metric(
            [], document["predictions_not_kept"]
        )
        families["headrace_monitor_queue_messages"].add_metric([], self._waiting())
        for result, count in document["outcomes"].items():
            families["headrace_monitor_outcomes_total"].add_metric([result], count)
        for result, count in zip(("delivered", "given_up"), self._webhook(), strict=True):
            families["headrace_monitor_webhook_total"].add_metric([result], count)
        for version in document["versions"]:
            _add_version(families, version)
        return families.values()


def _add_version(families: dict[str, Any], version: dict[str, Any]) -> None:
    labels = [version["model"], str(version["version"])]
    families["headrace_monitor_rows_total"].add_metric(labels, version["rows"])
    for alarm in version["alarms"]:
        families["headrace_monitor_alarm"].add_metric(
            [*labels, alarm["column"], alarm["signal"]], 1
        )
    for kind, column in (
        *(("feature", column) for column in version["features"]),
        *(("prediction", column) for column in version["predictions"]),
    ):
        of = [*labels, kind, column["name"]]
        statistics = column["statistics"]
        psi = statistics.get("drift", statistics.get("prediction_drift"))
        if psi is not None:
            families["headrace_monitor_psi_excess"].add_metric(of, psi)
        current = column.get("current", {})
        for rate in ("missing", "out_of_range", "stale"):
            if rate in current:
                families[f"headrace_monitor_{rate}_ratio"].add_metric(of, current[rate])
    known = version["performance"]["windows"]
    if known:
        last = known[-1]
        families["headrace_monitor_label_coverage_ratio"].add_metric(labels, last["coverage"])
        if last["error"] is not None:
            families["headrace_monitor_error_ratio"].add_metric(labels, last["error"])


def _family(name: str) -> Any:
    labels = {
        "headrace_monitor_rows_total": _VERSION,
        "headrace_monitor_error_ratio": _VERSION,
        "headrace_monitor_label_coverage_ratio": _VERSION,
        "headrace_monitor_outcomes_total": ["result"],
        "headrace_monitor_webhook_total": ["result"],
        "headrace_monitor_alarm": [*_VERSION, "column", "signal"],
        "headrace_monitor_rows_lost_total": [],
        "headrace_monitor_predictions_kept": [],
        "headrace_monitor_predictions_not_kept_total": [],
        "headrace_monitor_queue_messages": [],
    }.get(name, _COLUMN)
    if name.endswith("_total"):
        return CounterMetricFamily(name.removesuffix("_total"), METRICS[name], labels=labels)
    return GaugeMetricFamily(name, METRICS[name], labels=labels)
