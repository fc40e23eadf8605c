"""Outcomes: which predictions wait for one, and what those that came sum up to."""

import math
import sqlite3
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import structlog
from numpy.typing import NDArray

from headrace.monitoring.judgement import Change, Performance, measure
from headrace.monitoring.kept import KeptPredictions, OutcomeCounts, WindowKey
from headrace.monitoring.records import PredictionRows
from headrace.monitoring.watched import WatchedVersion

_LOG = structlog.get_logger(__name__)

PRUNE_PERIOD_S = 30.0
PRUNE_FROM_SHARE = 0.9
"""Of the most predictions kept: windows go before there is no place for new ones."""

REMOVED_PER_TICK = 50_000
OUTCOMES_PER_TICK = 50_000
"""Summed up, about; more wait for their turn, so that rows are taken meanwhile."""

WINDOW_COST = 1_000
"""What a window costs to sum up however few its outcomes, in outcomes."""

DAY_S = 86_400.0


class Outcomes:
    """
    Keeps predictions, joins outcomes to them, and sums up.

    Args:
        kept: The predictions.
        share: Of requests whose predictions are kept, by number.
        most: Predictions kept.
        days: How long.
    """

    def __init__(self, kept: KeptPredictions, *, share: float, most: int, days: float) -> None:
        self._kept = kept
        self._share = share
        self._most = most
        self._days = days
        self._due = 0
        self._pruned_s = -math.inf
        self._is_full = False
        self.not_kept = 0
        """Predictions that there was no place for."""
        self.reported = OutcomeCounts()

    @property
    def kept(self) -> int:
        """Predictions that outcomes can be joined to."""
        return self._kept.total

    def keep(self, of: int, start_s: float, rows: PredictionRows, name: str | None) -> None:
        """Keep those predictions of output column `name` that may get an outcome."""
        column = None if name is None else rows.predictions.get(name)
        if column is None or column.values.dtype.kind not in "iufb":
            return
        requests = np.repeat(np.arange(len(rows.request_rows)), rows.request_rows)
        starts = np.cumsum(rows.request_rows) - rows.request_rows
        values = column.values.astype(np.float64)
        keep = np.isfinite(values)
        if self._share < 1:
            keep &= (_scatter(rows.request_numbers) < self._share)[requests]
        places = self._with_room(np.flatnonzero(keep))
        numbers = rows.request_numbers[requests[places]].tolist()
        if rows.first_rows is not None:
            starts -= rows.first_rows
        within = (places - starts[requests[places]]).tolist()
        found = zip(numbers, within, values[places].tolist(), strict=True)
        try:
            self._kept.add(of, start_s, [(rows.id_prefix, *key) for key in found])
        except sqlite3.Error:  # the rows are counted, whatever becomes of their outcomes
            _LOG.exception("predictions_not_kept", rows=len(places))
            self.not_kept += len(places)

    def join(self, outcomes: Sequence[tuple[str, int, int, float]]) -> OutcomeCounts:
        """Join outcomes (id prefix, request number, row, value) to their predictions."""
        counts = self._kept.join(outcomes)
        self.reported = OutcomeCounts(*map(sum, zip(self.reported, counts, strict=True)))
        return counts

    def sum_up(self, of: int, start_s: float) -> Performance:
        """Sum up the outcomes of one window."""
        kept, _ = self._kept.count(of, start_s)
        return measure(kept, self._kept.labelled(of, start_s))

    def next_tick(self) -> None:
        """Allow `OUTCOMES_PER_TICK` more to be summed up; a larger window is paid off in time."""
        self._due = min(OUTCOMES_PER_TICK, self._due + OUTCOMES_PER_TICK)

    def judge(self, of: int, watched: WatchedVersion) -> list[Change]:
        """
        Sum up and judge a version's ended windows that have new outcomes, oldest first.

        The windows may have ended months ago, and labels of a year may come at once.
        """
        changes: list[Change] = []
        if self._due <= 0:
            return changes
        still_open = None if watched.open is None else watched.open.start_s
        for start_s in self._kept.dirty(of, OUTCOMES_PER_TICK // WINDOW_COST + 1):
            if self._due <= 0:
                break
            if start_s == still_open:
                continue
            performance = self.sum_up(of, start_s)
            self._due -= performance.labelled + WINDOW_COST
            known = self._kept.performance(of, start_s)
            performance.is_judged = known is not None and bool(known["is_judged"])
            changes += watched.judge_error(performance, start_s)
            body = {name: getattr(performance, name) for name in Performance.__slots__}
            self._kept.put_performance(of, start_s, body)
        return changes

    def prune(self, now_s: float, open_windows: Collection[WindowKey]) -> None:
        """Let go what is too old or too much, and remove some of what was let go."""
        limit = int(PRUNE_FROM_SHARE * self._most)
        if now_s - self._pruned_s >= PRUNE_PERIOD_S or self.kept > limit:
            self._pruned_s = now_s
            self._kept.prune(limit, now_s - self._days * DAY_S, open_windows)
        self._kept.remove(REMOVED_PER_TICK)

    def _with_room(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        room = max(0, self._most - self.kept)
        lacks = len(places) > room
        if lacks:
            self.not_kept += len(places) - room
            if not self._is_full:
                _LOG.warning("predictions_not_kept", reason="no place; lower --kept-share")
        self._is_full = lacks
        return places[:room]


def _scatter(numbers: NDArray[np.int64]) -> NDArray[Any]:
    """
    Spread numbers evenly over [0, 1), the same number always to the same place.

    Source: Fibonacci hashing, Knuth, The Art of Computer Programming 3, §6.4.
    """
    hashed = numbers.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return (hashed >> np.uint64(11)).astype(np.float64) / 2.0**53
