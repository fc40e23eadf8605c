"""What every online store promises, and the rows that it returns."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from headrace.features.plan import FeaturePlan, FeatureStatus


@dataclass(frozen=True, slots=True)
class FeatureRows:
    """
    The features of a batch of rows, one column per feature.

    Args:
        blocks: The values by dtype, shape (n, features of that dtype), C order; which column is
            whose, `plan.block_columns` says. A value is given where its status is PRESENT or
            OUTSIDE_MAX_AGE; elsewhere it is NaN, 0, False or None.
        statuses: `FeatureStatus`, shape (features, n).
        event_times_s: Unix seconds, shape (views, n); NaN where unknown.
        matrix: When every feature is float32: shape (n, features), C order, and `values` are its
            columns. Otherwise None.
        block_columns: The plan's.
        stored: What was read, with the plan's `stored`, where features were computed from it.

    Attributes:
        is_complete: Whether every status is PRESENT: then nobody need look at them.
    """

    blocks: Mapping[np.dtype[Any], NDArray[Any]]
    statuses: NDArray[np.uint8]
    event_times_s: NDArray[np.float64]
    matrix: NDArray[np.float32] | None
    block_columns: Sequence[tuple[np.dtype[Any], int]]
    stored: "FeatureRows | None" = None
    is_complete: bool = field(init=False)
    _values: tuple[NDArray[Any], ...] | None = field(init=False, default=None, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "is_complete", bool((self.statuses == _PRESENT).all()))

    @property
    def values(self) -> tuple[NDArray[Any], ...]:
        """The columns of `blocks`, one per `plan.features`, shape (n,)."""
        if self._values is None:  # a model that takes the whole matrix never asks
            columns = [self.blocks[dtype][:, column] for dtype, column in self.block_columns]
            object.__setattr__(self, "_values", tuple(columns))
        assert self._values is not None
        return self._values

    def count_statuses(self) -> NDArray[np.int64]:
        """Return how many values there are of each status, by its number."""
        if self.is_complete:
            counts = np.zeros(_STATUS_COUNT, np.int64)
            counts[_PRESENT] = self.statuses.size
            return counts
        return np.bincount(self.statuses.ravel(), minlength=_STATUS_COUNT)


class OnlineStore(Protocol):
    """
    Where the latest feature values are. Safe for several threads at once.

    A value that is damaged or of another type than the registry declares is NULL_VALUE, counted and
    logged: one bad writer must not stop the service of every other feature.
    """

    @property
    def mismatches(self) -> int:
        """How many such values have been met."""
        ...

    @property
    def cache_hits(self) -> int:
        """Rows served that had been read before."""
        ...

    @property
    def cache_misses(self) -> int:
        """Rows that were looked for among those, and read."""
        ...

    @property
    def cache_invalidations(self) -> int:
        """Rows dropped from those because they were written."""
        ...

    def read(
        self,
        plan: FeaturePlan,
        entities: Mapping[str, NDArray[Any]],
        *,
        now_s: float,
        timeout_s: float,
        max_age_s: float | None = None,
    ) -> FeatureRows:
        """
        Read one row of features per entity.

        An entity that occurs several times may be read once. A BYTES key of a text join key that is
        not UTF-8 names no entity.

        Args:
            plan: What to read.
            entities: By `plan.request_columns[*].name`, each of shape (n,): of the column's dtype
                or, for BYTES ones, an object array of `bytes`. n is at least 1.
            now_s: Unix seconds, for the ages.
            timeout_s: The longest this may take.
            max_age_s: Older values are OUTSIDE_MAX_AGE, besides each view's own TTL.

        Raises:
            FeatureStoreUnavailable: no answer, not in time, or not one of this store's.
            ComputationFailed: an on-demand feature view's code failed with these rows.
        """
        ...

    def is_held_off(self) -> bool:
        """Return whether reads are refused for now, the store having failed too often."""
        ...

    def check(self) -> None:
        """
        Ask the store for a sign of life.

        Raises:
            FeatureStoreUnavailable: there is none.
        """
        ...

    def close(self) -> None:
        """Let go of every connection. A read that is under way may fail."""
        ...


class RowBlocks:
    """
    Rows being put together: one 2-D block per dtype. Not set to anything until `clear`.

    Args:
        plan: Which features and views.
        rows: How many rows.
    """

    def __init__(self, plan: FeaturePlan, rows: int) -> None:
        self.plan = plan
        self.blocks: dict[np.dtype[Any], NDArray[Any]] = {
            dtype: np.empty((rows, width), dtype) for dtype, width in plan.block_widths.items()
        }
        self.statuses: NDArray[np.uint8] = np.empty((len(plan.features), rows), np.uint8)
        self.event_times_s: NDArray[np.float64] = np.empty((len(plan.views), rows))

    def clear(self) -> None:
        """Make every value NOT_FOUND."""
        for dtype, block in self.blocks.items():
            block[:] = _FILLERS[dtype.kind]
        self.statuses[:] = FeatureStatus.NOT_FOUND
        self.event_times_s[:] = np.nan

    def put(self, feature: int, row: int, value: Any) -> None:
        """Set one value, found to be PRESENT, or NULL_VALUE when it is None."""
        status = FeatureStatus.NULL_VALUE if value is None else FeatureStatus.PRESENT
        self.statuses[feature, row] = status
        if value is not None:
            dtype, column = self.plan.block_columns[feature]
            self.blocks[dtype][row, column] = value

    def finish(self, now_s: float, max_age_s: float | None) -> FeatureRows:
        """Judge the ages and hand over the rows."""
        mark_outside_max_age(self.plan, self.statuses, self.event_times_s, now_s, max_age_s)
        return self.as_rows()

    def as_rows(self, stored: FeatureRows | None = None) -> FeatureRows:
        """Hand over the rows, their ages judged already."""
        plan = self.plan
        return FeatureRows(
            blocks=self.blocks,
            statuses=self.statuses,
            event_times_s=self.event_times_s,
            matrix=next(iter(self.blocks.values())) if plan.is_float32 else None,
            block_columns=plan.block_columns,
            stored=stored,
        )


def mark_outside_max_age(
    plan: FeaturePlan,
    statuses: NDArray[np.uint8],
    event_times_s: NDArray[np.float64],
    now_s: float,
    max_age_s: float | None,
) -> None:
    """
    Turn PRESENT into OUTSIDE_MAX_AGE, in place, where a value is too old.

    The limit is the view's TTL or `max_age_s`, whichever is smaller. A value exactly that old is
    not too old; one whose event time is unknown is, where there is a limit.
    """
    if max_age_s is None and not plan.has_ttl:
        return
    limits_s = plan.ttls_s if max_age_s is None else np.minimum(plan.ttls_s, max_age_s)
    limited = limits_s < np.inf
    if not limited.any():
        return
    oldest_s = (now_s - limits_s)[:, None]
    outside = ~(event_times_s >= oldest_s) & limited[:, None]
    if outside.any():
        outside = outside[plan.view_of_feature] & (statuses == FeatureStatus.PRESENT)
        statuses[outside] = FeatureStatus.OUTSIDE_MAX_AGE


def row_count(plan: FeaturePlan, entities: Mapping[str, NDArray[Any]]) -> int:
    """
    Return n.

    Raises:
        ValueError: the service has no request columns at all and no array says how many rows
            there are, or the arrays differ in length. A caller's check has gone wrong.
    """
    counts = {len(entities[column.name]) for column in plan.request_columns}
    if not counts:
        counts = {len(array) for array in entities.values()} or {1}
    if len(counts) != 1:
        raise ValueError(f"entity columns of different lengths: {sorted(counts)}")
    return counts.pop()


_PRESENT = np.uint8(FeatureStatus.PRESENT)  # numpy converts a member of an enum each time
_STATUS_COUNT = max(FeatureStatus) + 1
_FILLERS: dict[str, Any] = {"f": np.nan, "i": 0, "b": False, "O": None}
