"""Feature reads: an executor thread carries a batch of requests through the online store.

Requests for the same selection of features that wait at the same time are one read. Long ones have
a queue and a thread of their own, so that they do not hold up the short ones.
"""

import threading
import time
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from typing import Any

import numpy as np
import structlog
from numpy.typing import NDArray

from headrace.batching.batcher import Batcher
from headrace.batching.bisection import Blame
from headrace.batching.codel import Codel
from headrace.batching.culprits import Survivors, try_whole
from headrace.batching.policy import BatchPolicy
from headrace.batching.queued import QueuedRequest
from headrace.errors import (
    BackendError,
    ComputationFailed,
    InvalidRequest,
    ServingError,
)
from headrace.features.plan import FeaturePlan, RequestColumn
from headrace.features.plans import FeaturePlans, Selection
from headrace.features.skew_log import FeatureReadLog, SkewLog
from headrace.features.store import FeatureRows, OnlineStore
from headrace.telemetry.calls import CallRecorder
from headrace.telemetry.feature_metrics import FeatureReadMetrics, ViewMetrics
from headrace.telemetry.spans import TracedBatch, TracedCalls
from headrace.telemetry.trace_context import Trace

_LOG = structlog.get_logger(__name__)

LONG_ROWS = 128
"""Rows above which a request is long: some milliseconds of work."""

SHORT_BATCH_ROWS = 512
"""In a batch of short requests."""

VALUES_MAX = 1_000_000
"""
Of one request, rows times features, and of what is read at once: a second of work, and at most
34 bytes each in a reply (an INT64 with its status and event time), unless they are text or lists.
"""


@dataclass(frozen=True, slots=True)
class FeatureRead:
    """
    What one batch read.

    Args:
        plan: Which features.
        rows: Their values, row for row.
        now_s: When they were read, Unix seconds.
        singles: The rows of those requests that have only one.
        shared: What replies to the batch have in common, kept by those who make them.
    """

    plan: FeaturePlan
    rows: FeatureRows
    now_s: float
    singles: list[int]
    shared: dict[Any, Any] = field(default_factory=dict)


class FeatureRequest(QueuedRequest):
    """
    One caller's entities.

    Args:
        selection: Which features.
        rows: How many entities; at least 1.
        deadline_s: Unix seconds; infinite when the caller gave none.
        arrival_s: When it reached the port, on `time.perf_counter`'s clock.
        byte_count: Size of its message.
        trace: Of a sampled call.
    """

    __slots__ = ("trace",)

    batch_key: Selection

    def __init__(
        self,
        selection: Selection,
        rows: int,
        *,
        deadline_s: float,
        arrival_s: float,
        byte_count: int,
        trace: Trace | None,
    ) -> None:
        super().__init__(
            rows, selection, deadline_s=deadline_s, arrival_s=arrival_s, byte_count=byte_count
        )
        self.trace = trace

    @property
    @abstractmethod
    def method(self) -> str:
        """As `package.Service/Method`."""

    @abstractmethod
    def column_values(self, column: RequestColumn) -> list[Any]:
        """
        Return this request's values of a column, one per row: numbers that fit it, or bytes.

        Raises:
            InvalidRequest: they are not there, or some are null, of another type or out of range.
        """

    @abstractmethod
    def answer(self, read: FeatureRead, start: int) -> None:
        """Reply with rows [start, start + self.rows) of the read."""


class FeatureReads:
    """
    Reads features for callers that want them as they are, without a model.

    `start` begins the threads; `stop` lets what waits finish and ends them. A request that is wrong
    fails alone: those it shared a batch with are answered.

    Args:
        plans: Compiles what is asked for.
        store: Where features are read.
        metrics: Folded into once per batch.
        view_metrics: Likewise.
        calls: Is told of batches with sampled calls in them.
        max_entities: Most rows of one request.
        max_queue_size: Requests that may wait, of short and of long ones each.
        max_queue_bytes: Bytes of them, likewise.
        timeout_s: Longest that one batch waits for the store; less when nobody waits so long.
        skew_log: Keeps what was read of sampled keys.
        is_fair: Whether callers have fair shares.
        codel_s: Target and interval for queues that stand, in seconds; None for no control.
    """

    def __init__(
        self,
        plans: FeaturePlans,
        store: OnlineStore,
        metrics: FeatureReadMetrics,
        view_metrics: ViewMetrics,
        calls: CallRecorder,
        *,
        max_entities: int,
        max_queue_size: int,
        max_queue_bytes: int,
        timeout_s: float,
        skew_log: SkewLog | None = None,
        is_fair: bool = False,
        codel_s: tuple[float, float] | None = None,
    ) -> None:
        self._plans = plans
        self._store = store
        self._metrics = metrics
        self._view_metrics = view_metrics
        self._calls = None if calls.sample is None else calls
        self._skew_log = None if skew_log is None else FeatureReadLog(skew_log)
        self._max_entities = max_entities
        self._timeout_s = timeout_s
        self._is_stopping = False
        self._short, self._long = (
            Batcher[FeatureRequest](
                BatchPolicy(max_rows),
                max_queue_size=max_queue_size,
                max_queue_bytes=max_queue_bytes,
                is_fair=is_fair,
                codel=None if codel_s is None else Codel(*codel_s),
            )
            for max_rows in (SHORT_BATCH_ROWS, max(max_entities, LONG_ROWS))
        )
        metrics.queues = (self._short, self._long)
        self._threads = [
            threading.Thread(target=self._execute, args=(queue,), name=name, daemon=True)
            for queue, name in ((self._short, "features-short"), (self._long, "features-long"))
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
        self._short.close()
        self._long.close()
        deadline_s = time.perf_counter() + timeout_s
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(max(0.0, deadline_s - time.perf_counter()))
        return not any(thread.is_alive() for thread in self._threads)

    @property
    def is_alive(self) -> bool:
        """Whether every thread runs, until `stop`. If not, what waits stays waiting."""
        return self._is_stopping or all(thread.is_alive() for thread in self._threads)

    def check_rows(self, rows: int) -> None:
        """
        Check the number of entities, before anything is made of them.

        Raises:
            InvalidRequest: none, or more than the limit.
        """
        if rows < 1:
            raise InvalidRequest("request has no entities")
        if rows > self._max_entities:
            raise InvalidRequest(
                f"request has {rows} entities; at most {self._max_entities} are accepted"
            )

    def submit(self, request: FeatureRequest) -> None:
        """
        Queue a request. Never blocks.

        Raises:
            Overloaded: the queue is full.
            Draining: the server is stopping.
        """
        (self._short if request.rows <= LONG_ROWS else self._long).put(request)

    def _execute(self, queue: Batcher[FeatureRequest]) -> None:
        was_answered = True
        while (batch := queue.take(was_answered=was_answered)) is not None:
            was_answered = self._serve_batch(batch)
            del batch  # while there is nothing to do, nobody's request is kept

    def _serve_batch(self, batch: Sequence[FeatureRequest]) -> bool:
        """See to it that everybody is answered; say whether anybody got features."""
        try:
            plan = self._plans.find(batch[0].batch_key)
        except Exception as error:  # noqa: BLE001 the thread must go on
            self._fail(batch, error)
            return False
        were_answered = [self._serve(plan, part) for part in _parts(batch, len(plan.features))]
        return any(were_answered)

    def _serve(self, plan: FeaturePlan, batch: Sequence[FeatureRequest]) -> bool:
        """See to it that every request of a part of a batch is answered, whatever happens."""
        return try_whole(batch, partial(self._carry, plan), self._fail)

    def _carry(
        self, plan: FeaturePlan, batch: Sequence[FeatureRequest]
    ) -> Blame[FeatureRequest] | Survivors[FeatureRequest] | None:
        """
        Carry a batch as far as it goes.

        Returns:
            None when everybody is answered; or those who are not, because somebody among them has
            values that cannot be computed with, or because others ask for what cannot be read.
        """
        started_s = time.perf_counter()
        right, entities = self._entities(plan, batch)
        if len(right) < len(batch):
            # The others go round again, alone: rare, and simpler than to tell who has been told.
            return Survivors(right)
        now_s = time.time()
        timeout_s = min(self._timeout_s, _longest_wait_s(batch, now_s))
        try:
            rows = self._store.read(plan, entities, now_s=now_s, timeout_s=timeout_s)
        except ComputationFailed as error:
            return Blame(batch, error)
        read_s = time.perf_counter()
        counts = [request.rows for request in batch]
        starts = list(accumulate(counts, initial=0))
        singles = [start for start, count in zip(starts, counts, strict=False) if count == 1]
        read = FeatureRead(plan, rows, now_s, singles)
        for request, start in zip(batch, starts, strict=False):
            try:
                request.answer(read, start)
            except Exception:  # noqa: BLE001 the others deserve their answer
                _LOG.exception("feature_reply_failed")
                self._fail([request], BackendError("internal error"))
        read.shared.clear()  # it leads back here: references alone would not free what was read
        replied_s = time.perf_counter()
        self._metrics.answered(
            arrivals_s=sorted([request.arrival_s for request in batch]),
            rows=starts[-1],
            read_s=read_s - started_s,
            finished_s=replied_s,
        )
        self._view_metrics.read(
            plan.view_names,
            plan.view_of_feature,
            None if rows.is_complete else rows.statuses,
            now_s - rows.event_times_s,
        )
        if self._calls is not None:
            self._tell(self._calls, plan, batch, (started_s, read_s, replied_s))
        if self._skew_log is not None:
            self._skew_log.put(plan, entities, rows, time_s=now_s)
        return None

    def _entities(
        self, plan: FeaturePlan, batch: Sequence[FeatureRequest]
    ) -> tuple[Sequence[FeatureRequest], Mapping[str, NDArray[Any]]]:
        """Put the requests' entities together; those that are wrong are answered and left out."""
        values: list[list[Any]] = [[] for _ in plan.request_columns]
        right: list[FeatureRequest] = []
        for request in batch:
            try:
                _check_values(request.rows, len(plan.features))
                own = [request.column_values(column) for column in plan.request_columns]
            except InvalidRequest as error:
                self._fail([request], error)
                continue
            right.append(request)
            for column, part in zip(values, own, strict=True):
                column.extend(part)
        if not plan.request_columns:
            return right, {"": np.empty(sum([request.rows for request in right]), np.bool_)}
        return right, {
            column.name: _column(column, whole)
            for column, whole in zip(plan.request_columns, values, strict=True)
        }

    def _fail(self, batch: Sequence[FeatureRequest], error: Exception) -> None:
        if not batch:
            return
        told = _told(error)
        self._metrics.failed(len(batch))
        for request in batch:
            try:
                request.fail(told)
            except Exception:  # noqa: BLE001 the next one must hear of it all the same
                _LOG.exception("reply_failed")

    def _tell(
        self,
        calls: CallRecorder,
        plan: FeaturePlan,
        batch: Sequence[FeatureRequest],
        times_s: tuple[float, float, float],
    ) -> None:
        sampled = [(trace, request) for request in batch if (trace := request.trace) is not None]
        if not sampled:
            return
        started_s, read_s, replied_s = times_s
        calls.answered(
            TracedBatch(
                model="",
                version="",
                rows=sum([request.rows for request in batch]),
                requests=len(batch),
                started_s=started_s,
                joined_s=read_s,
                inferred_s=read_s,
                replied_s=replied_s,
                has_features=True,
                is_remote=False,
                calls=TracedCalls(
                    traces=[trace for trace, _ in sampled],
                    methods=[request.method for _, request in sampled],
                    arrivals_s=[request.arrival_s for _, request in sampled],
                    rows=[request.rows for _, request in sampled],
                    prediction_ids=[""] * len(sampled),
                ),
                feature_service=plan.service,
            )
        )


def _longest_wait_s(batch: Sequence[FeatureRequest], now_s: float) -> float:
    """Until when anybody waits for the batch, from now; infinite when somebody waits for ever."""
    return max(0.001, max([request.deadline_s for request in batch]) - now_s)


def _told(error: Exception) -> ServingError:
    """Return what callers may know of an error."""
    if isinstance(error, ServingError):
        return error
    _LOG.error("feature_batch_failed", exc_info=error)
    return BackendError("internal error")


def _parts(batch: Sequence[FeatureRequest], features: int) -> list[list[FeatureRequest]]:
    """Cut a batch so that no part reads more than `VALUES_MAX`, unless one request does."""
    parts: list[list[FeatureRequest]] = [[]]
    values = 0
    for request in batch:
        values += request.rows * features
        if values > VALUES_MAX and parts[-1]:
            parts.append([])
            values = request.rows * features
        parts[-1].append(request)
    return parts


def _check_values(rows: int, features: int) -> None:
    if rows * features > VALUES_MAX:
        raise InvalidRequest(
            f"request asks for {rows} x {features} values; at most {VALUES_MAX} are read at once: "
            "send fewer entities in one request"
        )


def _column(column: RequestColumn, values: list[Any]) -> NDArray[Any]:
    if column.datatype != "BYTES":
        return np.array(values, column.value_type.dtype)
    array = np.empty(len(values), np.object_)
    array[:] = values
    return array
