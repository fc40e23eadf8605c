"""Features as they were served against what the offline store has for the same moment.

A model learns from the offline store and lives on the online one: where the two differ it is asked
about a world that it has not seen.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from headrace.features.logged_plan import LoggedFeature, LoggedPlan, LoggedView
from headrace.features.plan import FeatureStatus
from headrace.features.skew_values import Tolerance, differences, shown
from headrace.features.values import ValueType

_ASKABLE_US = 9_000_000_000_000_000
"""Pandas' datetimes reach back so far, to 1684; what lies beyond is damaged."""

AFTER_EVENT_US = 2
"""Added to an event time to be surely not before it: the log rounds it to microseconds."""


class OfflineColumn(NamedTuple):
    """
    A feature as the offline store has it.

    Args:
        values: Shape (n,), of any dtype; anything where it is missing.
        present: Shape (n,).
    """

    values: NDArray[Any]
    present: NDArray[np.bool_]


class OfflineFeatures(Protocol):
    """An offline store, asked point in time."""

    def read(
        self,
        view: str,
        features: Sequence[str],
        keys: Mapping[str, tuple[ValueType, Sequence[Any]]],
        times_us: NDArray[np.int64],
    ) -> dict[str, OfflineColumn]:
        """
        Read one row of features per entity, each as of its own time, the view's TTL kept.

        Args:
            view: The name under which the store holds the view.
            features: Their names in the view.
            keys: By the view's own join keys: their type, and one per row.
            times_us: Unix microseconds, shape (n,).
        """
        ...

    def ttl_s(self, view: str) -> float | None:
        """
        Return how old a row may be that is read of a view; None is for ever.

        Args:
            view: The name under which the store holds it. 0 where nobody knows.
        """
        ...


class Example(NamedTuple):
    """One mismatch, to begin looking with; a feature read has no prediction id."""

    prediction_id: str | None
    entity: dict[str, Any]
    online: Any
    offline: Any


@dataclass(slots=True)
class FeatureTally:
    """
    What became of one feature's rows.

    A row is compared when either side has a value. *Late* is a row that mismatches, but whose
    online value, or null, is what the offline store had at its own event time, and has no more
    since there is a newer row, not since that one is beyond its TTL: right once, but the newer row
    had not been materialized when it was served. It is compared, and no mismatch.

    Args:
        feature: As served.
        view: The name under which the store holds its view.
    """

    feature: str
    view: str
    rows: int = 0
    compared: int = 0
    differing: int = 0
    """Both sides have a value, and another one."""
    missing_online: int = 0
    """Null, absent or too old online; there offline."""
    missing_offline: int = 0
    late: int = 0
    distances: int = 0
    distance_sum: float = 0.0
    distance_max: float = 0.0
    example: Example | None = None

    @property
    def mismatch_share(self) -> float:
        """Of the compared rows, those that differ or are missing on one side."""
        mismatches = self.differing + self.missing_online + self.missing_offline
        return mismatches / self.compared if self.compared else 0.0

    @property
    def late_share(self) -> float:
        """Of the compared rows."""
        return self.late / self.compared if self.compared else 0.0

    @property
    def mean_distance(self) -> float | None:
        """Mean |online − offline| of rows with both that are not late; None for no numbers."""
        return self.distance_sum / self.distances if self.distances else None

    @property
    def max_distance(self) -> float | None:
        return self.distance_max if self.distances else None


@dataclass(slots=True)
class _Side:
    """One feature of a chunk, both sides."""

    feature: LoggedFeature
    online: NDArray[Any]
    known: NDArray[np.bool_]
    """Whether there is an online value; the model may not have seen it, being too old."""
    null: NDArray[np.bool_]
    """Whether the online store says that there is none."""
    seen: NDArray[np.bool_]
    offline: OfflineColumn
    differs: NDArray[np.bool_]
    distance: NDArray[np.float64]
    late: NDArray[np.bool_]

    @property
    def suspect(self) -> NDArray[np.bool_]:
        """Rows that mismatch and may be late."""
        present = self.offline.present
        return self.differs | (self.null & present) | (self.seen & ~present)


def compare(
    plan: LoggedPlan,
    rows: pa.Table,
    offline: OfflineFeatures,
    tolerance: Tolerance,
    tallies: Mapping[LoggedFeature, FeatureTally],
) -> None:
    """
    Compare logged rows with the offline store, view by view.

    Views are read one by one because Feast's file store leaves a row out altogether when one of
    several views has only too old or too new values for it (feast 0.67 `offline_stores/dask.py`).

    Args:
        plan: What the rows are.
        rows: As `skew_file` writes them.
        offline: Asked as of each row's request, and again, for rows that differ, as of the event
            time of what was served.
        tolerance: For floating point.
        tallies: Added to; features without one are left out.
    """
    rows = rows.combine_chunks()
    for i, view in enumerate(plan.views):
        own = [of for of in plan.features if of.view == i and of in tallies]
        if own:
            _compare_view(view, own, rows, offline, tolerance, tallies)


def _compare_view(
    view: LoggedView,
    features: Sequence[LoggedFeature],
    rows: pa.Table,
    offline: OfflineFeatures,
    tolerance: Tolerance,
    tallies: Mapping[LoggedFeature, FeatureTally],
) -> None:
    names = list(dict.fromkeys(of.feature for of in features))
    keys = {
        base: (ValueType(kind), rows[f"key.{name}"].to_pylist())
        for base, name, kind in view.join_keys
    }
    requested_us = _microseconds(rows["request_time"])
    found = offline.read(view.name, names, keys, requested_us)
    sides = [_side(of, rows, found[of.feature], tolerance) for of in features]
    event_us = _microseconds(rows[view.column])
    suspect = np.zeros(len(rows), np.bool_)
    for side in sides:
        suspect |= side.suspect
    suspect &= rows[view.column].is_valid().to_numpy() & (event_us > -_ASKABLE_US)
    suspect &= event_us <= requested_us  # what comes from the future is not late
    places = np.flatnonzero(suspect)
    if places.size:
        then = offline.read(
            view.name,
            names,
            {base: (kind, [of[i] for i in places.tolist()]) for base, (kind, of) in keys.items()},
            event_us[places] + AFTER_EVENT_US,
        )
        ttl_s = offline.ttl_s(view.name)
        would_be_found = np.ones(len(rows), np.bool_)
        if ttl_s is not None:
            would_be_found = requested_us - event_us <= ttl_s * 1e6
        for side in sides:
            is_replaced = side.offline.present | would_be_found
            _mark_late(side, places, then[side.feature.feature], is_replaced, tolerance)
    for side in sides:
        _count(tallies[side.feature], side, view, rows)


def _side(
    feature: LoggedFeature, rows: pa.Table, offline: OfflineColumn, tolerance: Tolerance
) -> _Side:
    value_type = ValueType(feature.value_type)
    column = rows[f"value.{feature.name}"]
    known = column.is_valid().to_numpy()
    if value_type.dtype.kind == "O":
        online = np.empty(len(column), np.object_)
        online[:] = column.to_pylist()
    else:
        online = pc.fill_null(column, pa.scalar(0).cast(column.type)).to_numpy()
        if online.dtype.kind == "f":
            known &= ~np.isnan(online)  # offline stores do not tell it from null
    status = rows[f"status.{feature.name}"].cast(pa.string())
    seen = known & pc.equal(status, FeatureStatus.PRESENT.name).to_numpy()
    null = ~known & pc.not_equal(status, FeatureStatus.NOT_FOUND.name).to_numpy()
    differs = np.zeros(len(online), np.bool_)
    distance = np.full(len(online), np.nan)
    both = known & offline.present
    differs[both], distance[both] = differences(
        value_type, online[both], offline.values[both], tolerance
    )
    late = np.zeros(len(online), np.bool_)
    return _Side(feature, online, known, null, seen, offline, differs, distance, late)


def _mark_late(
    side: _Side,
    places: NDArray[np.intp],
    then: OfflineColumn,
    is_replaced: NDArray[np.bool_],
    tolerance: Tolerance,
) -> None:
    """
    Find the late ones among suspects.

    Args:
        side: Told of them.
        places: Of the suspects among the rows.
        then: What the offline store had at their event times.
        is_replaced: For all rows, whether only a newer row can hide what was there then.
        tolerance: For floating point.
    """
    suspect = side.suspect[places]
    side.late[places[suspect & side.null[places] & ~then.present]] = True
    asked = suspect & side.known[places] & then.present & is_replaced[places]
    own = places[asked]
    differs, _ = differences(
        ValueType(side.feature.value_type), side.online[own], then.values[asked], tolerance
    )
    side.late[own[~differs]] = True


def _count(tally: FeatureTally, side: _Side, view: LoggedView, rows: pa.Table) -> None:
    present = side.offline.present
    differing = side.seen & present & side.differs & ~side.late
    missing_online = ~side.seen & present & ~side.late
    missing_offline = side.seen & ~present & ~side.late
    tally.rows += len(rows)
    tally.compared += int((side.seen | present).sum())
    tally.differing += int(differing.sum())
    tally.missing_online += int(missing_online.sum())
    tally.missing_offline += int(missing_offline.sum())
    tally.late += int(side.late.sum())
    distances = side.distance[side.seen & present & ~side.late]
    distances = distances[~np.isnan(distances)]
    if distances.size:
        tally.distances += len(distances)
        tally.distance_sum += float(distances.sum())
        tally.distance_max = max(tally.distance_max, float(distances.max()))
    if tally.example is None:
        for mismatches in (differing, missing_online, missing_offline):
            if mismatches.any():
                tally.example = _example(side, view, rows, int(np.argmax(mismatches)))
                break


def _example(side: _Side, view: LoggedView, rows: pa.Table, at: int) -> Example:
    kind = ValueType(side.feature.value_type)
    return Example(
        prediction_id=rows["prediction_id"][at].as_py(),
        entity={name: rows[f"key.{name}"][at].as_py() for _, name, _ in view.join_keys},
        online=_plain(shown(kind, side.online[at])) if side.seen[at] else None,
        offline=_plain(shown(kind, side.offline.values[at])) if side.offline.present[at] else None,
    )


def _plain(value: Any) -> Any:
    """Return a value that is plain Python, or text."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, np.ndarray | list):
        return [_plain(one) for one in value]
    return value if isinstance(value, bool | int | float | str) else str(value)


def _microseconds(column: Any) -> NDArray[np.int64]:
    array: NDArray[np.int64] = pc.fill_null(column.cast(pa.int64()), 0).to_numpy()
    return array
