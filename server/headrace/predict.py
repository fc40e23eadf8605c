"""The use case: one executor thread carries a batch through features, inference and reply.

The edge (`rpc`) hands over `Request`s whose inputs are checked; `ServedModel` queues them and its
executor threads carry whole batches. Nothing here knows gRPC or protobuf: a request says how to
answer itself.
"""

import math
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import structlog
from numpy.typing import NDArray

from headrace.backends.base import Backend
from headrace.batching.batcher import Batcher
from headrace.errors import (
    BackendError,
    BackendUnavailable,
    ComputationFailed,
    DeadlineExceeded,
    FeatureStoreUnavailable,
    InvalidRequest,
    InvalidTensor,
    MissingFeatures,
    Overloaded,
    ServingError,
)
from headrace.features.join import FeatureJoin
from headrace.features.plan import FeatureStatus
from headrace.features.skew_log import SkewLog
from headrace.features.store import FeatureRows, OnlineStore
from headrace.monitoring.records import BatchRecord
from headrace.observation import BatchObserver, Carried, traceparent_of
from headrace.request import AnsweredBatch, OutputBlock, Request
from headrace.telemetry.calls import CallRecorder
from headrace.telemetry.feature_metrics import ViewMetrics
from headrace.telemetry.metrics import ModelMetrics
from headrace.tensors import Signature, join

_LOG = structlog.get_logger(__name__)

_STORE_UNAVAILABLE = "the online feature store does not answer"


class ServedModel:
    """
    One model version that serves: its queue, its executor threads, its way through a batch.

    `start` begins the threads; `stop` lets what waits finish and ends them; `close` frees the
    model. A request that fails (rows that the model cannot run, missing features under `reject`)
    fails alone: its batchmates are answered.

    Args:
        name: The model's name.
        version: The version, as the decimal text that replies carry.
        signature: What callers send and get.
        backend: Runs the model.
        batcher: The queue; this object closes it.
        metrics: Counters, folded once per batch.
        join: How entities become model inputs; None when callers send the tensors themselves.
        store: Where `join`'s features are read; required with it.
        executor_count: Threads that carry batches, one per model instance.
        latency_slo_s: Time budget of a request whose caller sets no deadline.
        feature_timeout_s: Longest that one batch waits for its features.
        max_entities: Most rows of one request to a model with features.
        max_feature_age_s: Older values are missing.
        record: Is given each answered batch. Must not block, raise or write to its arrays.
        calls: Is told of batches with sampled calls in them.
        view_metrics: Statuses and ages of features, folded once per batch.
        skew_log: Keeps the features of sampled rows.
    """

    def __init__(
        self,
        *,
        name: str,
        version: str,
        signature: Signature,
        backend: Backend,
        batcher: Batcher[Request],
        metrics: ModelMetrics,
        join: FeatureJoin | None = None,
        store: OnlineStore | None = None,
        executor_count: int = 1,
        latency_slo_s: float | None = None,
        feature_timeout_s: float = 1.0,
        max_entities: int = 10_000,
        max_feature_age_s: float | None = None,
        record: Callable[[BatchRecord], None] | None = None,
        calls: CallRecorder | None = None,
        view_metrics: ViewMetrics | None = None,
        skew_log: SkewLog | None = None,
    ) -> None:
        if (join is None) != (store is None):
            raise ValueError("a feature join needs a store, and a store is for a join")
        self.name = name
        self.version = version
        self.signature = signature
        self.join = join
        self.max_entities = max_entities
        self._backend = backend
        self._batcher = self.queue = batcher
        self._metrics = metrics
        self._store = store
        self._latency_slo_s = latency_slo_s
        self._feature_timeout_s = feature_timeout_s
        self._max_feature_age_s = max_feature_age_s
        # The signature may name a part of what the model returns, in another order.
        positions = {spec.name: i for i, spec in enumerate(backend.outputs)}
        self._positions = tuple(positions[spec.name] for spec in signature.outputs)
        self.edge_memo: dict[Any, Any] = {}
        """What the edge serialized once for this version; bounded by the edge."""
        self._is_stopping = False
        self._prediction_prefix = secrets.token_hex(8)
        self._observer = BatchObserver(
            name=name,
            version=version,
            id_prefix=self._prediction_prefix,
            backend=backend,
            join=join,
            max_batch_size=signature.max_batch_size,
            metrics=metrics,
            view_metrics=view_metrics,
            calls=calls,
            record=record,
            skew_log=skew_log,
        )
        self._threads = [
            threading.Thread(
                target=self._execute, name=f"executor-{name}-{version}-{i}", daemon=True
            )
            for i in range(executor_count)
        ]

    def start(self) -> None:
        """Begin taking batches."""
        for thread in self._threads:
            thread.start()

    def stop(self, timeout_s: float) -> bool:
        """
        Refuse new requests, finish those that wait, end the threads.

        Returns:
            Whether every thread ended in time.
        """
        self._is_stopping = True
        self._batcher.close()
        deadline_s = time.perf_counter() + timeout_s
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(max(0.0, deadline_s - time.perf_counter()))
        return not any(thread.is_alive() for thread in self._threads)

    def close(self) -> None:
        """Free the model; the executor threads have ended."""
        self._backend.close()

    @property
    def is_alive(self) -> bool:
        """Whether every executor thread runs, until `stop`. If not, what waits stays waiting."""
        return self._is_stopping or all(thread.is_alive() for thread in self._threads)

    def check_rows(self, rows: int) -> None:
        """
        Check the number of entities, before anything is made of them.

        Raises:
            InvalidRequest: more than the limit, for a model with features.
        """
        if self.join is not None and rows > self.max_entities:
            raise InvalidRequest(
                f"request has {rows} entities; at most {self.max_entities} are accepted"
            )

    def submit(self, request: Request) -> None:
        """
        Queue a checked request. Never blocks.

        Raises:
            Overloaded: too many wait, or the request could not be answered in time.
            Draining: the model is stopping.
        """
        request.served = self
        if (
            self._latency_slo_s is not None
            and request.deadline_s == math.inf
            and not request.timeout_s
        ):
            request.deadline_s = time.time() + self._latency_slo_s
        self._batcher.put(request)

    def refuses(self, deadline_s: float, byte_count: int = 1) -> Overloaded | None:
        """Say whether a request of which no more is known would be refused; see `Batcher`."""
        if self._latency_slo_s is not None and deadline_s == math.inf:
            deadline_s = time.time() + self._latency_slo_s
        return self._batcher.refuses(deadline_s, byte_count)

    @property
    def waiting(self) -> int:
        """Requests in the queue now."""
        return len(self._batcher)

    def _execute(self) -> None:
        while (batch := self._batcher.take()) is not None:
            try:
                self._carry(batch)
            except Exception as error:
                self._fail_unexpectedly(batch, error)

    def _fail_unexpectedly(self, batch: Sequence[Request], error: Exception) -> None:
        shown = error if isinstance(error, ServingError) else BackendError("internal error")
        _fail_all(batch, shown)
        self._metrics.failed(len(batch))
        _LOG.error("batch_failed", model=self.name, version=self.version, exc_info=error)

    def _carry(self, batch: Sequence[Request]) -> bool:
        """Carry a batch to its end; say whether its features could be read."""
        started_s = time.perf_counter()
        now_s = time.time()
        rows = sum([request.rows for request in batch])
        columns = self._join_inputs(batch, rows)
        if self.join is None:
            timing = (started_s, started_s, now_s)
            self._infer_and_reply(batch, rows, columns, {}, None, None, timing)
            return True
        entities = self._entities(self.join, columns)
        try:
            features = self._read(self.join, entities, now_s, _longest_wait_s(batch, now_s))
        except ComputationFailed as error:
            # Somebody's values are to blame: only theirs shall fail.
            if len(batch) == 1:
                batch[0].fail(error)
                self._metrics.failed(1)
            else:
                self._carry_one_by_one(batch)
            return True
        except FeatureStoreUnavailable as error:
            _fail_all(batch, error)
            self._metrics.failed(len(batch))
            return False
        missing = None if features.is_complete else self.join.missing(features)
        if self.join.rejects_missing and missing is not None and missing.any():
            kept = self._reject_incomplete(self.join, batch, missing)
            if len(kept) < len(batch):
                # The survivors go round again, alone: rare, and simpler than cutting every array.
                return self._carry(kept) if kept else True
        inputs = self.join.assemble(features, columns)
        timing = (started_s, time.perf_counter(), now_s)
        self._infer_and_reply(batch, rows, inputs, entities, features, missing, timing)
        return True

    def _join_inputs(self, batch: Sequence[Request], rows: int) -> dict[str, NDArray[np.generic]]:
        trailing = batch[0].batch_key
        columns = {}
        for i, spec in enumerate(self.signature.inputs):
            shape = (rows, *trailing[i]) if self.signature.max_batch_size else trailing[i]
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
            rows = np.flatnonzero(part.any(axis=0))[:16].tolist()
            request.fail(
                MissingFeatures(
                    f"model '{self.name}' needs every feature; missing {features} in rows {rows}"
                )
            )
            self._metrics.failed(1)
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
    ) -> None:
        started_s, joined_s, now_s = timing
        try:
            if self._backend.is_remote:
                arrays = self._backend.infer(
                    inputs, _longest_wait_s(batch, now_s), traceparent_of(batch, joined_s)
                )
            else:
                arrays = self._backend.infer(inputs)
            inferred_s = time.perf_counter()
            outputs = self._blocks(arrays, rows)
        except (BackendError, InvalidTensor) as error:
            if len(batch) == 1:
                batch[0].fail(error)
                self._metrics.failed(1)
            else:
                self._carry_one_by_one(batch)
            return
        except (BackendUnavailable, DeadlineExceeded, Overloaded) as error:
            _fail_all(batch, error)
            self._metrics.failed(len(batch))
            return
        missing_per_row, stale_per_row = _per_row(features, missing, rows)
        answered = AnsweredBatch(
            model=self,
            outputs=outputs,
            join=self.join,
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
        prefix = self._prediction_prefix
        first_number = self._observer.take_numbers(len(batch))
        for number, request in enumerate(batch, first_number):
            try:
                request.answer(answered, start, f"{prefix}{number:010x}")
            except Exception as error:
                self._fail_unexpectedly([request], error)
            start += request.rows
        self._observer.answered(
            batch,
            Carried(
                first_number=first_number,
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

    def _carry_one_by_one(self, batch: Sequence[Request]) -> None:
        """Find the request that is to blame; the others deserve their answer."""
        for i, request in enumerate(batch):
            if request.expired(time.time()):
                request.drop()
                continue
            try:
                is_readable = self._carry([request])
            except Exception as error:
                self._fail_unexpectedly([request], error)
                continue
            if not is_readable:  # the others would wait as long for as little
                _fail_all(batch[i + 1 :], FeatureStoreUnavailable(_STORE_UNAVAILABLE))
                self._metrics.failed(len(batch) - i - 1)
                return

    def _blocks(self, arrays: Sequence[NDArray[np.generic]], rows: int) -> tuple[OutputBlock, ...]:
        blocks = []
        for spec, position in zip(self.signature.outputs, self._positions, strict=True):
            array = arrays[position]
            if not self.signature.max_batch_size:
                array = array[np.newaxis]  # one request, one run
            elif array.shape[:1] != (rows,):
                raise BackendError(f"model '{self.name}' did not return a row for each row")
            blocks.append(OutputBlock(spec, array))
        return tuple(blocks)


def _longest_wait_s(batch: Sequence[Request], now_s: float) -> float | None:
    """Until when anybody waits for the batch, from now; None when somebody waits for ever."""
    deadline_s = max([request.deadline_s for request in batch])
    return None if deadline_s == math.inf else max(0.001, deadline_s - now_s)


def _fail_all(batch: Sequence[Request], error: ServingError) -> None:
    for request in batch:
        try:
            request.fail(error)
        except Exception:  # the next one must hear of it all the same
            _LOG.exception("reply_failed")


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
