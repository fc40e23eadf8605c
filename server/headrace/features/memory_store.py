"""Online features in a dict: for tests, first runs and examples. Nothing outlives the process."""

import threading
from collections.abc import Mapping
from typing import Any

from numpy.typing import NDArray

from headrace.features.plan import FeaturePlan
from headrace.features.store import FeatureRows, RowBlocks, row_count

_Entity = frozenset[tuple[str, int | bytes]]


class MemoryStore:
    """
    An `OnlineStore` that holds what `put` gave it.

    Example:
        >>> store = MemoryStore()
        >>> store.put("driver_stats", {"driver_id": 1001}, {"rating": 4.5}, event_time_s=1.7e9)
    """

    def __init__(self) -> None:
        self._rows: dict[tuple[str, _Entity], tuple[dict[str, Any], float]] = {}
        self._lock = threading.Lock()
        self.mismatches = self.cache_hits = self.cache_misses = self.cache_invalidations = 0

    def put(
        self,
        view: str,
        entity: Mapping[str, int | str | bytes],
        values: Mapping[str, Any],
        event_time_s: float,
    ) -> None:
        """
        Write one row of a view, over the one that was there.

        Args:
            view: The view's name.
            entity: By the view's own join keys; empty for a view without entities.
            values: By feature, of the type that the plans declare; None is null, a feature left
                out is not found.
            event_time_s: Unix seconds.
        """
        with self._lock:
            self._rows[view, _entity(entity)] = dict(values), event_time_s

    def read(
        self,
        plan: FeaturePlan,
        entities: Mapping[str, NDArray[Any]],
        *,
        now_s: float,
        timeout_s: float,  # noqa: ARG002 - there is nothing to wait for
        max_age_s: float | None = None,
    ) -> FeatureRows:
        count = row_count(plan, entities)
        blocks = RowBlocks(plan, count)
        blocks.clear()
        for group in plan.groups:
            columns = [entities[plan.join_keys[i].name].tolist() for i in group.join_keys]
            keys = list(zip(*columns, strict=True)) if columns else [()] * count
            for row, key in enumerate(keys):
                entity = frozenset(zip(group.base_names, key, strict=True))
                for view in group.views:
                    stored = self._rows.get((plan.views[view].name, entity))
                    if stored is not None:
                        blocks.event_times_s[view, row] = stored[1]
                        _put_row(blocks, view, row, stored[0])
        return blocks.finish(now_s, max_age_s)

    def is_held_off(self) -> bool:
        return False

    def check(self) -> None:
        """Do nothing: memory is always there."""

    def close(self) -> None:
        with self._lock:
            self._rows.clear()


def _put_row(blocks: RowBlocks, view: int, row: int, values: Mapping[str, Any]) -> None:
    for i, feature in enumerate(blocks.plan.features):
        if feature.view_index == view and feature.feature in values:
            blocks.put(i, row, values[feature.feature])


def _entity(entity: Mapping[str, int | str | bytes]) -> _Entity:
    return frozenset(
        (name, value.encode() if isinstance(value, str) else value)
        for name, value in entity.items()
    )
