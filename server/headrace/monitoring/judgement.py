"""What follows from a window or its outcomes: statistics, and alarms that begin or end. Pure.

A `Judgement` is all that judging remembers. Judging returns another one and changes nothing, so
that whoever cannot write it down can go on with the one before.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from headrace.monitoring.counts import ColumnCounts, WindowCounts
from headrace.monitoring.detectors import (
    AlarmState,
    Signal,
    Threshold,
    psi_excess,
    rate_excesses,
    rows_needed,
    step,
)
from headrace.monitoring.profile import RATIO_MAX, ReferenceProfile, relative_errors

Subject = tuple[Signal, str]
"""A signal and the column it is about."""

ROLLED_UP_MAX = 60
"""Windows whose few values are put together before drift is called unknown."""


@dataclass(frozen=True, slots=True)
class Rules:
    """
    When windows end and what is too much. One for the whole monitor.

    Args:
        window_s: Shortest window.
        rows_min: Fewest rows of a window; it stays open until it has them.
        thresholds: By signal.
        coverage_min: Least share of a window's kept predictions whose outcomes must be known
            before its error is judged: those that come first are not like the rest.
        outcomes_min: Fewest outcomes, likewise; those of 0 do not count.
    """

    window_s: float = 60.0
    rows_min: int = 1_000
    thresholds: Mapping[Signal, Threshold] = field(
        default_factory=lambda: {
            Signal.DRIFT: Threshold(0.1, 0.05),
            Signal.PREDICTION_DRIFT: Threshold(0.1, 0.05),
            Signal.PREDICTION_MISSING: Threshold(0.01, 0.005),
            Signal.MISSING: Threshold(0.05, 0.02),
            Signal.OUT_OF_RANGE: Threshold(0.05, 0.02),
            Signal.STALE: Threshold(0.05, 0.02),
            Signal.ERROR: Threshold(1.5, 1.25),
        }
    )
    coverage_min: float = 0.5
    outcomes_min: int = 50


class Change(NamedTuple):
    """
    An alarm that began or ended.

    Args:
        signal: What was watched.
        subject: The column.
        is_alarmed: Whether it began.
        statistic: What the window showed.
        threshold: What it was compared with.
    """

    signal: Signal
    subject: str
    is_alarmed: bool
    statistic: float
    threshold: float


class RolledUp(NamedTuple):
    """
    Values of windows that had too few each.

    Args:
        counts: Of all of them.
        windows: How many.
    """

    counts: ColumnCounts
    windows: int


@dataclass(slots=True)
class Performance:
    """
    What is known of one window's outcomes.

    Args:
        kept: Predictions that outcomes can be joined to.
        labelled: Those whose outcome is known.
        error: Median of |prediction − outcome| / |outcome|; None without one that is not 0.
        bias: Median of prediction / outcome − 1, likewise.
        is_judged: Whether the alarm has taken it into account.
        undefined: Known outcomes of 0, which have no relative error and are in neither median.
    """

    kept: int
    labelled: int
    error: float | None
    bias: float | None
    is_judged: bool = False
    undefined: int = 0

    @property
    def coverage(self) -> float:
        """Share of the kept predictions whose outcome is known."""
        return self.labelled / max(1, self.kept)


@dataclass(frozen=True, slots=True)
class Judgement:
    """
    Of one model version.

    Args:
        reference: Digest of the profile it is by; empty before the first.
        alarms: Of each subject.
        statistics: Of the last window in which each could be had.
        rolled_up: By signal and column, what waits for more values.
        error_to_s: Start of the last window whose error was judged.
    """

    reference: str = ""
    alarms: Mapping[Subject, AlarmState] = field(default_factory=dict)
    statistics: Mapping[Subject, float] = field(default_factory=dict)
    rolled_up: Mapping[Subject, RolledUp] = field(default_factory=dict)
    error_to_s: float = -math.inf

    @property
    def alarmed(self) -> list[Subject]:
        """Subjects whose alarm is open, in order."""
        return sorted(subject for subject, state in self.alarms.items() if state.is_alarmed)

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON has it, but for states that say nothing."""
        return {
            "reference": self.reference,
            "alarms": {
                _key(subject): [state.is_alarmed, state.streak]
                for subject, state in self.alarms.items()
                if state != AlarmState()
            },
            "statistics": {_key(of): value for of, value in self.statistics.items()},
            "rolled_up": {
                _key(of): [found.windows, found.counts.to_json()]
                for of, found in self.rolled_up.items()
            },
            "error_to_s": None if self.error_to_s == -math.inf else self.error_to_s,
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> "Judgement":
        """Read what `to_json` returned."""
        to_s = document.get("error_to_s")
        return cls(
            reference=document.get("reference", ""),
            alarms={
                _subject(key): AlarmState(bool(is_alarmed), int(streak))
                for key, (is_alarmed, streak) in document.get("alarms", {}).items()
            },
            statistics={
                _subject(key): float(value) for key, value in document.get("statistics", {}).items()
            },
            rolled_up={
                _subject(key): RolledUp(ColumnCounts.from_json(counts), int(windows))
                for key, (windows, counts) in document.get("rolled_up", {}).items()
            },
            error_to_s=-math.inf if to_s is None else float(to_s),
        )


Judged = tuple[Judgement, list[Change]]


def measure(kept: int, pairs: list[tuple[float, float]]) -> Performance:
    """Sum up (prediction, outcome) pairs of one window."""
    values = np.array(pairs, np.float64).reshape(-1, 2)
    errors = relative_errors(values[:, 0], values[:, 1])
    return Performance(
        kept=kept,
        labelled=len(pairs),
        error=float(np.median(np.abs(errors))) if len(errors) else None,
        bias=float(np.median(errors)) if len(errors) else None,
        undefined=len(pairs) - len(errors),
    )


def judge_window(
    rules: Rules, reference: ReferenceProfile, before: Judgement, window: WindowCounts
) -> Judged:
    """
    Judge a window that has ended and has all columns of the reference.

    A column with too few values for its drift is put together with those of later windows, until
    there are enough; after `ROLLED_UP_MAX` windows its drift is unknown, and its alarm ends.
    """
    statistics: dict[Subject, float] = {}
    rolled_up: dict[Subject, RolledUp] = {}
    unknown: list[Subject] = []
    for drift, columns, counted in (
        (Signal.DRIFT, reference.features, window.features),
        (Signal.PREDICTION_DRIFT, reference.predictions, window.predictions),
    ):
        for name, column in columns.items():
            needed, subject = rows_needed(column), (drift, name)
            if needed is None:
                continue
            found = _rolled_up(before.rolled_up.get(subject), counted[name])
            excess = psi_excess(column, found.counts)
            if excess is not None and found.counts.present >= needed:
                statistics[subject] = excess
            elif found.windows < ROLLED_UP_MAX:
                rolled_up[subject] = found
            else:
                unknown.append(subject)
    for name, column in reference.features.items():
        for signal, rate in rate_excesses(column, window.features[name]).items():
            statistics[signal, name] = rate
    for name, column in reference.predictions.items():
        rates = rate_excesses(column, window.predictions[name])
        statistics[Signal.PREDICTION_MISSING, name] = rates[Signal.MISSING]
    after, ended = end_alarms(rules, before, unknown)
    after, changes = _step(rules, after, statistics)
    return replace(after, rolled_up=rolled_up), [*ended, *changes]


def judge_error(
    rules: Rules,
    reference: ReferenceProfile | None,
    before: Judgement,
    performance: Performance,
    start_s: float,
) -> Judged | None:
    """
    Judge the outcomes of an ended window.

    Returns:
        None when it has been judged, when a later window has (alarms go forward in time, outcomes
        may not), or when too little is known.
    """
    if (
        performance.is_judged
        or start_s <= before.error_to_s
        or performance.error is None
        or reference is None
        or not reference.error
        or performance.labelled - performance.undefined < rules.outcomes_min
        or performance.coverage < rules.coverage_min
    ):
        return None
    ratio = min(performance.error / reference.error, RATIO_MAX)
    after, changes = _step(rules, before, {(Signal.ERROR, reference.prediction): ratio})
    return replace(after, error_to_s=start_s), changes


def judge_anew(rules: Rules, before: Judgement, reference: ReferenceProfile, digest: str) -> Judged:
    """
    Go on with another profile.

    Alarms of columns that it has go on too, and end when its windows say so; the others end.
    """
    known: set[Subject] = {
        *((signal, name) for name in reference.features for signal in _OF_FEATURES),
        *((signal, name) for name in reference.predictions for signal in _OF_PREDICTIONS),
    }
    if reference.error:
        known.add((Signal.ERROR, reference.prediction))
    after, changes = end_alarms(rules, before, [of for of in before.alarms if of not in known])
    alarms = {
        of: AlarmState(is_alarmed=True) for of, state in after.alarms.items() if state.is_alarmed
    }
    return Judgement(digest, alarms, error_to_s=before.error_to_s), changes


def end_alarms(rules: Rules, before: Judgement, subjects: Iterable[Subject]) -> Judged:
    """End alarms, and forget the statistics, that nothing will confirm or contradict any more."""
    gone = set(subjects)
    changes = [
        Change(
            *subject,
            is_alarmed=False,
            statistic=before.statistics.get(subject, 0.0),
            threshold=rules.thresholds[subject[0]].leave,
        )
        for subject in before.alarmed
        if subject in gone
    ]
    after = replace(
        before,
        alarms={of: state for of, state in before.alarms.items() if of not in gone},
        statistics={of: value for of, value in before.statistics.items() if of not in gone},
    )
    return after, changes


_OF_FEATURES = (Signal.DRIFT, Signal.MISSING, Signal.OUT_OF_RANGE, Signal.STALE)
_OF_PREDICTIONS = (Signal.PREDICTION_DRIFT, Signal.PREDICTION_MISSING)


def _step(rules: Rules, before: Judgement, statistics: Mapping[Subject, float]) -> Judged:
    alarms, changes = dict(before.alarms), []
    for subject, statistic in statistics.items():
        threshold = rules.thresholds[subject[0]]
        was = alarms.get(subject, AlarmState())
        now = alarms[subject] = step(threshold, was, statistic)
        if now.is_alarmed != was.is_alarmed:
            limit = threshold.enter if now.is_alarmed else threshold.leave
            changes.append(Change(*subject, now.is_alarmed, statistic, limit))
    return replace(before, alarms=alarms, statistics={**before.statistics, **statistics}), changes


def _rolled_up(before: RolledUp | None, counts: ColumnCounts) -> RolledUp:
    if before is None:
        return RolledUp(counts, 1)
    return RolledUp(before.counts.plus(counts), before.windows + 1)


def _key(subject: Subject) -> str:
    return f"{subject[0]}:{subject[1]}"


def _subject(key: str) -> Subject:
    signal, _, name = key.partition(":")
    return Signal(signal), name
