"""One model version under watch: rows into windows, windows into statistics, those into alarms.

Time comes in as an argument and nothing goes out but return values: `monitor` keeps and tells.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from headrace.monitoring.counts import ColumnCounter, ColumnCounts, WindowCounts
from headrace.monitoring.detectors import (
    AlarmState,
    Signal,
    Threshold,
    psi_excess,
    rate_excesses,
    rows_needed,
    step,
)
from headrace.monitoring.profile import COLUMNS_MAX, ReferenceProfile, relative_errors
from headrace.monitoring.records import Column, PredictionRows

Subject = tuple[Signal, str]
"""A signal and the column it is about."""


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
        outcomes_min: Fewest outcomes, likewise.
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
    """

    kept: int
    labelled: int
    error: float | None
    bias: float | None
    is_judged: bool = False

    @property
    def coverage(self) -> float:
        """Share of the kept predictions whose outcome is known."""
        return self.labelled / max(1, self.kept)


@dataclass(slots=True)
class Window:
    """
    A window that has ended, with what became known since.

    Args:
        counts: Of its rows.
        drift: Each column's, by group and name, once it was asked for.
    """

    counts: WindowCounts
    drift: dict[tuple[str, str], float | None] = field(default_factory=dict)


class WatchedVersion:
    """
    Folds and judges.

    Args:
        rules: When and what.
        reference: What is normal; without one rows are counted and nothing is judged.
        alarms: States to go on with.
    """

    def __init__(
        self,
        rules: Rules,
        reference: ReferenceProfile | None,
        alarms: Mapping[Subject, AlarmState] | None = None,
    ) -> None:
        self._rules = rules
        self.alarms: dict[Subject, AlarmState] = dict(alarms or {})
        self.statistics: dict[Subject, float] = {}
        """Of the last window in which each could be had."""
        self.open: WindowCounts | None = None
        self.reference = reference
        self._features: dict[str, ColumnCounter] = {}
        self._predictions: dict[str, ColumnCounter] = {}

    def set_reference(self, reference: ReferenceProfile | None) -> None:
        """Go on with another reference; the open window, if any, must have been closed."""
        self.reference = reference
        self._features.clear()
        self._predictions.clear()

    def resume(self, window: WindowCounts) -> bool:
        """
        Go on with a window that was open at the last stop.

        Returns:
            False when it was counted in other bins: it cannot go on.
        """
        for counter, counts in (
            *((self._feature(name), counts) for name, counts in window.features.items()),
            *((self._prediction(name), counts) for name, counts in window.predictions.items()),
        ):
            if counter is None or len(counter.empty().bins) != len(counts.bins):
                return False
        self.open = window
        return True

    def fold(self, rows: PredictionRows, now_s: float) -> float:
        """
        Count rows.

        Returns:
            The start of the window they went to, which names it.
        """
        if self.open is None:
            self.open = WindowCounts(now_s, now_s + self._rules.window_s)
        window = self.open
        window.rows += rows.rows
        for name, column in rows.features.items():
            _count(window.features, name, self._feature(name), column)
        for name, column in rows.predictions.items():
            _count(window.predictions, name, self._prediction(name), column)
        return window.start_s

    def lose(self, rows: int) -> None:
        """Note rows that were answered and never came."""
        if self.open is not None:
            self.open.rows_lost += rows

    def close_when_due(self, now_s: float) -> tuple[WindowCounts, list[Change]] | None:
        """End the open window if it is old and full enough, and judge it."""
        window = self.open
        if window is None or now_s < window.end_s or window.rows < self._rules.rows_min:
            return None
        window.end_s = now_s
        self.open = None
        return window, [] if window.is_degraded else self._judge(window)

    def measure(self, kept: int, pairs: list[tuple[float, float]]) -> Performance:
        """Sum up (prediction, outcome) pairs of one window."""
        values = np.array(pairs, np.float64).reshape(-1, 2)
        errors = relative_errors(values[:, 0], values[:, 1])
        return Performance(
            kept=kept,
            labelled=len(pairs),
            error=float(np.median(np.abs(errors))) if len(errors) else None,
            bias=float(np.median(errors)) if len(errors) else None,
        )

    def judge_performance(self, performance: Performance) -> list[Change]:
        """Take an ended window's outcomes into account, once there are enough of them."""
        reference = None if self.reference is None else self.reference.error
        if (
            performance.is_judged
            or performance.error is None
            or not reference
            or self.reference is None
            or performance.labelled < self._rules.outcomes_min
            or performance.coverage < self._rules.coverage_min
        ):
            return []
        performance.is_judged = True
        subject = (Signal.ERROR, self.reference.prediction)
        return self._step({subject: performance.error / reference})

    def _judge(self, window: WindowCounts) -> list[Change]:
        if self.reference is None:
            return []
        statistics: dict[Subject, float] = {}
        for name, reference in self.reference.features.items():
            counts = window.features.get(name)
            if counts is None:
                continue
            excess = psi_excess(reference, counts)
            if excess is not None and counts.present >= rows_needed(reference):
                statistics[Signal.DRIFT, name] = excess
            for signal, rate in rate_excesses(reference, counts).items():
                statistics[signal, name] = rate
        for name, reference in self.reference.predictions.items():
            counts = window.predictions.get(name)
            if counts is None:
                continue
            excess = psi_excess(reference, counts)
            if excess is not None and counts.present >= rows_needed(reference):
                statistics[Signal.PREDICTION_DRIFT, name] = excess
            missing = rate_excesses(reference, counts)[Signal.MISSING]
            statistics[Signal.PREDICTION_MISSING, name] = missing
        return self._step(statistics)

    def _step(self, statistics: Mapping[Subject, float]) -> list[Change]:
        changes = []
        for subject, statistic in statistics.items():
            threshold = self._rules.thresholds[subject[0]]
            before = self.alarms.get(subject, AlarmState())
            after = step(threshold, before, statistic)
            self.statistics[subject] = statistic
            self.alarms[subject] = after
            if after.is_alarmed != before.is_alarmed:
                limit = threshold.enter if after.is_alarmed else threshold.leave
                changes.append(Change(*subject, after.is_alarmed, statistic, limit))
        return changes

    def _feature(self, name: str) -> ColumnCounter | None:
        references = {} if self.reference is None else self.reference.features
        return _counter(self._features, name, references)

    def _prediction(self, name: str) -> ColumnCounter | None:
        references = {} if self.reference is None else self.reference.predictions
        return _counter(self._predictions, name, references)


def alarms_to_json(alarms: Mapping[Subject, AlarmState]) -> dict[str, Any]:
    """Return alarm states as JSON has them, but for those that say nothing."""
    return {
        f"{signal}:{name}": [state.is_alarmed, state.streak]
        for (signal, name), state in alarms.items()
        if state != AlarmState()
    }


def alarms_from_json(document: Mapping[str, Any]) -> dict[Subject, AlarmState]:
    """Read what `alarms_to_json` returned."""
    alarms = {}
    for key, (is_alarmed, streak) in document.items():
        signal, _, name = key.partition(":")
        alarms[Signal(signal), name] = AlarmState(bool(is_alarmed), int(streak))
    return alarms


def _counter(
    counters: dict[str, ColumnCounter], name: str, references: Mapping[str, Any]
) -> ColumnCounter | None:
    counter = counters.get(name)
    if counter is None:
        if len(counters) >= COLUMNS_MAX:
            return None
        counter = counters[name] = ColumnCounter(references.get(name))
    return counter


def _count(
    window: dict[str, ColumnCounts], name: str, counter: ColumnCounter | None, column: Column
) -> None:
    if counter is None:
        return
    counts = counter.count(column.values, column.statuses)
    if name in window:
        window[name].add(counts)
    else:
        window[name] = counts
