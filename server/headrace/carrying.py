"""How a batch is carried: its features are read, the model is run, every caller is answered."""

import math
import time
from collections.abc import Sequence

import numpy as np
import structlog
from numpy.typing import NDArray

from headrace.backends.base import Backend
from headrace.batching.bisection import Blame
from headrace.batching.culprits import Survivors, try_whole
from headrace.errors import (
    BackendError,
    ComputationFailed,
    InvalidTensor,
    MissingFeatures,
    ServingError,
)
from headrace.features.join import FeatureJoin
from headrace.features.plan import FeatureStatus
from headrace.features.store import FeatureRows, OnlineStore
from headrace.observation import BatchObserver, Carried, traceparent_of
from headrace.request import AnsweredBatch, Answering, OutputBlock, Request
from headrace.shape_buckets import ShapeBuckets
from headrace.telemetry.metrics import ModelMetrics
from headrace.tensors import join

_LOG = structlog.get_logger(__name__)

STAYS = 0.7
"""
Features that take longer than the model count as longer until they take so much of its time, and
the other way about: where both take as long it must not be another answer with each batch.
"""


class BatchCarrier:
    """
    Carries batches of one model version to their end, whatever happens. Any executor may call it.

    A request that fails (rows that the model cannot run, missing features under `reject`) fails
    alone: its batchmates are answered. Who is to blame is found by bisection; when it takes too
    long (`bisection.attempts_max`), those still in question fail together.

    Args:
        model: Who answers.
        backend: Runs the model.
        metrics: Counters, folded once per batch.
        observer: Is told of answered batches.
        id_prefix: What prediction ids begin with.
        join: How entities become model inputs; None when callers send the tensors themselves.
        store: Where `join`'s features are read; required with it.
        feature_timeout_s: Longest that one batch waits for its features.
        max_feature_age_s: Older values are missing.
        buckets: Pads requests of different shapes to one; None to run them as they are.

    Attributes:
        is_store_bound: Whether features take longer than the model, by the last batches.
    """

    def __init__(
        self,
        *,
        model: Answering,
        backend: Backend,
        metrics: ModelMetrics,
        observer: BatchObserver,
        id_prefix: str,
        join: FeatureJoin | None,
        store: OnlineStore | None,
        feature_timeout_s: float,
        max_feature_age_s: float | None,
        buckets: ShapeBuckets | None,
    ) -> None:
        self.is_store_bound = False
        self._model = model
        self._signature = model.signature
        self._backend = backend
        self._metrics = metrics
        self._observer = observer
        self._id_prefix = id_prefix
        self._join = join
        self._store = store
        self._feature_timeout_s = feature_timeout_s
        self._max_feature_age_s = max_feature_age_s
        self._buckets = buckets
        # The signature may name a part of what the model returns, in another order.
        positions = {spec.name: i for i, spec in enumerate(backend.outputs)}
        self._positions = tuple(positions[spec.name] for spec in model.signature.outputs)

    def carry(self, batch: Sequence[Request]) -> bool:
        """
        Answer every request of a batch, with a prediction or an error. Does not raise.

        Returns:
            Whether anybody was answered with a prediction.
        """
        return try_whole(batch, self._attempt, self._fail)

    def take_number(self) -> tuple[int, str]:
        """Number a request that will come in parts; return its prediction id too."""
        number = self._observer.take_numbers(1)
        return number, f"{self._id_prefix}{number:010x}"

    def _fail(self, requests: Sequence[Request], error: Exception) -> None:
        if not requests:
            return
        shown = error
        if not isinstance(shown, ServingError):
            model = self._model
            _LOG.error("batch_failed", model=model.name, version=model.version, exc_info=error)
            shown = BackendError("internal error")
        for request in requests:
            try:
                request.fail(shown)
            except Exception:  # noqa: BLE001 the next one must hear of it all the same
                _LOG.exception("reply_failed")
        self._metrics.failed(sum([request.ends_whole for request in requests]))

    def _attempt(self, batch: Sequence[Request]) -> Blame[Request] | Survivors[Request] | None:
        """
        Carry a batch as far as it goes.

        Returns:
            None when everybody is answered; or those who are not, because somebody among them has
            values that cannot be computed with, or because features of others are missing.

        Raises:
            ServingError: nobody can be answered, whoever they are.
        """
        started_s = time.perf_counter()
        now_s = time.time()
        rows = sum([request.rows for request in batch])
        columns = self._join_inputs(batch, rows)
        if self._join is None:
            timing = (started_s, started_s, now_s)
            return self._infer_and_reply(batch, rows, columns, {}, None, None, timing)
        entities = self._entities(self._join, columns)
        try:
            features = self._read(self._join, entities, now_s, _longest_wait_s(batch, now_s))
        except ComputationFailed as error:
            return Blame(batch, error)
        missing = None if features.is_complete else self._join.missing(features)
        if self._join.rejects_missing and missing is not None and missing.any():
            kept = self._reject_incomplete(self._join, batch, missing)
            if len(kept) < len(batch):
                # The survivors go round again, alone: rare, and simpler than cutting every array.
                return Survivors(kept)
        inputs = self._join.assemble(features, columns)
        timing = (started_s, time.perf_counter(), now_s)
        return self._infer_and_reply(batch, rows, inputs, entities, features, missing, timing)

    def _join_inputs(self, batch: Sequence[Request], rows: int) -> dict[str, NDArray[np.generic]]:
        if self._buckets is not None:
            return {
                spec.name: self._buckets.join(i, spec, batch)
                for i, spec in enumerate(self._signature.inputs)
            }
        trailing = batch[0].batch_key
        columns = {}
        for i, spec in enumerate(self._signature.inputs):
            shape = (rows, *trailing[i]) if self._signature.max_batch_size else trailing[i]
            columns[spec.name] = join(spec, [request.raws[i] for request in batch], shape)
        return columns

    @staticmethod
    def _entities(
        feature_join: FeatureJoin, columns: dict[str, NDArray[np.generic]]
    ) -> dict[str, NDArray[np.generic]]:
        """Pick the columns that the features are read by."""
        keys = {
            column.name: columns[column.name].reshape(-1)
            for column in feature_join.plan.request_columns
        }
        if not keys:  # a service without entities: the request-time columns say how many rows
            keys = {name: column.reshape(-1) for name, column in columns.items()}
        return keys

    def _read(
        self,
        feature_join: FeatureJoin,
        entities: dict[str, NDArray[np.generic]],
        now_s: float,
        longest_wait_s: float | None,
    ) -> FeatureRows:
        assert self._store is not None
        timeout_s = self._feature_timeout_s
        if longest_wait_s is not None:
            timeout_s = min(timeout_s, longest_wait_s)
        return self._store.read(
            feature_join.plan,
            entities,
            now_s=now_s,
            timeout_s=timeout_s,
            max_age_s=self._max_feature_age_s,
        )

    def _reject_incomplete(
        self, feature_join: FeatureJoin, batch: Sequence[Request], missing: NDArray[np.bool_]
    ) -> list[Request]:
        names = [feature.name for feature in feature_join.plan.features]
        kept, start = [], 0
        for request in batch:
            part = missing[:, start : start + request.rows]
            start += request.rows
            if not part.any():
                kept.append(request)
                continue
            features = [names[i] for i in np.flatnonzero(part.any(axis=1))[:16]]
            rows = (np.flatnonzero(part.any(axis=0))[:16] + request.first_row).tolist()
            error = MissingFeatures(
                f"model '{self._model.name}' needs every feature; missing {features} in rows {rows}"
            )
            self._fail([request], error)
        return kept

    def _infer_and_reply(
        self,
        batch: Sequence[Request],
        rows: int,
        inputs: dict[str, NDArray[np.generic]],
        entities: dict[str, NDArray[np.generic]],
        features: FeatureRows | None,
        missing: NDArray[np.bool_] | None,
        timing: tuple[float, float, float],
    ) -> Blame[Request] | None:
        started_s, joined_s, now_s = timing
        try:
            if self._backend.is_remote:
                # From now: its features have used up some of their time.
                longest_wait_s = _longest_wait_s(batch, time.time())
                arrays = self._backend.infer(
                    inputs, longest_wait_s, traceparent_of(batch, joined_s)
                )
            else:
                arrays = self._backend.infer(inputs)
            inferred_s = time.perf_counter()
            tilt = STAYS if self.is_store_bound else 1 / STAYS
            self.is_store_bound = joined_s - started_s > (inferred_s - joined_s) * tilt
            outputs = self._blocks(arrays, rows)
            if self._buckets is not None:
                self._buckets.check(outputs, batch[0].batch_key)
        except (BackendError, InvalidTensor) as error:
            return Blame(batch, error)
        missing_per_row, stale_per_row = _per_row(features, missing, rows)
        answered = AnsweredBatch(
            model=self._model,
            outputs=outputs,
            join=self._join,
            features=features,
            missing_per_row=missing_per_row,
            stale_per_row=stale_per_row,
            output_shapes=tuple([block.trailing for block in outputs]),
            started_s=started_s,
            features_s=joined_s - started_s,
            infer_s=inferred_s - joined_s,
            inferred_s=inferred_s,
            now_s=now_s,
        )
        start = 0
        prefix = self._id_prefix
        first_number = self._observer.take_numbers(len(batch))
        for number, request in enumerate(batch, first_number):
            try:
                own = answered if self._buckets is None else self._buckets.cut(answered, request)
                request.answer(own, start, f"{prefix}{number:010x}")
            except Exception as error:  # noqa: BLE001 the others deserve their answer
                self._fail([request], error)
            start += request.rows
        self._observer.answered(
            batch,
            Carried(
                first_number=first_number,
                numbers=self._numbers(batch, first_number),
                rows=rows,
                inputs=inputs,
                entities=entities,
                features=features,
                arrays=arrays,
                started_s=started_s,
                joined_s=joined_s,
                inferred_s=inferred_s,
                replied_s=time.perf_counter(),
                now_s=now_s,
            ),
        )
        return None

    def _numbers(self, batch: Sequence[Request], first_number: int) -> Sequence[int] | None:
        """Return each request's number, in a batch with parts of requests."""
        if self._signature.max_request_rows == self._signature.max_batch_size:
            return None
        if all(request.number is None for request in batch):
            return None
        return [
            number if request.number is None else request.number
            for number, request in enumerate(batch, first_number)
        ]

    def _blocks(self, arrays: Sequence[NDArray[np.generic]], rows: int) -> tuple[OutputBlock, ...]:
        blocks = []
        for spec, position in zip(self._signature.outputs, self._positions, strict=True):
            array = arrays[position]
            if not self._signature.max_batch_size:
                array = array[np.newaxis]  # one request, one run
            elif array.shape[:1] != (rows,):
                raise BackendError(f"model '{self._model.name}' did not return a row for each row")
            blocks.append(OutputBlock(spec, array))
        return tuple(blocks)


def _longest_wait_s(batch: Sequence[Request], now_s: float) -> float | None:
    """Until when anybody waits for the batch, from now; None when somebody waits for ever."""
    deadline_s = max([request.deadline_s for request in batch])
    return None if deadline_s == math.inf else max(0.001, deadline_s - now_s)


def _per_row(
    features: FeatureRows | None, missing: NDArray[np.bool_] | None, rows: int
) -> tuple[list[int] | None, list[int] | None]:
    """Count the missing values of each row, and those of them that were too old."""
    if features is None:
        return None, None
    if missing is None:
        return [0] * rows, [0] * rows
    stale = (features.statuses == FeatureStatus.OUTSIDE_MAX_AGE) & missing
    return missing.sum(axis=0).tolist(), stale.sum(axis=0).tolist()
