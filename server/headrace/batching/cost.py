"""How long a batch takes: a fixed part and a part per row, fitted as batches finish.

Pure: durations come in, an estimate comes out; no clock is read.

Source: weighted least squares of seconds on rows, its moments kept as exponentially weighted
averages (West, "Updating mean and variance estimates", CACM 1979); the margin follows a quantile by
the stochastic approximation of Robbins and Monro, 1951.
"""

import math

MEMORY_S = 0.5
"""
Of work: what was seen so long ago counts a third. A model that slows down is believed within a
second, and one slow batch among many is not.
"""

RECENT_MIN, RECENT_MAX = 4.0, 32.0
"""Batches that are averaged over, however long or short they are."""

SURPRISE_MAX = 4.0
"""A batch counts as at most so many times what was expected: a pause is hardly seen."""

SURPRISES_ENOUGH = 3
"""
So many batches in a row above that are no pause: the last one is believed, and all before it is
forgotten. One more for each other batch that may run at the time: a pause is a surprise to all.
"""

ROWS_MAX = 1 << 30
QUANTILE = 0.95
MARGIN_STEP = 0.05
MARGIN_MAX = 4.0


class BatchCost:
    """
    Estimates the duration of a batch from its rows.

    Not safe for several threads at once. Before the first batch has been seen nothing is known, and
    every estimate is 0: nobody is refused on a guess.

    Args:
        side_by_side: How many batches may run at a time.
    """

    def __init__(self, side_by_side: int = 1) -> None:
        self.fixed_s = 0.0
        """Of every batch, in seconds."""
        self.per_row_s = 0.0
        self.margin = 1.0
        """What 95 % of the batches take at most, as a multiple of the estimate."""
        self._latest = 1.0  # how long the last batch took, as a multiple of the estimate; at most 1
        self._batches = 0
        self._surprises = 0  # in a row
        self._surprises_enough = SURPRISES_ENOUGH + side_by_side - 1
        self._is_of_failures = False
        self._rows = self._seconds = 0.0  # means
        self._rows_variance = self._covariance = 0.0

    def observe(self, rows: int, seconds: float) -> None:
        """Learn from a batch of `rows` that took `seconds`, both above 0."""
        took_s = expected_s = seconds
        if self._batches:
            expected_s = self.estimate_s(rows)
            self._follow_quantile(seconds / expected_s)
            most_s = SURPRISE_MAX * expected_s
            if seconds <= most_s:
                self._surprises = 0
            else:
                seconds = self._surprise(seconds, most_s)
        self._is_of_failures = False
        self._batches += 1
        # Plain averages of the first few, then older ones fade.
        weight = min(max(-math.expm1(-seconds / MEMORY_S), 1.0 / RECENT_MAX), 1.0 / RECENT_MIN)
        if self._batches > 1 and seconds * SURPRISE_MAX < expected_s:
            weight = 1.0 / RECENT_MIN  # what was slow is over
        weight = max(weight, 1.0 / self._batches)
        rows_off, seconds_off = rows - self._rows, seconds - self._seconds
        self._rows += weight * rows_off
        self._seconds += weight * seconds_off
        kept = 1.0 - weight
        self._rows_variance = kept * (self._rows_variance + weight * rows_off * rows_off)
        self._covariance = kept * (self._covariance + weight * rows_off * seconds_off)
        # Where sizes hardly vary the slope cannot be told from them: as much as they do not vary by
        # a row, the one believed so far counts.
        slope = (self._covariance + self.per_row_s) / (self._rows_variance + 1.0)
        self.per_row_s = min(max(slope, 0.0), self._seconds / self._rows)
        self.fixed_s = self._seconds - self.per_row_s * self._rows
        self._latest = min(1.0, took_s / self.estimate_s(rows))

    def observe_failed(self, rows: int, seconds: float) -> None:
        """
        Learn from a batch of which nobody was answered.

        What failed fast says nothing of how long an answer takes; what failed slowly kept others
        waiting, as an answer does. When it fails fast after that, others may hope for a better end.
        """
        expected_s = self.estimate_s(rows)
        if not self._batches:
            return
        if seconds > expected_s:
            self.observe(rows, seconds)
            self._is_of_failures = True
        elif self._is_of_failures:
            self._latest = seconds / expected_s

    def estimate_s(self, rows: float) -> float:
        """Return how long a batch of `rows` takes on average, in seconds."""
        return self.fixed_s + self.per_row_s * rows

    def hoped_s(self, rows: float) -> float:
        """Return how long it takes if it goes as well as the last one did; `estimate_s` at most."""
        return self._latest * self.estimate_s(rows)

    def bound_s(self, rows: float) -> float:
        """Return how long a batch of `rows` takes at most, 19 times in 20."""
        return self.margin * (self.fixed_s + self.per_row_s * rows)

    def rows_within(self, seconds: float) -> int:
        """Return how many rows a batch can have whose `bound_s` is at most that; perhaps 0."""
        left_s = seconds / self.margin - self.fixed_s
        if left_s <= 0:
            return 0
        return int(left_s / self.per_row_s) if self.per_row_s * ROWS_MAX > left_s else ROWS_MAX

    def _surprise(self, seconds: float, most_s: float) -> float:
        """Return what a batch counts as that took longer than `most_s`."""
        self._surprises += 1
        if self._surprises < self._surprises_enough:
            return most_s
        self._surprises = self._batches = 0  # averages start anew, with this one
        return seconds

    def _follow_quantile(self, ratio: float) -> None:
        step = QUANTILE if ratio > self.margin else QUANTILE - 1.0
        self.margin = min(max(self.margin * (1.0 + MARGIN_STEP * step), 1.0), MARGIN_MAX)
