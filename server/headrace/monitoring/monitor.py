"""The monitor: takes rows and outcomes, ends windows, opens and closes incidents.

One thread owns it and its state; whoever else wants something asks through `MonitorThread`.
"""

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import structlog

from headrace.monitoring.counts import WindowCounts
from headrace.monitoring.notices import cloud_event
from headrace.monitoring.profile import ReferenceProfile
from headrace.monitoring.records import PredictionRows
from headrace.monitoring.state import Incident, MonitorState, OutcomeCounts
from headrace.monitoring.watched import (
    Change,
    Performance,
    Rules,
    WatchedVersion,
    Window,
    alarms_from_json,
    alarms_to_json,
)

_LOG = structlog.get_logger(__name__)

VERSIONS_MAX = 200
"""Model versions watched at once; beyond, the one that was quiet for longest is forgotten."""

WINDOWS_SHOWN = 120
WINDOWS_KEPT = 1_500
INCIDENTS_SHOWN = 50
SOURCES_KEPT = 10_000
MEASURED_PER_TICK = 50
PRUNE_PERIOD_S = 30.0
DAY_S = 86_400.0


@dataclass(slots=True)
class VersionRecord:
    """
    One model version as the monitor knows it.

    Args:
        id: In the state.
        model: Its name.
        version: Its number.
        watched: Folds and judges.
        windows: The last ones, oldest first.
        rows: Rows counted since this process began.
        last_rows_s: When rows came last.
        dirty: Starts of windows whose outcomes have changed.
    """

    id: int
    model: str
    version: int
    watched: WatchedVersion
    windows: deque[Window] = field(default_factory=lambda: deque(maxlen=WINDOWS_SHOWN))
    rows: int = 0
    last_rows_s: float = 0.0
    dirty: set[float] = field(default_factory=set)


class Monitor:
    """
    Everything that is known, and what follows from it.

    Args:
        rules: When and what.
        state: Kept across restarts.
        find_reference: Looks for a version's profile.
        notify: Is given each notice (id, body) that has to be delivered; None when nobody is.
        kept_share: Share of requests whose predictions are kept for their outcomes, by number.
        kept_max: Most predictions kept.
        kept_days: How long.
        now_s: The time at which it begins, Unix seconds.
    """

    def __init__(
        self,
        rules: Rules,
        state: MonitorState,
        find_reference: Callable[[str, int], ReferenceProfile | None],
        notify: Callable[[int, str], None] | None = None,
        *,
        kept_share: float = 1.0,
        kept_max: int = 2_000_000,
        kept_days: float = 120.0,
        now_s: float = 0.0,
    ) -> None:
        self._rules = rules
        self._state = state
        self._find_reference = find_reference
        self._notify = notify
        self._kept_share = kept_share
        self._kept_max = kept_max
        self._kept_days = kept_days
        self.kept = 0
        """Predictions that outcomes can be joined to, about."""
        self._pruned_s = -math.inf
        self.rows_lost = 0
        self.outcomes = OutcomeCounts()
        self.versions: dict[tuple[str, int], VersionRecord] = {}
        for stored in state.versions():
            record = VersionRecord(
                stored.id,
                stored.model,
                stored.version,
                WatchedVersion(
                    rules,
                    find_reference(stored.model, stored.version),
                    alarms_from_json(stored.alarms),
                ),
                last_rows_s=now_s,
            )
            self.versions[stored.model, stored.version] = record
            for window in state.windows(stored.id, WINDOWS_SHOWN):
                if not window.is_open or not record.watched.resume(window.counts):
                    record.windows.append(Window(window.counts))
        for notice, body in state.notices():
            if notify is None:
                state.remove_notice(notice)
            else:
                notify(notice, body)

    def source_seen(
        self, source: str, rows_sent_before: int, rows_dropped: int, rows: int
    ) -> int | None:
        """
        Note how far a source has come.

        Returns:
            How many of its rows were lost since its last message, on the way or before it; None
            for a message that has been counted already, and was sent again.
        """
        known = self._state.source(source)
        if known is None:  # what it sent to others before, they have
            known = (rows_sent_before, rows_dropped if rows_sent_before else 0)
        seen, dropped = known
        if rows_sent_before < seen:
            return None
        lost = rows_sent_before - seen + max(0, rows_dropped - dropped)
        self._state.put_source(source, rows_sent_before + rows, rows_dropped)
        self.rows_lost += lost
        return lost

    def fold(self, rows: PredictionRows, now_s: float) -> None:
        """Count rows, and keep those predictions that may get an outcome."""
        record = self._record(rows.model, rows.version, now_s)
        record.rows += rows.rows
        record.last_rows_s = now_s
        start_s = record.watched.fold(rows, now_s)
        self._keep(record, start_s, rows)

    def lose(self, rows: int, models: Sequence[tuple[str, int]]) -> None:
        """Note rows that never came: any of the versions that the source serves may miss them."""
        for key in models:
            if key in self.versions:
                self.versions[key].watched.lose(rows)

    def join(self, outcomes: Sequence[tuple[str, int, int, float]]) -> OutcomeCounts:
        """Join outcomes (id prefix, request number, row, value) to their predictions."""
        counts, touched = self._state.join_outcomes(outcomes)
        self.outcomes = OutcomeCounts(*map(sum, zip(self.outcomes, counts, strict=True)))
        by_id = {record.id: record for record in self.versions.values()}
        for of, start_s in touched:
            if of in by_id:
                by_id[of].dirty.add(start_s)
        return counts

    def tick(self, now_s: float) -> None:
        """End windows that are due, judge, and keep everything. Call it about once a second."""
        for record in list(self.versions.values()):
            ended = record.watched.close_when_due(now_s)
            if ended is not None:
                self._end_window(record, *ended, now_s)
            elif record.watched.open is not None:
                self._state.put_window(record.id, record.watched.open, is_open=True)
            self._measure(record, now_s)
        if now_s - self._pruned_s >= PRUNE_PERIOD_S:
            self._pruned_s = now_s
            oldest_s = now_s - self._kept_days * DAY_S
            self.kept = self._state.prune_predictions(self._kept_max, oldest_s)
            self._state.prune_sources(SOURCES_KEPT)
        self._state.commit()

    def delivered(self, notice: int) -> None:
        """Forget a notice that was delivered or given up."""
        self._state.remove_notice(notice)

    def incidents(self, record: VersionRecord) -> list[Incident]:
        """Return the last incidents of a version, newest first."""
        return self._state.incidents(record.id, INCIDENTS_SHOWN)

    def performances(self, record: VersionRecord) -> list[tuple[float, Performance]]:
        """Return what is known of the last windows with outcomes, by their start, oldest first."""
        rows = self._state.performances(record.id, WINDOWS_SHOWN)
        return [(start_s, Performance(**known)) for start_s, known in rows]

    def performance_of_open(self, record: VersionRecord) -> Performance | None:
        """Sum up the outcomes of the open window."""
        if record.watched.open is None:
            return None
        return record.watched.measure(*self._state.labelled(record.id, record.watched.open.start_s))

    def _record(self, model: str, version: int, now_s: float) -> VersionRecord:
        record = self.versions.get((model, version))
        if record is None:
            if len(self.versions) >= VERSIONS_MAX:
                quietest = min(self.versions.values(), key=lambda record: record.last_rows_s)
                self._state.forget_version(quietest.id)
                del self.versions[quietest.model, quietest.version]
            reference = self._find_reference(model, version)
            record = VersionRecord(
                self._state.add_version(model, version),
                model,
                version,
                WatchedVersion(self._rules, reference),
                last_rows_s=now_s,
            )
            self.versions[model, version] = record
            _LOG.info(
                "version_seen", model=model, version=version, has_reference=reference is not None
            )
        elif record.watched.open is None:
            reference = self._find_reference(model, version)
            if reference is not record.watched.reference:
                record.watched.set_reference(reference)
        return record

    def _keep(self, record: VersionRecord, start_s: float, rows: PredictionRows) -> None:
        reference = record.watched.reference
        name = reference.prediction if reference else next(iter(rows.predictions), None)
        if name not in rows.predictions or rows.predictions[name].values.dtype.kind not in "iufb":
            return
        requests = np.repeat(np.arange(len(rows.request_rows)), rows.request_rows)
        starts = np.cumsum(rows.request_rows) - rows.request_rows
        values = rows.predictions[name].values.astype(np.float64)
        keep = np.isfinite(values)
        if self._kept_share < 1:
            keep &= (_scatter(rows.request_numbers) < self._kept_share)[requests]
        places = np.flatnonzero(keep)
        numbers = rows.request_numbers[requests[places]].tolist()
        within = (places - starts[requests[places]]).tolist()
        prefix = rows.id_prefix
        self.kept += len(numbers)
        self._state.add_predictions(
            record.id,
            start_s,
            [(prefix, *key) for key in zip(numbers, within, values[places].tolist(), strict=True)],
        )

    def _end_window(
        self, record: VersionRecord, counts: WindowCounts, changes: Sequence[Change], now_s: float
    ) -> None:
        record.windows.append(Window(counts))
        record.dirty.add(counts.start_s)
        self._state.put_window(record.id, counts, is_open=False)
        self._state.prune_windows(record.id, WINDOWS_KEPT)
        self._tell(record, changes, now_s)
        self._state.put_alarms(record.id, alarms_to_json(record.watched.alarms))

    def _measure(self, record: VersionRecord, now_s: float) -> None:
        """
        Sum up the outcomes of ended windows that have new ones, oldest first.

        The windows may have ended months ago. Some at a time: labels of a year may come at once.
        """
        still_open = None if record.watched.open is None else record.watched.open.start_s
        for start_s in sorted(record.dirty - {still_open})[:MEASURED_PER_TICK]:
            record.dirty.discard(start_s)
            performance = record.watched.measure(*self._state.labelled(record.id, start_s))
            if not performance.labelled:
                continue
            known = self._state.performance(record.id, start_s)
            performance.is_judged = known is not None and bool(known["is_judged"])
            changes = record.watched.judge_performance(performance)
            self._state.put_performance(record.id, start_s, _performance_to_json(performance))
            if performance.is_judged:
                self._tell(record, changes, now_s)
                self._state.put_alarms(record.id, alarms_to_json(record.watched.alarms))

    def _tell(self, record: VersionRecord, changes: Sequence[Change], now_s: float) -> None:
        for change in changes:
            signal, subject = str(change.signal), change.subject
            if change.is_alarmed:
                incident: int | None = self._state.open_incident(
                    record.id, signal, subject, now_s, change.statistic, change.threshold
                )
            else:
                incident = self._state.resolve_incident(record.id, signal, subject, now_s)
            _LOG.warning(
                "alarm" if change.is_alarmed else "alarm_resolved",
                model=record.model,
                version=record.version,
                signal=signal,
                subject=subject,
                statistic=round(change.statistic, 4),
                threshold=change.threshold,
            )
            if self._notify is not None:
                body = cloud_event(record.model, record.version, change, incident, now_s)
                self._notify(self._state.add_notice(body), body)


def _scatter(numbers: np.ndarray[Any, np.dtype[np.int64]]) -> np.ndarray[Any, Any]:
    """
    Spread numbers evenly over [0, 1), the same number always to the same place.

    Source: Fibonacci hashing, Knuth, The Art of Computer Programming 3, §6.4.
    """
    hashed = numbers.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return (hashed >> np.uint64(11)).astype(np.float64) / 2.0**53


def _performance_to_json(performance: Performance) -> dict[str, Any]:
    return {name: getattr(performance, name) for name in Performance.__slots__}
