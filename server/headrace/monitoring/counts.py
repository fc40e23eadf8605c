"""Counts of one window: how many rows fell into each bin of each column.

Counting is exact and mergeable: counting two halves and adding gives what counting the whole gives.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headrace.monitoring.profile import (
    CategoricalReference,
    ColumnReference,
    NumericReference,
    as_level,
    as_numbers,
)

PRESENT, OUTSIDE_MAX_AGE = 1, 4
"""Feast's statuses of a value that is there, and of one that is too old."""

UNKNOWN_REFERENCE = "?"
"""Of a window that was kept before windows said what they were counted against."""


@dataclass(slots=True)
class ColumnCounts:
    """
    One column in one window.

    Args:
        bins: Rows in each bin or level of the reference; one bin for all without a reference.
        below: Rows under the reference's least value; 0 for a categorical column.
        above: Rows over its greatest; for a categorical column, of levels it does not have.
        missing: Rows without a value: null, absent, too old, NaN.
        invalid: Rows with an infinite value, or with text where training had numbers.
        stale: Rows whose value was found and too old; among the missing.
    """

    bins: NDArray[np.int64]
    below: int = 0
    above: int = 0
    missing: int = 0
    invalid: int = 0
    stale: int = 0

    @property
    def present(self) -> int:
        """Rows with a finite value or a level."""
        return int(self.bins.sum()) + self.below + self.above

    @property
    def rows(self) -> int:
        """All rows."""
        return self.present + self.missing + self.invalid

    def add(self, other: "ColumnCounts") -> None:
        """Take in the counts of other rows, counted in the same bins."""
        self.bins = self.bins + other.bins
        self.below += other.below
        self.above += other.above
        self.missing += other.missing
        self.invalid += other.invalid
        self.stale += other.stale

    def plus(self, other: "ColumnCounts") -> "ColumnCounts":
        """Return the counts of both's rows, counted in the same bins."""
        both = replace(self)
        both.add(other)
        return both

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON has it."""
        return {
            "bins": self.bins.tolist(),
            "below": self.below,
            "above": self.above,
            "missing": self.missing,
            "invalid": self.invalid,
            "stale": self.stale,
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> "ColumnCounts":
        """Read what `to_json` returned."""
        rest = {key: value for key, value in document.items() if key != "bins"}
        return cls(bins=np.array(document["bins"], np.int64), **rest)


class ColumnCounter:
    """
    Counts values of one column.

    Args:
        reference: Whose bins; None counts all finite values together.
    """

    def __init__(self, reference: ColumnReference | None) -> None:
        self.reference = reference
        self._levels: dict[str, int] = {}
        self._cuts = np.array([-np.inf, np.inf], np.float32)
        self._cuts_float16 = self._cuts.astype(np.float16)
        if isinstance(reference, NumericReference):
            self._cuts = _cuts(reference.edges, np.float32)
            self._cuts_float16 = _cuts(reference.edges, np.float16)
        elif isinstance(reference, CategoricalReference):
            self._levels = {level: i for i, level in enumerate(reference.levels)}
        # A profile may have truth values as levels; where they are joined they come as 0.0 and 1.0.
        self._is_truth = bool(self._levels) and self._levels.keys() <= {"True", "False"}

    def empty(self) -> ColumnCounts:
        """Return counts of no rows."""
        size = len(self._cuts) - 1
        if isinstance(self.reference, CategoricalReference):
            size = len(self.reference.levels)
        return ColumnCounts(np.zeros(size, np.int64))

    def count(self, values: NDArray[Any], statuses: NDArray[np.uint8] | None) -> ColumnCounts:
        """
        Count n values.

        Args:
            values: Shape (n,): numbers, truth values, or objects (`bytes`, `str`, None).
            statuses: Feast's statuses of the values, shape (n,); None when callers sent them.
        """
        counts = self.empty()
        if statuses is not None and not (statuses == PRESENT).all():
            present = statuses == PRESENT
            counts.missing = int(len(values) - np.count_nonzero(present))
            counts.stale = int(np.count_nonzero(statuses == OUTSIDE_MAX_AGE))
            values = values[present]
        if isinstance(self.reference, CategoricalReference):
            self._count_levels(values, counts)
        elif values.dtype.kind == "O":  # text where numbers were, or nothing to compare with
            if self.reference is None:
                counts.bins[0] += len(values)
            else:
                counts.invalid += len(values)
        else:
            self._count_numbers(values, counts)
        return counts

    def _count_numbers(self, values: NDArray[Any], counts: ColumnCounts) -> None:
        if values.dtype.kind == "f":
            finite = np.isfinite(values)
            if not finite.all():
                nans = int(np.count_nonzero(np.isnan(values)))
                counts.missing += nans
                counts.invalid += int(len(values) - np.count_nonzero(finite)) - nans
                values = values[finite]
        if values.dtype == np.float16:  # what training had was rounded on its way here
            places = np.searchsorted(self._cuts_float16, values, side="left")
        else:
            places = np.searchsorted(self._cuts, as_numbers(values), side="left")
        sums = np.bincount(places, minlength=len(self._cuts) + 1)
        counts.below += int(sums[0])
        counts.bins += sums[1:-1]
        counts.above += int(sums[-1])

    def _count_levels(self, values: NDArray[Any], counts: ColumnCounts) -> None:
        if values.dtype.kind == "f":
            nans = np.isnan(values)
            counts.missing += int(np.count_nonzero(nans))
            values = values[~nans]
        is_number = values.dtype.kind in "iuf"
        for value, times in Counter(values.tolist()).items():
            if is_number and self._is_truth and value in (0, 1):
                level = as_level(bool(value))
            else:
                level = as_level(value)
            place = None if level is None else self._levels.get(level)
            if level is None:
                counts.missing += times
            elif place is None:
                counts.above += times
            else:
                counts.bins[place] += times


@dataclass(slots=True)
class WindowCounts:
    """
    One window of one model version.

    Args:
        start_s: When it began, Unix seconds.
        end_s: When it ended; while it is open, when it may end.
        rows: Rows counted.
        rows_lost: Rows that were answered in this time and never came.
        features: By column.
        predictions: By output column.
        reference: Digest of the profile in whose bins it is counted; empty without one.
    """

    start_s: float
    end_s: float
    rows: int = 0
    rows_lost: int = 0
    features: dict[str, ColumnCounts] = field(default_factory=dict)
    predictions: dict[str, ColumnCounts] = field(default_factory=dict)
    reference: str = ""

    @property
    def is_degraded(self) -> bool:
        """Whether so much was lost that the rest may not speak for it: losses are not random."""
        return self.rows_lost > 0.01 * (self.rows + self.rows_lost)

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON has it."""
        return {
            "start_s": self.start_s,
            "end_s": self.end_s,
            "rows": self.rows,
            "rows_lost": self.rows_lost,
            "reference": self.reference,
            "features": {name: column.to_json() for name, column in self.features.items()},
            "predictions": {name: column.to_json() for name, column in self.predictions.items()},
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> "WindowCounts":
        """Read what `to_json` returned."""
        columns: dict[str, Any] = {
            group: {name: ColumnCounts.from_json(of) for name, of in document[group].items()}
            for group in ("features", "predictions")
        }
        numbers = {key: document[key] for key in ("start_s", "end_s", "rows", "rows_lost")}
        return cls(**numbers, **columns, reference=document.get("reference", UNKNOWN_REFERENCE))


def _cuts(edges: Sequence[float], dtype: type[np.floating[Any]]) -> NDArray[Any]:
    """
    Return what separates bins: not above cut 0 is below all; not above cut i, in bin i; else above.

    Edges that are one number in `dtype` stay apart by its smallest step: a frequent value's lower
    edge must not become the value.
    """
    with np.errstate(over="ignore"):
        cuts = np.array(edges, np.float64).astype(dtype)
    lowest = dtype(-np.inf)
    cuts[0] = np.nextafter(cuts[0], lowest)
    for i in reversed(range(len(cuts) - 1)):
        if cuts[i] >= cuts[i + 1]:
            cuts[i] = np.nextafter(cuts[i + 1], lowest)
    return cuts
