"""A version's reference profile: how its features, predictions and errors were in training.

Whoever trains a model calls `build_profile` on the rows that trained it and writes the result as
`profile.json` into the version's folder. The monitor counts in the bins that it finds there.

Numbers are compared as float32, here and in the monitor: training often has the float64 of what the
model is sent as float32, and 0.1 must fall into the same bin either way.
"""

import hashlib
import json
import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headrace.errors import ProfileError

FILENAME = "profile.json"
FORMAT = 1
BIN_COUNT = 10
"""Equally likely bins of a numeric column. PSI is usually read with ten."""

LEVELS_MAX = 256
"""Of a categorical column; the rarer ones are counted together."""

COLUMNS_MAX = 1_024
PROFILE_BYTES_MAX = 4 << 20
TEXT_BYTES_MAX = 64
"""Of one text value: what comes after is not looked at, here or in the monitor."""

COUNT_MAX = 1 << 53
RATIO_MAX = 1e6
"""Relative errors are cut off here: an outcome of 5e-324 must not make them infinite."""

_FLOAT32_MAX = float(np.finfo(np.float32).max)


@dataclass(frozen=True, slots=True)
class NumericReference:
    """
    One numeric column in training.

    Args:
        edges: Ascending and finite; bin i holds what is above edge i and not above edge i + 1, and
            the first bin its lower edge too. The outermost edges are the least and the greatest
            value. Values that were frequent have bins of their own, whose lower edge is the float32
            just below.
        counts: Rows in each bin.
        missing: Rows without a value.
    """

    edges: tuple[float, ...]
    counts: tuple[int, ...]
    missing: int

    def __post_init__(self) -> None:
        edges = self.edges
        if len(edges) != len(self.counts) + 1 or not self.counts:
            raise ProfileError("a numeric column needs one edge more than it has counts")
        if not all(map(math.isfinite, edges)) or any(a > b for a, b in pairwise(edges)):
            raise ProfileError("edges must be finite and ascend")
        _check_counts((*self.counts, self.missing))

    @property
    def rows(self) -> int:
        """Rows counted, missing ones included."""
        return sum(self.counts) + self.missing


@dataclass(frozen=True, slots=True)
class CategoricalReference:
    """
    One text column in training.

    Args:
        levels: The most frequent values, `TEXT_BYTES_MAX` bytes of each.
        counts: Rows of each level.
        other: Rows of all other values.
        missing: Rows without a value.
    """

    levels: tuple[str, ...]
    counts: tuple[int, ...]
    other: int
    missing: int

    def __post_init__(self) -> None:
        if len(self.levels) != len(self.counts) or len(set(self.levels)) != len(self.levels):
            raise ProfileError("a categorical column needs one count for each of its levels")
        if len(self.levels) > LEVELS_MAX:
            raise ProfileError(f"a categorical column has more than {LEVELS_MAX} levels")
        _check_counts((*self.counts, self.other, self.missing))

    @property
    def rows(self) -> int:
        """Rows counted, missing ones included."""
        return sum(self.counts) + self.other + self.missing


ColumnReference = NumericReference | CategoricalReference


@dataclass(frozen=True, slots=True)
class ReferenceProfile:
    """
    What is normal for one model version.

    Args:
        features: By column name, as the model sees them after the feature join.
        predictions: By output column.
        prediction: The output column that outcomes are compared with.
        error: Median of |prediction − outcome| / |outcome| on rows that did not train the model;
            None when it is not known, and realised errors are then reported without a verdict.
    """

    features: Mapping[str, ColumnReference]
    predictions: Mapping[str, ColumnReference]
    prediction: str
    error: float | None = None

    def __post_init__(self) -> None:
        if self.prediction not in self.predictions:
            raise ProfileError(f"no predictions of '{self.prediction}', which names the outcome")
        if self.error is not None and not (math.isfinite(self.error) and self.error >= 0):
            raise ProfileError("the reference error is not a number from 0 on")
        if len(self.features) + len(self.predictions) > COLUMNS_MAX:
            raise ProfileError(f"more than {COLUMNS_MAX} columns")

    @property
    def digest(self) -> str:
        """Short, and the same for equal profiles only: it says what counts were counted against."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:16]

    def to_json(self) -> str:
        """Write it down; equal profiles give equal text."""
        columns = {
            group: {name: _written(column) for name, column in columns.items()}
            for group, columns in (
                ("features", self.features),
                ("predictions", self.predictions),
            )
        }
        document = {
            "headrace_profile": FORMAT,
            "prediction": self.prediction,
            "error": self.error,
            **columns,
        }
        return json.dumps(document, indent=1, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "ReferenceProfile":
        """
        Read what `to_json` wrote.

        Raises:
            ProfileError: it is something else; the message says what.
        """
        try:
            document = json.loads(text)
            if document["headrace_profile"] != FORMAT:
                raise ProfileError(f"expected format {FORMAT}")
            return cls(
                features=_read_columns(document["features"]),
                predictions=_read_columns(document["predictions"]),
                prediction=str(document["prediction"]),
                error=document["error"],
            )
        except KeyError as error:
            raise ProfileError(f"{error} is missing") from None
        except (TypeError, ValueError, AttributeError, RecursionError, OverflowError) as error:
            raise ProfileError(f"not a profile: {error}") from None


def build_profile(
    features: Mapping[str, Any],
    predictions: Mapping[str, Any],
    *,
    outcomes: Any = None,
    outcome_predictions: Any = None,
) -> ReferenceProfile:
    """
    Describe what a model saw and said in training.

    Args:
        features: Column name to n values, as the model sees them. Numbers and truth values (0 and
            1) are binned, text is counted value by value; None and NaN are missing.
        predictions: Output column to n values; the first is what outcomes are compared with.
        outcomes: True values of rows that did not train the model, for the reference error; those
            that are 0 have no relative error and are left out.
        outcome_predictions: The model's predictions for the same rows.

    Returns:
        To be written with `to_json` as `profile.json` beside the version's model.

    Raises:
        ProfileError: there are no predictions, or a column has no rows or too many dimensions.
    """
    if not predictions:
        raise ProfileError("no predictions")
    error = None
    if outcomes is not None:
        errors = relative_errors(np.asarray(outcome_predictions), np.asarray(outcomes))
        error = float(np.median(np.abs(errors))) if len(errors) else None
    return ReferenceProfile(
        features={name: describe_column(values) for name, values in features.items()},
        predictions={name: describe_column(values) for name, values in predictions.items()},
        prediction=next(iter(predictions)),
        error=error,
    )


def describe_column(values: Any) -> ColumnReference:
    """
    Describe one column.

    Raises:
        ProfileError: it has no rows, or is not one-dimensional.
    """
    array = np.asarray(values)
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim != 1 or not len(array):
        raise ProfileError(f"expected a column with rows, got shape {array.shape}")
    if array.dtype.kind in "biuf":
        return _describe_numbers(array)
    texts = [None if _is_missing(value) else value for value in array.tolist()]
    present = [value for value in texts if value is not None]
    if present and all(isinstance(value, numbers.Real | np.bool_) for value in present):
        return _describe_numbers(np.array([np.nan if v is None else float(v) for v in texts]))
    return _describe_levels(texts)


def as_numbers(values: NDArray[Any]) -> NDArray[np.float32]:
    """Return finite numbers or truth values in the precision they are compared in."""
    if values.dtype == np.float64:
        values = np.clip(values, -_FLOAT32_MAX, _FLOAT32_MAX)
    return values.astype(np.float32, copy=False)


def relative_errors(predictions: NDArray[Any], outcomes: NDArray[Any]) -> NDArray[np.float64]:
    """Return prediction / outcome − 1 where it is defined, cut off at ± `RATIO_MAX`."""
    predictions = predictions.astype(np.float64).ravel()
    outcomes = outcomes.astype(np.float64).ravel()
    defined = (outcomes != 0) & np.isfinite(outcomes) & np.isfinite(predictions)
    with np.errstate(over="ignore"):
        ratios: NDArray[np.float64] = predictions[defined] / outcomes[defined] - 1
    return np.clip(ratios, -RATIO_MAX, RATIO_MAX)


def as_level(value: Any) -> str | None:
    """Return the level a text or truth value counts for; None for a missing one."""
    if value is None:
        return None
    data = value if isinstance(value, bytes) else str(value).encode(errors="replace")
    return data[:TEXT_BYTES_MAX].decode(errors="replace")


def _describe_numbers(values: NDArray[Any]) -> NumericReference:
    finite = as_numbers(values[np.isfinite(values)])
    missing = int(len(values) - len(finite))
    if not len(finite):
        return NumericReference((0.0, 0.0), (0,), missing)
    quantiles = np.quantile(finite, np.arange(BIN_COUNT + 1) / BIN_COUNT, method="inverted_cdf")
    repeated, times = np.unique(quantiles, return_counts=True)
    # A value that spans several quantiles gets a bin of its own: its upper edge is the value, its
    # lower edge the number just below, or the value itself for the least one.
    frequent = repeated[times > 1]
    below = np.nextafter(frequent[frequent > repeated[0]], np.float32(-np.inf))
    edges = np.union1d(repeated, below)
    if repeated[0] in frequent:
        edges = np.concatenate([repeated[:1], edges])
    counts = _count(edges, finite)
    # Between two frequent values there may be none: such a bin goes to the one above it.
    edges = np.delete(edges, 1 + np.flatnonzero(counts[:-1] == 0))
    return NumericReference(
        edges=tuple(edges.tolist()),
        counts=tuple(_count(edges, finite).tolist()),
        missing=missing,
    )


def _count(edges: NDArray[np.float32], values: NDArray[np.float32]) -> NDArray[np.int64]:
    bins = np.searchsorted(edges[1:-1], values, side="left")
    return np.bincount(bins, minlength=len(edges) - 1)


def _is_missing(value: Any) -> bool:
    if value is None:
        return True
    try:
        return bool(value != value)  # noqa: PLR0124 only NaN and NaT are
    except TypeError:  # pandas.NA, which is not even true or false
        return True


def _describe_levels(values: Sequence[Any]) -> CategoricalReference:
    counts: dict[str, int] = {}
    missing = 0
    for value in values:
        level = as_level(value)
        if level is None:
            missing += 1
        else:
            counts[level] = counts.get(level, 0) + 1
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    kept, rest = ranked[:LEVELS_MAX], ranked[LEVELS_MAX:]
    return CategoricalReference(
        levels=tuple(level for level, _ in kept),
        counts=tuple(count for _, count in kept),
        other=sum(count for _, count in rest),
        missing=missing,
    )


def _written(column: ColumnReference) -> dict[str, Any]:
    kind = "numeric" if isinstance(column, NumericReference) else "categorical"
    return {"kind": kind, **asdict(column)}


def _read_columns(columns: Mapping[str, Any]) -> dict[str, ColumnReference]:
    return {str(name): _read_column(dict(column)) for name, column in columns.items()}


def _read_column(column: dict[str, Any]) -> ColumnReference:
    kind = column.pop("kind")
    lists: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in column.items()}
    if kind == "numeric":
        return NumericReference(**lists)
    if kind == "categorical":
        return CategoricalReference(**lists)
    raise ProfileError(f"a column is neither numeric nor categorical but {str(kind)[:32]!r}")


def _check_counts(counts: tuple[Any, ...]) -> None:
    if not all(type(count) is int and 0 <= count <= COUNT_MAX for count in counts):
        raise ProfileError(f"counts must be whole numbers from 0 to {COUNT_MAX}")
