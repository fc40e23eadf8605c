"""One model version under watch: rows into windows, windows into judgements.

Time comes in as an argument and nothing goes out but return values: `monitor` keeps and tells.
"""

from collections.abc import Mapping
from typing import NamedTuple

from headrace.monitoring.counts import ColumnCounter, ColumnCounts, WindowCounts
from headrace.monitoring.judgement import (
    Change,
    Judgement,
    Performance,
    Rules,
    judge_anew,
    judge_error,
    judge_window,
)
from headrace.monitoring.profile import COLUMNS_MAX, ColumnReference, ReferenceProfile
from headrace.monitoring.records import Column, PredictionRows


class Unmatched(NamedTuple):
    """
    Names that only one side has: a profile of other names watches nothing.

    Args:
        in_profile: Columns of the profile that never came.
        in_rows: Columns that came and are not in the profile.
    """

    in_profile: tuple[str, ...] = ()
    in_rows: tuple[str, ...] = ()


class WatchedVersion:
    """
    Folds and judges.

    Args:
        rules: When and what.
        reference: What is normal; without one rows are counted and nothing is judged.
        judgement: To go on with.
    """

    def __init__(
        self,
        rules: Rules,
        reference: ReferenceProfile | None,
        judgement: Judgement | None = None,
    ) -> None:
        self._rules = rules
        self.open: WindowCounts | None = None
        self.judgement = Judgement() if judgement is None else judgement
        self.reference = reference
        self.digest = "" if reference is None else reference.digest
        self._features: dict[str, ColumnCounter] = {}
        self._predictions: dict[str, ColumnCounter] = {}

    def set_reference(self, reference: ReferenceProfile | None) -> list[Change]:
        """
        Go on with another reference; the open window, if any, must have been ended.

        Alarms outlive a profile that is gone: that is no recovery. One that replaces it ends those
        of columns that it does not have.
        """
        self.reference = reference
        self.digest = "" if reference is None else reference.digest
        self._features, self._predictions = {}, {}
        return self.adopt_reference()

    def adopt_reference(self) -> list[Change]:
        """Judge by the reference from now on, and end the alarms that it knows nothing of."""
        if self.reference is None or self.digest == self.judgement.reference:
            return []
        self.judgement, changes = judge_anew(
            self._rules, self.judgement, self.reference, self.digest
        )
        return changes

    def resume(self, window: WindowCounts) -> bool:
        """
        Go on with a window that was open at the last stop.

        Returns:
            False when it was counted against another reference: it cannot go on.
        """
        if window.reference != self.digest:
            return False
        self.open = window
        for name in window.features:
            self._feature(name)
        for name in window.predictions:
            self._prediction(name)
        return True

    def fold(self, rows: PredictionRows, now_s: float) -> float:
        """
        Count rows.

        Returns:
            The start of the window they went to, which names it.
        """
        if self.open is None:
            self.open = WindowCounts(now_s, now_s + self._rules.window_s, reference=self.digest)
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

    @property
    def unmatched(self) -> Unmatched:
        """What is only in the profile, and only in the rows, since it was given."""
        if self.reference is None or not (self._features or self._predictions):
            return Unmatched()
        known = (*self.reference.features, *self.reference.predictions)
        seen = (*self._features, *self._predictions)
        return Unmatched(
            tuple(dict.fromkeys(name for name in known if name not in seen)),
            tuple(dict.fromkeys(name for name in seen if name not in known)),
        )

    def end_when_due(self, now_s: float) -> tuple[WindowCounts, list[Change]] | None:
        """End the open window if it is old and full enough, and judge it."""
        window = self.open
        if window is None or now_s < window.end_s or window.rows < self._rules.rows_min:
            return None
        changes: list[Change] = []
        if self.reference is not None and not window.is_degraded:
            _complete(window.features, self.reference.features, window.rows)
            _complete(window.predictions, self.reference.predictions, window.rows)
            changes += self.adopt_reference()
            self.judgement, found = judge_window(
                self._rules, self.reference, self.judgement, window
            )
            changes += found
        return self.end(now_s), changes

    def end(self, now_s: float) -> WindowCounts:
        """End the open window, which must be there, as it is."""
        window = self.open
        assert window is not None
        window.end_s = now_s
        self.open = None
        return window

    def judge_error(self, performance: Performance, start_s: float) -> list[Change]:
        """Take an ended window's outcomes into account, once there are enough of them."""
        judged = judge_error(self._rules, self.reference, self.judgement, performance, start_s)
        if judged is None:
            return []
        performance.is_judged = True
        self.judgement, changes = judged
        return changes

    def _feature(self, name: str) -> ColumnCounter | None:
        references = {} if self.reference is None else self.reference.features
        return _counter(self._features, name, references)

    def _prediction(self, name: str) -> ColumnCounter | None:
        references = {} if self.reference is None else self.reference.predictions
        return _counter(self._predictions, name, references)


def _counter(
    counters: dict[str, ColumnCounter], name: str, references: Mapping[str, ColumnReference]
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


def _complete(
    window: dict[str, ColumnCounts], references: Mapping[str, ColumnReference], rows: int
) -> None:
    """Count as missing what the profile has and rows came without: a vanished column is no calm."""
    for name, reference in references.items():
        counts = window.get(name)
        if counts is None:
            counts = window[name] = ColumnCounter(reference).empty()
        counts.missing += rows - counts.rows
