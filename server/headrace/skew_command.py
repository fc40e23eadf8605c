"""`headrace features skew`: what was served against what the offline store has for that moment."""

import json
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
from rich.console import Console
from rich.table import Table
from rich.text import Text

from headrace.errors import StartupError
from headrace.features.logged_plan import LoggedFeature, LoggedPlan
from headrace.features.offline import FeastOffline
from headrace.features.repo import open_feature_repo
from headrace.features.skew import Example, FeatureTally, compare
from headrace.features.skew_file import FILE_PATTERN, files_of
from headrace.features.skew_reader import chunks, scan
from headrace.features.skew_values import Tolerance
from headrace.terminal import open_console, printable

PROGRESS_PERIOD_S = 5.0

READS = "feature reads"
"""What served a row that no model saw, for people."""

BY_REFERENCE = "features by reference"
"""What was selected without a feature service, likewise."""


@dataclass(slots=True)
class ServiceReport:
    """
    What was found out about one feature service.

    Args:
        service: Its name; empty for features that were selected by reference.
        rows: That were read from the log.
        first_us: Earliest request, Unix microseconds.
        last_us: Latest one.
        models: Names and versions of those that were served, `READS` among them.
        registry_versions: Under which they were.
        tallies: By feature and view.
        gone: Logged features that the registry no longer has, or that code computes.
    """

    service: str
    rows: int = 0
    first_us: int = 0
    last_us: int = 0
    models: set[str] = field(default_factory=set)
    registry_versions: set[str] = field(default_factory=set)
    tallies: dict[tuple[str, str], FeatureTally] = field(default_factory=dict)
    gone: set[str] = field(default_factory=set)

    def skewed(self, max_mismatch_share: float) -> list[FeatureTally]:
        """Return the features that mismatch more often than they may."""
        return [of for of in self.tallies.values() if of.mismatch_share > max_mismatch_share]

    def late(self, max_late_share: float) -> list[FeatureTally]:
        """Return the features that are late more often than they may be."""
        return [of for of in self.tallies.values() if of.late_share > max_late_share]


def skew(
    log: Path,
    feature_repo: Path,
    *,
    service: str | None,
    since_s: float | None,
    tolerance: tuple[float, float],
    max_mismatch_share: float,
    max_late_share: float,
    chunk_rows: int,
    as_json: bool,
) -> int:
    """
    Compare a skew log with the offline store and show what differs.

    Args:
        log: Folder of the log.
        feature_repo: Feast feature repository, applied.
        service: This feature service only.
        since_s: Older requests are left out, Unix seconds.
        tolerance: Relative and absolute, for floating point.
        max_mismatch_share: Of a feature's compared rows.
        max_late_share: Likewise.
        chunk_rows: Most rows that are in memory, and that the offline store is asked for, at once.
        as_json: For machines.

    Returns:
        0 when no feature mismatches, or is late, more often than it may, else 1.

    Raises:
        StartupError: the log or the feature repository cannot be read, the offline store fails, or
            there is nothing to compare.
    """
    if not log.is_dir():
        raise StartupError(f"--log {log}: no such folder")
    files, unreadable = scan(log, service, since_s)
    for path in unreadable:
        _say_damaged(path)
    if not files:
        raise StartupError(f"--log {log}: {_nothing(log, len(unreadable))}")
    damaged: set[Path] = set()

    def on_damage(path: Path) -> None:
        damaged.add(path)
        _say_damaged(path)

    try:
        offline = open_feature_repo(feature_repo).offline_features()
        parts = chunks(files, chunk_rows, since_s, on_damage)
        total = sum(file.rows for file in files)
        reports = _compared(parts, total, offline, Tolerance(*tolerance))
    except StartupError:
        raise
    except KeyboardInterrupt:  # it must not look like an answer
        raise StartupError("interrupted") from None
    except Exception as error:
        text = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise StartupError(f"cannot compare: {type(error).__name__}: {text}") from error
    if not any(of.compared for report in reports for of in report.tallies.values()):
        raise StartupError(f"--log {log}: nothing to compare: {_why(reports)}")
    console = open_console(as_json=as_json)
    if as_json:
        bad = len(unreadable) + len(damaged)
        document = _as_json(reports, (max_mismatch_share, max_late_share), len(files), bad)
        console.print(json.dumps(document, allow_nan=False))
    else:
        for report in reports:
            _show(console, report, max_mismatch_share, max_late_share)
    return int(any(of.skewed(max_mismatch_share) or of.late(max_late_share) for of in reports))


def _say_damaged(path: Path) -> None:
    print(
        f"headrace features: {printable(str(path))} is no file of a skew log, or damaged",
        file=sys.stderr,
    )


def _nothing(log: Path, unreadable: int) -> str:
    if unreadable:
        return "none of its files can be read"
    if next(files_of(log), None) is None:
        return f"it has no files of a skew log ({FILE_PATTERN}), or none was written yet"
    return "nothing to compare with these filters"


def _why(reports: Sequence[ServiceReport]) -> str:
    """Say why no row could be compared."""
    gone = sorted({name for report in reports for name in report.gone})
    if gone and not any(report.tallies for report in reports):
        return f"the registry no longer has {printable(', '.join(gone))}; was it applied anew?"
    return "neither store has a value in any row"


def _compared(
    parts: Iterable[tuple[LoggedPlan, Any]], total: int, offline: FeastOffline, tolerance: Tolerance
) -> list[ServiceReport]:
    reports: dict[str, ServiceReport] = {}
    done = 0
    said_s = time.monotonic()
    for plan, rows in parts:
        report = reports.setdefault(plan.service, ServiceReport(plan.service))
        compare(plan, rows, offline, tolerance, _tallies(report, plan, offline))
        _note(report, rows)
        done += len(rows)
        if time.monotonic() - said_s >= PROGRESS_PERIOD_S:
            said_s = time.monotonic()
            print(f"headrace features: {done:,} of {total:,} rows compared", file=sys.stderr)
    return sorted(reports.values(), key=lambda report: report.service)


def _tallies(
    report: ServiceReport, plan: LoggedPlan, offline: FeastOffline
) -> Mapping[LoggedFeature, FeatureTally]:
    tallies = {}
    for feature in plan.features:
        view = plan.views[feature.view].name
        if offline.has(view, feature.feature):
            tally = FeatureTally(feature.name, view)
            tallies[feature] = report.tallies.setdefault((feature.name, view), tally)
        else:
            report.gone.add(feature.name)
    return tallies


def _note(report: ServiceReport, rows: Any) -> None:
    times = pc.min_max(rows["request_time"].cast("int64")).as_py()
    report.first_us = min(report.first_us or times["min"], times["min"])
    report.last_us = max(report.last_us, times["max"])
    report.rows += len(rows)
    pairs = rows.group_by(["model", "version"]).aggregate([]).to_pylist()
    report.models |= {f"{pair['model']} {pair['version']}".strip() or READS for pair in pairs}
    report.registry_versions |= set(rows["registry_version"].cast("string").unique().to_pylist())


def _as_json(
    reports: Sequence[ServiceReport], limits: tuple[float, float], files: int, unreadable: int
) -> dict[str, Any]:
    max_mismatch_share, max_late_share = limits
    return {
        "max_mismatch_share": max_mismatch_share,
        "max_late_share": max_late_share,
        "files": files,
        "unreadable_files": unreadable,
        "services": [
            {
                "service": report.service,
                "rows": report.rows,
                "first_request": _iso(report.first_us),
                "last_request": _iso(report.last_us),
                "models": sorted(report.models),
                "registry_versions": sorted(report.registry_versions),
                "features_gone": sorted(report.gone),
                "skewed": [of.feature for of in report.skewed(max_mismatch_share)],
                "too_late": [of.feature for of in report.late(max_late_share)],
                "features": [_feature(of) for of in report.tallies.values()],
            }
            for report in reports
        ],
    }


def _feature(of: FeatureTally) -> dict[str, Any]:
    return {
        "feature": of.feature,
        "view": of.view,
        "rows": of.rows,
        "compared": of.compared,
        "mismatch_share": of.mismatch_share,
        "differing": of.differing,
        "missing_online": of.missing_online,
        "missing_offline": of.missing_offline,
        "late": of.late,
        "late_share": of.late_share,
        "mean_difference": of.mean_distance,
        "max_difference": of.max_distance,
        "example": None
        if of.example is None
        else {name: _strict(value) for name, value in of.example._asdict().items()},
    }


def _strict(value: Any) -> Any:
    """Write what JSON has no number for as text."""
    if isinstance(value, dict):
        return {name: _strict(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_strict(one) for one in value]
    if isinstance(value, bytes):
        return value.decode(errors="backslashreplace")
    is_odd = isinstance(value, float) and not abs(value) < float("inf")
    return str(value) if is_odd else value


def _show(
    console: Console, report: ServiceReport, max_mismatch_share: float, max_late_share: float
) -> None:
    console.print(
        f"{printable(report.service or BY_REFERENCE)}: {report.rows:,} rows as served by "
        f"{printable(', '.join(sorted(report.models)))}, {_iso(report.first_us)} to "
        f"{_iso(report.last_us)}"
    )
    table = Table()
    table.add_column("feature")
    table.add_column("view")
    for heading in ("compared", "mismatch", "differing", "not online", "not offline", "late"):
        table.add_column(heading, justify="right")
    for heading in ("mean |Δ|", "max |Δ|"):
        table.add_column(heading, justify="right")
    skewed, late = report.skewed(max_mismatch_share), report.late(max_late_share)
    for of in report.tallies.values():
        style = "bold red" if of in skewed else ""
        table.add_row(
            printable(of.feature),
            printable(of.view),
            f"{of.compared:,}",
            Text(f"{of.mismatch_share:.2%}" if of.compared else "", style),
            *(f"{n:,}" for n in (of.differing, of.missing_online, of.missing_offline)),
            Text(f"{of.late:,}", "bold red" if of in late else ""),
            *("" if x is None else f"{x:.6g}" for x in (of.mean_distance, of.max_distance)),
        )
    console.print(table)
    if any(of.late for of in report.tallies.values()):
        console.print("late: right at its own event time, but a newer value was not online yet")
    if report.gone:
        names = printable(", ".join(sorted(report.gone)))
        console.print(f"not compared, no longer in the registry or computed on demand: {names}")
    if len(report.registry_versions) > 1:
        console.print(f"served under {len(report.registry_versions)} versions of the registry")
    if not skewed:
        console.print(f"no feature mismatches in more than {max_mismatch_share:.2%} of its rows")
    for of in late:
        console.print(
            f"{printable(of.feature)} is late in {of.late_share:.2%} of its rows: is it "
            "materialized often enough?"
        )
    for of in skewed:
        console.print(_explained(of), soft_wrap=True)


def _explained(of: FeatureTally) -> str:
    assert of.example is not None
    entity = " ".join(f"{name}={value}" for name, value in of.example.entity.items())
    return printable(
        f"{of.feature} mismatches, e.g. {entity}: {_value(of.example.online)} online, "
        f"{_value(of.example.offline)} offline ({_origin(of.example)})"
    )


def _origin(example: Example) -> str:
    return READS if example.prediction_id is None else f"prediction {example.prediction_id}"


def _value(value: Any) -> str:
    return "nothing" if value is None else str(value)[:80]


def _iso(microseconds: int) -> str:
    return f"{datetime.fromtimestamp(microseconds / 1e6, UTC):%Y-%m-%dT%H:%M:%SZ}"
