"""The report: everything the monitor knows, as one JSON document. The page and people read it."""

import math
from datetime import UTC, datetime
from itertools import pairwise
from typing import Any

from headrace.monitoring.counts import ColumnCounts, WindowCounts
from headrace.monitoring.detectors import AlarmState, Signal, psi_excess
from headrace.monitoring.monitor import Monitor, VersionRecord
from headrace.monitoring.profile import (
    CategoricalReference,
    ColumnReference,
    NumericReference,
    ReferenceProfile,
)
from headrace.monitoring.watched import Performance, Window

FORMAT = 1
QUIET_S = 3_600.0
"""A version without rows for so long is shown as quiet, and its alarms are not."""


def report(monitor: Monitor, now_s: float) -> dict[str, Any]:
    """
    Put the report together. Only the thread that owns the monitor may.

    Returns:
        Ready for JSON: no NaN, no infinity. Rates are shares of 1; times are ISO 8601 in UTC.
    """
    versions = sorted(monitor.versions.values(), key=lambda record: (record.model, -record.version))
    return {
        "headrace_report": FORMAT,
        "time": _time(now_s),
        "rows_lost": monitor.rows_lost,
        "predictions_kept": monitor.kept,
        "outcomes": monitor.outcomes._asdict(),
        "versions": [_version(monitor, record, now_s) for record in versions],
    }


def _version(monitor: Monitor, record: VersionRecord, now_s: float) -> dict[str, Any]:
    watched = record.watched
    alarmed = sorted(key for key, state in watched.alarms.items() if state.is_alarmed)
    reference = watched.reference
    if now_s - record.last_rows_s > QUIET_S:
        verdict, alarmed = "quiet", []  # out of service, most likely: nobody can act on it
    elif reference is None:
        verdict = "no reference"
    elif alarmed:
        verdict = "alarm"
    else:
        verdict = "ok" if watched.statistics else "waiting"
    latest = watched.open if not record.windows else record.windows[-1].counts
    return {
        "model": record.model,
        "version": record.version,
        "verdict": verdict,
        "alarms": [{"signal": str(signal), "column": name} for signal, name in alarmed],
        "rows": record.rows,
        "last_rows": _time(record.last_rows_s),
        "open_window": None if watched.open is None else _window(watched.open),
        "windows": [_window(window.counts) for window in record.windows],
        "features": _columns(record, latest, reference, "features"),
        "predictions": _columns(record, latest, reference, "predictions"),
        "performance": _performance(monitor, record),
        "incidents": [
            {
                "id": incident.id,
                "signal": incident.signal,
                "column": incident.subject,
                "opened": _time(incident.opened_s),
                "resolved": None if incident.resolved_s is None else _time(incident.resolved_s),
                "statistic": incident.statistic,
                "threshold": incident.threshold,
            }
            for incident in monitor.incidents(record)
        ],
    }


def _window(counts: WindowCounts) -> dict[str, Any]:
    return {
        "start": _time(counts.start_s),
        "end": _time(counts.end_s),
        "rows": counts.rows,
        "rows_lost": counts.rows_lost,
        "degraded": counts.is_degraded,
    }


def _measured(performance: Performance) -> dict[str, Any]:
    return {
        "kept": performance.kept,
        "labelled": performance.labelled,
        "coverage": performance.coverage,
        "error": performance.error,
        "bias": performance.bias,
    }


def _performance(monitor: Monitor, record: VersionRecord) -> dict[str, Any]:
    reference = record.watched.reference
    now = monitor.performance_of_open(record)
    return {
        "column": None if reference is None else reference.prediction,
        "reference_error": None if reference is None else reference.error,
        "open_window": None if now is None else _measured(now),
        "windows": [
            {"start": _time(start_s), **_measured(performance)}
            for start_s, performance in monitor.performances(record)
        ],
    }


def _columns(
    record: VersionRecord,
    latest: WindowCounts | None,
    reference: ReferenceProfile | None,
    group: str,
) -> list[dict[str, Any]]:
    known = {} if reference is None else getattr(reference, group)
    seen: dict[str, ColumnCounts] = {} if latest is None else getattr(latest, group)
    return [
        _column(record, group, name, known.get(name), seen.get(name))
        for name in dict.fromkeys((*known, *seen))
    ]


def _column(
    record: VersionRecord,
    group: str,
    name: str,
    reference: ColumnReference | None,
    counts: ColumnCounts | None,
) -> dict[str, Any]:
    watched = record.watched
    drift = Signal.DRIFT if group == "features" else Signal.PREDICTION_DRIFT
    signals = (
        (drift, Signal.MISSING, Signal.OUT_OF_RANGE, Signal.STALE)
        if group == "features"
        else (drift, Signal.PREDICTION_MISSING)
    )
    column: dict[str, Any] = {
        "name": name,
        "alarms": [
            str(signal)
            for signal in signals
            if watched.alarms.get((signal, name), AlarmState()).is_alarmed
        ],
        "statistics": {
            str(signal): watched.statistics[signal, name]
            for signal in signals
            if (signal, name) in watched.statistics
        },
    }
    if counts is not None:
        rows = max(1, counts.rows)
        column["current"] = {
            "rows": counts.rows,
            "missing": counts.missing / rows,
            "out_of_range": (counts.below + counts.above + counts.invalid) / rows,
            "stale": counts.stale / rows,
            "bins": counts.bins.tolist(),
            "below": counts.below,
            "above": counts.above,
        }
    if reference is not None:
        rows = max(1, reference.rows)
        column["reference"] = {
            "kind": "numeric" if isinstance(reference, NumericReference) else "categorical",
            "rows": reference.rows,
            "missing": reference.missing / rows,
            "bins": list(reference.counts),
            "labels": _labels(reference),
        }
        column["drift_history"] = [
            _drift(reference, window, group, name) for window in record.windows
        ]
    return column


def _drift(reference: ColumnReference, window: Window, group: str, name: str) -> float | None:
    """Return a column's drift in an ended window; worked out once."""
    key = (group, name)
    if key not in window.drift:
        counts: ColumnCounts | None = getattr(window.counts, group).get(name)
        if counts is None or len(counts.bins) != len(reference.counts):
            window.drift[key] = None  # counted against another reference
        else:
            window.drift[key] = psi_excess(reference, counts)
    return window.drift[key]


def _labels(reference: ColumnReference) -> list[str]:
    if isinstance(reference, CategoricalReference):
        return list(reference.levels)
    edges = reference.edges
    return [
        f"{upper:g}" if i and lower == _just_below(upper) else f"{lower:g} … {upper:g}"
        for i, (lower, upper) in enumerate(pairwise(edges))
    ]


def _just_below(value: float) -> float:
    return math.nextafter(value, -math.inf)


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")
