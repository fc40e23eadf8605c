"""The report: everything the monitor knows, as one JSON document. The page and people read it."""

from datetime import UTC, datetime
from itertools import pairwise
from typing import Any

import numpy as np

from headrace.monitoring.counts import ColumnCounts, WindowCounts
from headrace.monitoring.detectors import AlarmState, Signal, psi_excess, rows_needed
from headrace.monitoring.judgement import Performance
from headrace.monitoring.monitor import Monitor
from headrace.monitoring.profile import (
    CategoricalReference,
    ColumnReference,
    NumericReference,
)
from headrace.monitoring.version import WINDOWS_SHOWN, VersionRecord, Window

FORMAT = 1
QUIET_S = 3_600.0
"""A version without rows for so long is shown as quiet."""


def report(monitor: Monitor, now_s: float, *, has_history: bool = True) -> dict[str, Any]:
    """
    Put the report together. Only the thread that owns the monitor may.

    Args:
        monitor: What is known.
        now_s: Unix seconds.
        has_history: Whether windows, incidents and drift of before are in it. They are most of the
            work, and metrics need none of them.

    Returns:
        Ready for JSON: no NaN, no infinity. Rates are shares of 1; times are ISO 8601 in UTC.
    """
    versions = sorted(monitor.versions.values(), key=lambda record: (record.model, -record.version))
    return {
        "headrace_report": FORMAT,
        "time": _time(now_s),
        "rows_lost": monitor.rows_lost,
        "predictions_kept": monitor.outcomes.kept,
        "predictions_not_kept": monitor.outcomes.not_kept,
        "outcomes": monitor.outcomes.reported._asdict(),
        "versions": [
            {
                **_version(record, now_s, has_history=has_history),
                "performance": _performance(monitor, record, has_history=has_history),
                **(_history(monitor, record) if has_history else {}),
            }
            for record in versions
        ],
    }


def _version(record: VersionRecord, now_s: float, *, has_history: bool) -> dict[str, Any]:
    watched = record.watched
    reference, alarmed = watched.reference, watched.judgement.alarmed
    if now_s - record.last_rows_s > QUIET_S:
        verdict = "quiet"
    elif reference is None:
        verdict = "no reference"
    elif alarmed:
        verdict = "alarm"
    else:
        verdict = "ok" if watched.judgement.statistics else "waiting"
    latest = _latest(record)
    columns = {
        group: [
            _column(record, group, name, known.get(name), seen.get(name), has_history=has_history)
            for name in dict.fromkeys((*known, *seen))
        ]
        for group, known, seen in (
            ("features", reference.features if reference else {}, latest.features),
            ("predictions", reference.predictions if reference else {}, latest.predictions),
        )
    }
    return {
        "model": record.model,
        "version": record.version,
        "verdict": verdict,
        "alarms": [{"signal": str(signal), "column": name} for signal, name in alarmed],
        "rows": record.rows,
        "last_rows": _time(record.last_rows_s),
        "reference": watched.digest or None,
        "unmatched": {
            "in_profile": list(watched.unmatched.in_profile),
            "in_rows": list(watched.unmatched.in_rows),
        },
        "open_window": None if watched.open is None else _window(watched.open),
        **columns,
    }


def _history(monitor: Monitor, record: VersionRecord) -> dict[str, Any]:
    return {
        "windows": [_window(window.counts) for window in record.windows],
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


def _latest(record: VersionRecord) -> WindowCounts:
    """Return the last window in the bins of the present reference, an ended one if there is one."""
    watched = record.watched
    for window in reversed(record.windows):
        if window.counts.reference == watched.digest:
            return window.counts
    return watched.open or WindowCounts(0, 0)


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
        "outcomes_of_zero": performance.undefined,
    }


def _performance(monitor: Monitor, record: VersionRecord, *, has_history: bool) -> dict[str, Any]:
    reference = record.watched.reference
    now = monitor.performance_of_open(record) if has_history else None
    return {
        "column": None if reference is None else reference.prediction,
        "reference_error": None if reference is None else reference.error,
        "open_window": None if now is None else _measured(now),
        "windows": [
            {"start": _time(start_s), **_measured(performance)}
            for start_s, performance in monitor.performances(
                record, WINDOWS_SHOWN if has_history else 1
            )
        ],
    }


def _column(
    record: VersionRecord,
    group: str,
    name: str,
    reference: ColumnReference | None,
    counts: ColumnCounts | None,
    *,
    has_history: bool,
) -> dict[str, Any]:
    judgement = record.watched.judgement
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
            if judgement.alarms.get((signal, name), AlarmState()).is_alarmed
        ],
        "statistics": {
            str(signal): judgement.statistics[signal, name]
            for signal in signals
            if (signal, name) in judgement.statistics
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
        waiting = judgement.rolled_up.get((drift, name))
        column["reference"] = {
            "kind": "numeric" if isinstance(reference, NumericReference) else "categorical",
            "rows": reference.rows,
            "missing": reference.missing / rows,
            "bins": list(reference.counts),
            "labels": _labels(reference),
        }
        column["drift_values"] = {
            "needed": rows_needed(reference),
            "waiting": 0 if waiting is None else waiting.counts.present,
            "windows": 0 if waiting is None else waiting.windows,
        }
        if has_history:
            column["drift_history"] = [
                _drift(reference, window, group, name, record.watched.digest)
                for window in record.windows
            ]
    return column


def _drift(
    reference: ColumnReference, window: Window, group: str, name: str, digest: str
) -> float | None:
    """Return a column's drift in an ended window; None where its values say too little of it."""
    if window.counts.reference != digest:
        return None
    key = (group, name)
    if key not in window.drift:
        counts: ColumnCounts | None = getattr(window.counts, group).get(name)
        needed = rows_needed(reference)
        is_known = counts is not None and needed is not None and counts.present >= needed
        window.drift[key] = psi_excess(reference, counts) if is_known and counts else None
    return window.drift[key]


def _labels(reference: ColumnReference) -> list[str]:
    if isinstance(reference, CategoricalReference):
        return list(reference.levels)
    edges = reference.edges
    return [
        f"{upper:g}" if i and lower >= _just_below(upper) else f"{lower:g} … {upper:g}"
        for i, (lower, upper) in enumerate(pairwise(edges))
    ]


def _just_below(value: float) -> float:
    return float(np.nextafter(np.float32(value), np.float32(-np.inf)))


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")
