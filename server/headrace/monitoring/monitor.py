"""The monitor: takes rows and outcomes, ends windows, opens and closes incidents.

One thread owns it and its state; whoever else wants something asks through `MonitorThread`.
"""

import sqlite3
from collections.abc import Callable, Sequence

import structlog

from headrace.monitoring.counts import WindowCounts
from headrace.monitoring.judgement import Change, Judgement, Performance, Rules, end_alarms
from headrace.monitoring.kept import OutcomeCounts
from headrace.monitoring.notices import cloud_event
from headrace.monitoring.outcomes import Outcomes
from headrace.monitoring.profile import ReferenceProfile
from headrace.monitoring.records import PredictionRows
from headrace.monitoring.state import Incident, MonitorState
from headrace.monitoring.version import WINDOWS_SHOWN, VersionRecord, Window
from headrace.monitoring.watched import WatchedVersion

_LOG = structlog.get_logger(__name__)

VERSIONS_MAX = 200
"""Watched at once; beyond, one without a profile or quiet for longest is forgotten."""

WINDOWS_KEPT = 1_500
INCIDENTS_SHOWN = 50
INCIDENTS_KEPT = 1_000
SOURCES_KEPT = 10_000

RETIRED_S = 7 * 86_400.0
"""A version without rows for so long is out of service: its alarms end, which no row would end."""

NAMES_LOGGED = 10


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
        self.outcomes = Outcomes(state.kept, share=kept_share, most=kept_max, days=kept_days)
        self._turn = 0
        self.rows_lost = 0
        self.versions: dict[tuple[str, int], VersionRecord] = {}
        for stored in state.versions():
            watched = WatchedVersion(
                rules,
                find_reference(stored.model, stored.version),
                Judgement.from_json(stored.judgement),
            )
            record = VersionRecord(
                *(stored.id, stored.model, stored.version, watched),
                last_rows_s=stored.last_rows_s,
            )
            self.versions[stored.model, stored.version] = record
            self._resume(record, now_s)
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
        reference = record.watched.reference
        name = reference.prediction if reference else next(iter(rows.predictions), None)
        self.outcomes.keep(record.id, start_s, rows, name)

    def lose(self, rows: int, models: Sequence[tuple[str, int]]) -> None:
        """Note rows that never came: any of the versions that the source serves may miss them."""
        for key in models:
            if key in self.versions:
                self.versions[key].watched.lose(rows)

    def join(self, outcomes: Sequence[tuple[str, int, int, float]]) -> OutcomeCounts:
        """Join outcomes (id prefix, request number, row, value) to their predictions."""
        return self.outcomes.join(outcomes)

    def tick(self, now_s: float) -> None:
        """
        End windows that are due, judge, and keep everything. Call it about once a second.

        Each version is a transaction of its own: what cannot be written has not happened, is tried
        again with the next tick, and keeps no other version from its own.
        """
        self._commit()
        self.outcomes.next_tick()
        records = list(self.versions.values())
        self._turn += 1
        first = self._turn % max(1, len(records))
        for record in (*records[first:], *records[:first]):
            self._tick_version(record, now_s)
        still_open = {
            (record.id, record.watched.open.start_s)
            for record in self.versions.values()
            if record.watched.open is not None
        }
        self.outcomes.prune(now_s, still_open)
        self._state.prune_sources(SOURCES_KEPT)
        self._commit()

    def delivered(self, notice: int) -> None:
        """Forget a notice that was delivered or given up."""
        self._state.remove_notice(notice)

    def incidents(self, record: VersionRecord) -> list[Incident]:
        """Return the last incidents of a version, newest first."""
        return self._state.incidents(record.id, INCIDENTS_SHOWN)

    def performances(self, record: VersionRecord, limit: int) -> list[tuple[float, Performance]]:
        """Return what is known of the last windows with outcomes, by their start, oldest first."""
        rows = self._state.kept.performances(record.id, limit)
        return [(start_s, Performance(**known)) for start_s, known in rows]

    def performance_of_open(self, record: VersionRecord) -> Performance | None:
        """Sum up the outcomes of the open window."""
        if record.watched.open is None:
            return None
        return self.outcomes.sum_up(record.id, record.watched.open.start_s)

    def _resume(self, record: VersionRecord, now_s: float) -> None:
        watched = record.watched
        for window in self._state.windows(record.id, WINDOWS_SHOWN):
            if window.is_open:
                if watched.resume(window.counts):
                    continue
                window.counts.end_s = now_s
                self._state.put_window(record.id, window.counts, is_open=False)
            record.windows.append(Window(window.counts))

    def _record(self, model: str, version: int, now_s: float) -> VersionRecord:
        record = self.versions.get((model, version))
        if record is None:
            if len(self.versions) >= VERSIONS_MAX:
                self._evict()
            reference = self._find_reference(model, version)
            try:
                of = self._state.add_version(model, version)
                self._state.commit()  # a rollback must not leave a record without its id
            except sqlite3.Error:
                self._state.rollback()
                raise
            record = VersionRecord(
                *(of, model, version, WatchedVersion(self._rules, reference)), last_rows_s=now_s
            )
            self.versions[model, version] = record
            _LOG.info("version_seen", model=model, version=version, **_said_of(reference))
        return record

    def _evict(self) -> None:
        # Names are the caller's: made-up ones must not push out those that somebody trained.
        gone = min(
            self.versions.values(),
            key=lambda record: (record.watched.reference is not None, record.last_rows_s),
        )
        _LOG.warning(
            "version_forgotten",
            model=gone.model,
            version=gone.version,
            reason=f"more than {VERSIONS_MAX} versions",
            open_alarms=len(gone.watched.judgement.alarmed),
        )
        self._state.forget_version(gone.id)
        del self.versions[gone.model, gone.version]

    def _tick_version(self, record: VersionRecord, now_s: float) -> None:
        before = record.snapshot()
        told: list[tuple[int, str]] = []
        try:
            watched = record.watched
            ended = watched.end_when_due(now_s)
            if ended is not None:
                window, changes = ended
                self._keep_ended(record, window)
                told += self._tell(record, changes, now_s)
            told += self._tell(record, self._renew_reference(record, now_s), now_s)
            told += self._tell(record, self.outcomes.judge(record.id, watched), now_s)
            if now_s - record.last_rows_s > RETIRED_S:
                told += self._tell(record, self._retire(record, now_s), now_s)
            self._keep_open(record)
            if watched.judgement is not before.watched.judgement:
                self._state.put_judgement(record.id, watched.judgement.to_json())
            self._state.commit()
        except Exception:  # noqa: BLE001 one version must not keep the others from theirs
            _LOG.exception("version_not_judged", model=record.model, version=record.version)
            self._state.rollback()
            self.versions[record.model, record.version] = before
            return
        if self._notify is not None:
            for notice, body in told:
                self._notify(notice, body)

    def _keep_ended(self, record: VersionRecord, window: WindowCounts) -> None:
        record.windows.append(Window(window))
        self._state.put_window(record.id, window, is_open=False)
        self._state.put_last_rows(record.id, record.last_rows_s)
        self._state.prune_windows(record.id, WINDOWS_KEPT)
        unmatched = record.watched.unmatched
        is_news = unmatched != record.unmatched and any(unmatched)
        record.unmatched = unmatched
        if is_news:
            _LOG.warning(
                "profile_and_rows_differ",
                model=record.model,
                version=record.version,
                only_in_profile=unmatched.in_profile[:NAMES_LOGGED],
                only_in_rows=unmatched.in_rows[:NAMES_LOGGED],
            )

    def _keep_open(self, record: VersionRecord) -> None:
        window = record.watched.open
        if window is None:
            return
        now = (window.start_s, window.rows, window.rows_lost)
        if now != record.written:
            record.written = now
            self._state.put_window(record.id, window, is_open=True)
            self._state.put_last_rows(record.id, record.last_rows_s)

    def _renew_reference(self, record: VersionRecord, now_s: float) -> Sequence[Change]:
        """
        Go on with the profile that is there now.

        Another one ends the open window at once, unjudged: its rows are in the old one's bins. One
        that is gone, or half written, is missed only when the next window begins.
        """
        watched = record.watched
        found = self._find_reference(record.model, record.version)
        if found is watched.reference:
            return watched.adopt_reference()
        if found is not None and found.digest == watched.digest:
            watched.reference = found
            return ()
        if watched.open is not None:
            if found is None:
                return ()
            self._keep_ended(record, watched.end(now_s))
        _LOG.info("profile_changed", model=record.model, version=record.version, **_said_of(found))
        return watched.set_reference(found)

    def _retire(self, record: VersionRecord, now_s: float) -> list[Change]:
        watched = record.watched
        if watched.open is not None:
            self._keep_ended(record, watched.end(now_s))
        old = []
        for signal, subject in watched.judgement.alarmed:
            since_s = self._state.open_since(record.id, signal, subject)
            if since_s is None or now_s - since_s > RETIRED_S:
                old.append((signal, subject))
        if not old:
            return []
        _LOG.info("version_out_of_service", model=record.model, version=record.version)
        watched.judgement, changes = end_alarms(self._rules, watched.judgement, old)
        return changes

    def _commit(self) -> None:
        try:
            self._state.commit()
        except sqlite3.Error:
            _LOG.exception("state_not_written")
            self._state.rollback()

    def _tell(
        self, record: VersionRecord, changes: Sequence[Change], now_s: float
    ) -> list[tuple[int, str]]:
        """Write incidents down; return the notices that have to go out."""
        told = []
        for change in changes:
            signal, subject = str(change.signal), change.subject
            if change.is_alarmed:
                incident: int | None = self._state.open_incident(
                    record.id, signal, subject, now_s, change.statistic, change.threshold
                )
                self._state.prune_incidents(record.id, INCIDENTS_KEPT)
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
                told.append((self._state.add_notice(body), body))
        return told


def _said_of(reference: ReferenceProfile | None) -> dict[str, bool]:
    return {
        "has_reference": reference is not None,
        "error_is_judged": reference is not None and bool(reference.error),
    }
