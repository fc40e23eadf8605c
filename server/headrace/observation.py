"""What is told of an answered batch: numbers, the spans of sampled calls, a record for the monitor.

All of it once per batch, after the last reply.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import structlog
from numpy.typing import NDArray

from headrace.backends.base import Backend
from headrace.features.join import FeatureJoin
from headrace.features.skew_log import SkewLog, read_plan
from headrace.features.skew_record import SkewSource
from headrace.features.store import FeatureRows
from headrace.monitoring.records import BatchRecord, Block, RecordSchema, column_names, fitting
from headrace.telemetry.calls import CallRecorder
from headrace.telemetry.feature_metrics import ViewMetrics
from headrace.telemetry.metrics import ModelMetrics
from headrace.telemetry.spans import INFER, TracedBatch, TracedCalls
from headrace.telemetry.trace_context import Trace, format_traceparent
from headrace.tensors import TensorSpec

_LOG = structlog.get_logger(__name__)

_RECORD_BYTES = 2_048
"""What a record holds besides its arrays' contents, about."""

_TEXT_BYTES = 128
"""What an element of text holds, about."""


class ObservedRequest(Protocol):
    """What is told of one request; see `predict.Request`."""

    rows: int
    arrival_s: float
    trace: Trace | None
    first_row: int
    ends_whole: bool

    @property
    def method(self) -> str:
        """As `package.Service/Method`."""

    @property
    def caller_rows(self) -> int:
        """How many rows its caller sent; more than `rows` of a part."""


class Carried(NamedTuple):
    """
    An answered batch.

    Args:
        first_number: Of its first request.
        numbers: Of each request, in a batch with parts of requests; otherwise they follow.
        rows: Of all requests.
        inputs: What the model saw.
        entities: Whose features were read, by join key; empty without a feature join.
        features: What was read for it, row for row.
        arrays: What the model said, as it returned it.
        started_s: When the batch was taken, on `time.perf_counter`'s clock.
        joined_s: When the model's inputs were there.
        inferred_s: When the model had answered.
        replied_s: When the last reply was sent.
        now_s: When it was taken, Unix seconds.
    """

    first_number: int
    numbers: Sequence[int] | None
    rows: int
    inputs: dict[str, NDArray[np.generic]]
    entities: Mapping[str, NDArray[np.generic]]
    features: FeatureRows | None
    arrays: Sequence[NDArray[np.generic]]
    started_s: float
    joined_s: float
    inferred_s: float
    replied_s: float
    now_s: float


class BatchObserver:
    """
    Tells of the batches of one model version. Any executor may call it.

    Args:
        name: The model's name.
        version: Its version.
        id_prefix: What its prediction ids begin with.
        backend: Runs it.
        join: Its feature join.
        max_batch_size: Rows of a batch; 0 for a model without a batch dimension.
        metrics: Folded into.
        view_metrics: Likewise, of features.
        calls: Is told of batches with sampled calls in them.
        record: Is given each batch. Must not block, raise or write to its arrays.
        skew_log: Keeps the features of sampled rows.
    """

    def __init__(
        self,
        *,
        name: str,
        version: str,
        id_prefix: str,
        backend: Backend,
        join: FeatureJoin | None,
        max_batch_size: int,
        metrics: ModelMetrics,
        view_metrics: ViewMetrics | None,
        calls: CallRecorder | None,
        record: Callable[[BatchRecord], None] | None,
        skew_log: SkewLog | None,
    ) -> None:
        self._name = name
        self._version = version
        self._id_prefix = id_prefix
        self._is_remote = backend.is_remote
        self._metrics = metrics
        self._view_metrics = view_metrics
        self._plan = None if join is None else join.plan
        # None while nothing is ever sampled, so that a batch pays one comparison.
        self._calls = None if calls is None or calls.sample is None else calls
        self._record = record
        self._schema: RecordSchema | None = None
        if record is not None and max_batch_size:
            self._schema = _schema((name, int(version), id_prefix), backend, join, max_batch_size)
        self._skew_log: SkewLog | None = None
        if skew_log is not None and join is not None:
            read = read_plan(join.plan)
            if read is not None:
                self._skew_log = skew_log
                self._skew_source = SkewSource(name, version, id_prefix, read)
        self._numbering = threading.Lock()
        self._next_number = 0

    def take_numbers(self, count: int) -> int:
        """Return the first of `count` request numbers that follow each other."""
        with self._numbering:
            first = self._next_number
            self._next_number += count
        return first

    def answered(self, batch: Sequence[ObservedRequest], carried: Carried) -> None:
        """Tell of an answered batch."""
        statuses = carried.features.statuses if carried.features else None
        ended, parts = batch, None
        if carried.numbers is not None:
            ended = [request for request in batch if request.ends_whole]
            parts = carried.numbers, [request.first_row for request in batch]
        self._metrics.answered(
            arrivals_s=sorted([request.arrival_s for request in ended]),
            rows=carried.rows,
            started_s=carried.started_s,
            features_s=carried.joined_s - carried.started_s if carried.features else None,
            infer_s=carried.inferred_s - carried.joined_s,
            finished_s=carried.replied_s,
            statuses=carried.features.count_statuses() if carried.features else None,
        )
        if carried.features and self._plan is not None and self._view_metrics is not None:
            self._view_metrics.read(
                self._plan.view_names,
                self._plan.view_of_feature,
                None if carried.features.is_complete else carried.features.statuses,
                carried.now_s - carried.features.event_times_s,
            )
        if self._calls is not None:
            traced = self._traced(batch, carried)
            if traced is not None:
                self._calls.answered(traced)
        if self._record is not None and self._schema is not None:
            self._record(
                BatchRecord(
                    schema=self._schema,
                    first_number=carried.first_number,
                    request_rows=[request.rows for request in batch],
                    rows=carried.rows,
                    inputs=carried.inputs,
                    statuses=statuses,
                    outputs=carried.arrays,
                    time_s=carried.now_s,
                    byte_count=_held_bytes(carried.inputs, carried.arrays),
                    parts=parts,
                )
            )

        if self._skew_log is not None and carried.features is not None:
            self._skew_log.put(
                self._skew_source,
                carried.entities,
                carried.features.stored or carried.features,
                first_number=carried.first_number,
                request_rows=[request.rows for request in batch],
                time_s=carried.now_s,
                parts=parts,
            )

    def _traced(self, batch: Sequence[ObservedRequest], carried: Carried) -> TracedBatch | None:
        if not [request for request in batch if request.trace is not None]:
            return None  # nearly always, where one call in a hundred is sampled
        sampled = [
            (trace, request, number)
            for number, request in zip(_numbers(batch, carried), batch, strict=True)
            if (trace := request.trace) is not None and request.ends_whole
        ]
        if not sampled:
            return None
        return TracedBatch(
            model=self._name,
            version=self._version,
            rows=carried.rows,
            requests=len(batch),
            started_s=carried.started_s,
            joined_s=carried.joined_s,
            inferred_s=carried.inferred_s,
            replied_s=carried.replied_s,
            has_features=carried.features is not None,
            is_remote=self._is_remote,
            calls=TracedCalls(
                traces=[trace for trace, _, _ in sampled],
                methods=[request.method for _, request, _ in sampled],
                arrivals_s=[request.arrival_s for _, request, _ in sampled],
                rows=[request.caller_rows for _, request, _ in sampled],
                prediction_ids=[f"{self._id_prefix}{number:010x}" for _, _, number in sampled],
            ),
        )


def _numbers(batch: Sequence[ObservedRequest], carried: Carried) -> Sequence[int]:
    first = carried.first_number
    return range(first, first + len(batch)) if carried.numbers is None else carried.numbers


def traceparent_of(batch: Sequence[ObservedRequest], called_s: float) -> str | None:
    """
    Let the first sampled trace go on in another server: one call there is for the whole batch.

    Args:
        batch: Whose model is called.
        called_s: When, on `time.perf_counter`'s clock.
    """
    for request in batch:
        if (trace := request.trace) is not None:
            trace.called_s = called_s
            return format_traceparent(trace.trace_id, trace.id_of(INFER))
    return None


def _schema(
    named: tuple[str, int, str], backend: Backend, join: FeatureJoin | None, rows_max: int
) -> RecordSchema:
    """Settle what is recorded; what a monitor would not take is left out, and said once."""
    inputs = _input_blocks(backend.inputs, join)
    outputs = [_block(spec) for spec in backend.outputs]
    kept_inputs = fitting(inputs, rows_max)
    kept_outputs = fitting([block for block in outputs if block is not None], rows_max)
    kept = {block.tensor for block in (*kept_inputs, *kept_outputs)}
    tensors = [spec.name for spec in (*backend.inputs, *backend.outputs)]
    if left_out := [name for name in tensors if name not in kept]:
        _LOG.warning("not_recorded", model=named[0], version=named[1], tensors=left_out[:16])
    outputs = [block if block in kept_outputs else None for block in outputs]
    return RecordSchema(*named, tuple(kept_inputs), tuple(outputs))


def _input_blocks(inputs: Sequence[TensorSpec], join: FeatureJoin | None) -> list[Block]:
    """Name what is recorded: tensors with a fixed, small number of values per row."""
    blocks = []
    for spec in inputs:
        block = _block(spec)
        if block is None:
            continue
        if join is not None:
            sources = join.column_sources(spec.name)
            block = block._replace(
                columns=tuple(
                    [
                        source if isinstance(source, str) else join.plan.features[source].name
                        for source in sources
                    ]
                ),
                features=tuple([None if isinstance(at, str) else at for at in sources]),
            )
        blocks.append(block)
    return blocks


def _block(spec: TensorSpec) -> Block | None:
    columns = column_names(spec.name, spec.shape[1:])
    return None if columns is None else Block(spec.name, columns, spec.datatype)


def _held_bytes(
    inputs: Mapping[str, NDArray[np.generic]], outputs: Sequence[NDArray[np.generic]]
) -> int:
    """Return about how much a record of these arrays keeps in memory."""
    held = _RECORD_BYTES
    for array in (*inputs.values(), *outputs):
        held += array.nbytes if array.dtype.kind != "O" else array.size * _TEXT_BYTES
    return held
