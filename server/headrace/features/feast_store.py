"""Online features through Feast's own client: for every online store that Feast supports.

Slower than `redis_store` by far (Feast works cell by cell), and the way to the other twenty stores.
One thread of its own talks to Feast, whose stores do not promise to be safe for several and have no
timeouts; a caller waits for it no longer than it said.
"""

import queue
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

import numpy as np
import structlog
from numpy.typing import NDArray

from headrace.errors import FeatureStoreUnavailable
from headrace.features.breaker import PATIENCE_S
from headrace.features.feast_import import import_feast
from headrace.features.plan import FeaturePlan, PlannedFeature
from headrace.features.store import FeatureRows, RowBlocks, row_count
from headrace.features.values import ValueMismatchError, ValueType, message_value

if TYPE_CHECKING:  # Feast takes seconds to import
    from feast import RepoConfig
    from feast.infra.provider import Provider

CHECK_TIMEOUT_S = 1.0
MAX_WAITING = 256
"""Reads that may wait for Feast's thread. More only wait for their timeouts."""

_UNAVAILABLE = "the online feature store does not answer"
_log = structlog.get_logger(__name__)


class FeastStore:
    """
    An `OnlineStore` over `FeatureStore.get_online_features`.

    Feast reports a row that is not there as PRESENT, null and of the year 1970, so here a null
    whose event time is 1970 is NOT_FOUND, and one with any other is NULL_VALUE: a feature missing
    from a row that exists is NULL_VALUE, where `RedisStore` says NOT_FOUND.

    Feast is given the state of the registry that a plan was compiled from, without the code in it
    (`pinned_registry`); it looks at no registry itself.

    Args:
        config: Feast's settings of the repository.
        provider: Feast's way to its store; made from `config` when None.
        patience_s: A read that had less than this and was not answered says nothing of the store.
    """

    def __init__(
        self,
        config: "RepoConfig",
        provider: "Provider | None" = None,
        *,
        patience_s: float = PATIENCE_S,
    ) -> None:
        self.mismatches = self.cache_hits = self.cache_misses = self.cache_invalidations = 0
        """Values met that were not of their feature's type."""
        self._config = config
        self._provider = provider
        self._patience_s = patience_s
        # What Feast calls a plan: looking a service up costs it milliseconds.
        self._selections: weakref.WeakKeyDictionary[FeaturePlan, Any] = weakref.WeakKeyDictionary()
        self._work: queue.Queue[tuple[Callable[[], Any], Future[Any]] | None] = queue.Queue(
            MAX_WAITING
        )
        self._is_up = True
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="feast-store", daemon=True)
        self._thread.start()

    def read(
        self,
        plan: FeaturePlan,
        entities: Mapping[str, NDArray[Any]],
        *,
        now_s: float,
        timeout_s: float,
        max_age_s: float | None = None,
    ) -> FeatureRows:
        count = row_count(plan, entities)
        rows = {key.name: entities[key.name].tolist() for key in plan.join_keys}
        for key in plan.join_keys:
            if key.value_type is ValueType.STRING:
                rows[key.name] = [text.decode(errors="replace") for text in rows[key.name]]
        response = self._call(lambda: self._ask(plan, rows, count), timeout_s)
        blocks = RowBlocks(plan, count)
        blocks.clear()
        vectors = dict(zip(response.metadata.feature_names.val, response.results, strict=True))
        for i, feature in enumerate(plan.features):
            vector = vectors.get(feature.name)
            if vector is None or len(vector.values) != count:
                _log.error("feast_answer_incomplete", view=feature.view, feature=feature.feature)
                raise FeatureStoreUnavailable(_UNAVAILABLE)
            times_s = np.array([t.seconds + t.nanos * 1e-9 for t in vector.event_timestamps])
            exists = times_s != 0
            blocks.event_times_s[feature.view_index, exists] = times_s[exists]
            for row, message in enumerate(vector.values):
                value = self._value(feature, message)
                if exists[row] or value is not None:
                    blocks.put(i, row, value)
        return blocks.finish(now_s, max_age_s)

    def is_held_off(self) -> bool:
        return False

    def check(self) -> None:
        """
        Ask Feast's thread for a sign of life; Feast has no way to ask its store for one.

        Raises:
            FeatureStoreUnavailable: the thread is stuck in a read, or the store is closed.
        """
        self._call(lambda: None, CHECK_TIMEOUT_S)

    def close(self) -> None:
        self._is_closed = True
        try:
            self._work.put_nowait(None)
        except queue.Full:  # the thread is stuck in Feast; it is a daemon
            _log.warning("feast_store_stuck")

    def _ask(self, plan: FeaturePlan, rows: dict[str, list[Any]], count: int) -> Any:
        assert plan.registry is not None, "a plan that no feature repository compiled"
        registry = plan.registry.online
        if self._provider is None:
            import_feast()
            from feast.infra.provider import get_provider  # noqa: PLC0415 - seconds to import

            self._provider = get_provider(self._config)
        features = self._selections.get(plan)
        if features is None:
            features = list(plan.references)
            if not features:
                features = registry.get_feature_service(plan.service, plan.project)
            self._selections[plan] = features
        # Feast wants a column even where no view has an entity; it ignores unknown ones.
        columns = rows or {"__rows": [0] * count}
        return self._provider.get_online_features(
            config=self._config,
            features=features,
            entity_rows=columns,
            registry=registry,
            project=plan.project,
            full_feature_names=plan.full_feature_names,
        ).proto

    def _call(self, function: Callable[[], Any], timeout_s: float) -> Any:
        """Run `function` on Feast's thread."""
        if self._is_closed:
            raise FeatureStoreUnavailable(_UNAVAILABLE)
        deadline_s = time.monotonic() + timeout_s
        future: Future[Any] = Future()
        try:
            self._work.put((function, future), timeout=timeout_s)
            result = future.result(max(deadline_s - time.monotonic(), 0))
        except Exception as error:
            future.cancel()
            is_late = isinstance(error, TimeoutError | queue.Full)
            if self._is_up and not (is_late and timeout_s < self._patience_s):
                self._is_up = False
                _log.exception("online_store_down")
            raise FeatureStoreUnavailable(_UNAVAILABLE) from error
        self._is_up = True
        return result

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            function, future = work
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(function())
            except BaseException as error:  # noqa: BLE001 - it belongs to whoever waits
                future.set_exception(error)

    def _value(self, feature: PlannedFeature, message: Any) -> Any:
        try:
            return message_value(message, feature.value_type)
        except ValueMismatchError as error:
            self.mismatches += 1
            if self.mismatches == 1:
                _log.warning(
                    "stored_value_mismatch",
                    view=feature.view,
                    feature=feature.feature,
                    reason=str(error),
                )
            return None
