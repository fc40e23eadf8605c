"""An online store that computes on-demand features from what another one holds."""

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import structlog
from numpy.typing import NDArray

from headrace.errors import ComputationFailed, UnusableValues
from headrace.features.feast_import import import_feast
from headrace.features.plan import ComputedView, FeaturePlan, FeatureStatus, PlannedFeature
from headrace.features.store import FeatureRows, OnlineStore, RowBlocks, row_count
from headrace.features.values import ValueMismatchError, ValueType, encode_message, message_value

_log = structlog.get_logger(__name__)


class OnDemandStore:
    """
    An `OnlineStore` over another, whose plans may have computed features.

    A computed feature is PRESENT, or NULL_VALUE where the code gives None or a value of another
    type; OUTSIDE_MAX_AGE where a stored feature that its code is given is. It has no event time.
    The code is given what is too old, and None for what is missing.

    It runs on the thread that reads, for a batch at a time, with no limit: it must judge each row
    by itself, and be quick.

    Args:
        store: Holds the stored features.
    """

    def __init__(self, store: OnlineStore) -> None:
        self._store = store
        self._mismatches = 0
        self._failed: set[str] = set()

    @property
    def mismatches(self) -> int:
        """Values met, stored or computed, that were not of their feature's type."""
        return self._store.mismatches + self._mismatches

    @property
    def cache_hits(self) -> int:
        """As the other store counts them."""
        return self._store.cache_hits

    @property
    def cache_misses(self) -> int:
        """As the other store counts them."""
        return self._store.cache_misses

    @property
    def cache_invalidations(self) -> int:
        """As the other store counts them."""
        return self._store.cache_invalidations

    def read(
        self,
        plan: FeaturePlan,
        entities: Mapping[str, NDArray[Any]],
        *,
        now_s: float,
        timeout_s: float,
        max_age_s: float | None = None,
    ) -> FeatureRows:
        """Read the stored features of a plan, and compute the others; see `OnlineStore.read`."""
        columns = _request_values(plan, entities) if plan.computed else {}
        stored = None
        if read := plan.stored or (None if plan.computed else plan):
            stored = self._store.read(
                read, entities, now_s=now_s, timeout_s=timeout_s, max_age_s=max_age_s
            )
        if not plan.computed:
            assert stored is not None
            return stored
        rows = row_count(plan, entities)
        blocks = RowBlocks(plan, rows)
        blocks.clear()
        if plan.stored is not None and stored is not None:
            _copy(plan, plan.stored, blocks, stored)
        for view in plan.computed:
            self._compute(plan, view, columns, stored, blocks)
        return blocks.as_rows(stored)

    def is_held_off(self) -> bool:
        """Say what the other store says."""
        return self._store.is_held_off()

    def check(self) -> None:
        """Ask the other store for a sign of life."""
        self._store.check()

    def close(self) -> None:
        """Close the other store."""
        self._store.close()

    def _compute(
        self,
        plan: FeaturePlan,
        view: ComputedView,
        columns: Mapping[str, list[Any]],
        stored: FeatureRows | None,
        blocks: RowBlocks,
    ) -> None:
        given = {name: columns[name] for name in view.columns}
        types = {column.name: column.value_type for column in plan.request_columns}
        count = blocks.statuses.shape[1]
        try:
            if plan.stored is not None and stored is not None:
                for name, place in view.inputs:
                    feature = plan.stored.features[place]
                    given[name] = self._values(feature, stored, place)
                    types[name] = feature.value_type
            results = view.code.run(given, count, types)
            for place in view.features:
                self._put(plan, place, results, blocks)
        except Exception as error:
            if view.name not in self._failed:  # callers hear of every time, the log of the first
                self._failed.add(view.name)
                _log.exception("on_demand_view_failed", view=view.name)
            raise ComputationFailed(
                f"the code of on-demand feature view '{view.name}' failed with these values"
            ) from error
        if stored is None:
            return
        places = sorted({place for _, place in view.inputs})
        outside = (stored.statuses[places] == FeatureStatus.OUTSIDE_MAX_AGE).any(0)
        for place in view.features:
            statuses = blocks.statuses[place]
            statuses[outside & (statuses == FeatureStatus.PRESENT)] = FeatureStatus.OUTSIDE_MAX_AGE

    def _values(self, feature: PlannedFeature, rows: FeatureRows, place: int) -> list[Any]:
        """Return a feature's values as Feast gives them to its code."""
        values: list[Any] = rows.values[place].tolist()
        statuses = rows.statuses[place]
        found = (statuses == FeatureStatus.PRESENT) | (statuses == FeatureStatus.OUTSIDE_MAX_AGE)
        if not found.all():
            values = [value if one else None for value, one in zip(values, found, strict=True)]
        if feature.dtype.kind in "fb" or feature.value_type in _AS_THEY_ARE:
            return values
        try:
            return _python_values(values, feature.value_type)
        except _UNUSABLE:  # somebody has written what Python has no value for: a null to the code
            return [self._python_value(value, feature.value_type) for value in values]

    def _python_value(self, value: Any, value_type: ValueType) -> Any:
        try:
            return _python_values([value], value_type)[0]
        except _UNUSABLE:
            self._mismatches += 1
            return None

    def _put(
        self, plan: FeaturePlan, place: int, results: Mapping[str, list[Any]], blocks: RowBlocks
    ) -> None:
        import_feast()
        from feast.type_map import python_values_to_proto_values  # noqa: PLC0415 - seconds
        from feast.value_type import ValueType as FeastValueType  # noqa: PLC0415 - as above

        feature = plan.features[place]
        # Feast's own conversion: what a result may look like is its business.
        messages = python_values_to_proto_values(
            results[feature.feature], FeastValueType(int(feature.value_type))
        )
        for row, message in enumerate(messages):
            try:
                value = message_value(message, feature.value_type)
            except ValueMismatchError:
                self._mismatches += 1
                value = None
            blocks.put(place, row, value)


def _copy(
    plan: FeaturePlan, stored_plan: FeaturePlan, blocks: RowBlocks, stored: FeatureRows
) -> None:
    """Copy the stored features of a plan, as they were read with its `stored`."""
    places = {of.name: i for i, of in enumerate(stored_plan.features)}
    computed = {i for view in plan.computed for i in view.features}
    for i, feature in enumerate(plan.features):
        if i in computed:
            continue
        label = plan.views[feature.view_index].label
        place = places[f"{label}__{feature.feature}"]
        dtype, column = plan.block_columns[i]
        blocks.blocks[dtype][:, column] = stored.values[place]
        blocks.statuses[i] = stored.statuses[place]
        blocks.event_times_s[feature.view_index] = stored.event_times_s[
            stored_plan.features[place].view_index
        ]


def _request_values(
    plan: FeaturePlan, entities: Mapping[str, NDArray[Any]]
) -> dict[str, list[Any]]:
    values = {}
    for column in plan.request_columns:
        own = entities[column.name].tolist()
        if column.value_type is ValueType.STRING:
            own = [text.decode(errors="replace") for text in own]
        elif column.value_type is ValueType.UNIX_TIMESTAMP:
            own = [_moment(seconds, column.name) for seconds in own]
        values[column.name] = own
    return values


def _moment(seconds: int, column: str) -> datetime:
    try:
        return datetime.fromtimestamp(seconds, UTC)  # as Feast does
    except _UNUSABLE:
        raise UnusableValues(
            f"'{column}' is {seconds}; expected seconds since 1970 of the years 1 to 9999"
        ) from None


def _python_values(values: list[Any], value_type: ValueType) -> list[Any]:
    import_feast()
    from feast.protos.feast.types.Value_pb2 import Value  # noqa: PLC0415 - seconds to import
    from feast.type_map import feast_value_type_to_python_type  # noqa: PLC0415 - as above

    messages = [
        None if value is None else Value.FromString(encode_message(value, value_type))
        for value in values
    ]
    found: list[Any] = [one and feast_value_type_to_python_type(one) for one in messages]
    return found


_UNUSABLE = (OverflowError, ValueError, OSError, ArithmeticError)
_AS_THEY_ARE = frozenset({ValueType.INT32, ValueType.INT64, ValueType.STRING, ValueType.BYTES})
