"""The use case: requests wait for a model version, and its executor threads carry them in batches.

The edge (`rpc`) hands over `Request`s whose inputs are checked; `ServedModel` queues them and its
executor threads carry whole batches (`carrying`). Nothing here knows gRPC or protobuf: a request
says how to answer itself.
"""

import math
import secrets
import threading
import time
from collections.abc import Callable

from headrace.backends.base import Backend
from headrace.batching.batcher import Batcher
from headrace.carrying import BatchCarrier
from headrace.errors import InvalidRequest, Overloaded, ServingError
from headrace.features.join import FeatureJoin
from headrace.features.skew_log import SkewLog
from headrace.features.store import OnlineStore
from headrace.monitoring.records import BatchRecord
from headrace.observation import BatchObserver
from headrace.reply_order import ReplyOrder
from headrace.request import Answering, Request
from headrace.shape_buckets import ShapeBuckets
from headrace.split_request import SplitRequest
from headrace.telemetry.calls import CallRecorder
from headrace.telemetry.feature_metrics import ViewMetrics
from headrace.telemetry.metrics import ModelMetrics
from headrace.tensors import MAX_ELEMENTS, Signature


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
        buckets: Pads requests of different shapes, so that they share batches.
        order: Sends replies in the order of requests; None to send each when it is there. This
            object starts and stops it.
        executor_count: Threads that carry batches.
        overlapping_count: Threads that carry full batches beside those, as long as reading features
            takes longer than running the model; see `Batcher`.
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
        buckets: ShapeBuckets | None = None,
        order: ReplyOrder | None = None,
        executor_count: int = 1,
        overlapping_count: int = 0,
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
        self._buckets = buckets
        self._order = order
        self._latency_slo_s = latency_slo_s
        self._answering = Answering(name, version, signature)
        self._batch_rows_max = signature.max_batch_size or MAX_ELEMENTS
        self._is_stopping = False
        id_prefix = secrets.token_hex(8)
        observer = BatchObserver(
            name=name,
            version=version,
            id_prefix=id_prefix,
            backend=backend,
            join=join,
            max_batch_size=signature.max_batch_size,
            metrics=metrics,
            view_metrics=view_metrics,
            calls=calls,
            record=record,
            skew_log=skew_log,
        )
        self._carrier = BatchCarrier(
            model=self._answering,
            backend=backend,
            metrics=metrics,
            observer=observer,
            id_prefix=id_prefix,
            join=join,
            store=store,
            feature_timeout_s=feature_timeout_s,
            max_feature_age_s=max_feature_age_s,
            buckets=buckets,
        )
        self._threads = [
            threading.Thread(
                target=self._execute, name=f"executor-{name}-{version}-{i}", daemon=True
            )
            for i in range(executor_count + overlapping_count)
        ]

    def start(self) -> None:
        """Begin taking batches."""
        if self._order is not None:
            self._order.start()
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
        has_ended = self._order is None or self._order.stop(deadline_s)
        return has_ended and not any(thread.is_alive() for thread in self._threads)

    def close(self) -> None:
        """Free the model; the executor threads have ended."""
        self._backend.close()

    @property
    def is_alive(self) -> bool:
        """Whether every thread runs, until `stop`. If not, what waits stays waiting."""
        if self._is_stopping:
            return True
        threads = all(thread.is_alive() for thread in self._threads)
        return threads and (self._order is None or self._order.is_alive)

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
            InvalidTensor: a dimension is larger than the model's buckets for it.
            InvalidRequest: it has more bytes than may ever wait.
            Overloaded: too many wait, or the request could not be answered in time.
            Draining: the model is stopping.
        """
        request.served = self._answering
        if self._buckets is not None:
            request.batch_key = self._buckets.place(request.own_shapes)
        if (
            self._latency_slo_s is not None
            and request.deadline_s == math.inf
            and not (request.timeout_s and self._batcher.binds(request))
        ):
            request.deadline_s = time.time() + self._latency_slo_s
        if self._order is not None:
            self._submit_in_order(self._order, request)
        else:
            self._put(request)

    def refuses(self, deadline_s: float, byte_count: int = 1) -> Overloaded | None:
        """Say whether a request of which no more is known would be refused; see `Batcher`."""
        if self._order is not None and self._batcher.pressure:
            error = self._order.refuses(byte_count)
            if error is not None:
                self._batcher.turned_away()
                return error
        if self._latency_slo_s is not None and deadline_s == math.inf:
            deadline_s = time.time() + self._latency_slo_s
        return self._batcher.refuses(deadline_s, byte_count)

    @property
    def waiting(self) -> int:
        """Requests in the queue now."""
        return len(self._batcher)

    def _submit_in_order(self, order: ReplyOrder, request: Request) -> None:
        try:
            stand_in = order.enter(request)
        except Overloaded:
            self._batcher.turned_away()
            raise
        try:
            self._put(stand_in)
        except Exception:
            order.settle(stand_in.turn, None)
            raise

    def _put(self, request: Request) -> None:
        if request.rows > self._batch_rows_max:
            self._put_in_parts(request)
        else:
            self._batcher.put(request)

    def _put_in_parts(self, request: Request) -> None:
        most = self._batch_rows_max
        self._batcher.judge(request, -(-request.rows // most))
        number, prediction_id = self._carrier.take_number()
        split = SplitRequest(request, self.signature, self._batcher, number, prediction_id)
        try:
            self._batcher.put_all(split.parts)
        except ServingError:
            split.end()
            raise

    def _execute(self) -> None:
        was_answered = True
        while (batch := self._batcher.take(was_answered=was_answered)) is not None:
            was_answered = self._carrier.carry(batch)
            self._batcher.overlaps = self._carrier.is_store_bound
            del batch  # while there is nothing to do, nobody's request is kept
