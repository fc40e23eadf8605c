"""A caller's rows on their way to a model, and the answered batch that they are cut from."""

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from headrace.batching.queued import QueuedRequest
from headrace.features.join import FeatureJoin
from headrace.features.store import FeatureRows
from headrace.telemetry.trace_context import Trace
from headrace.tensors import CheckedInputs, Signature, TensorSpec, encode

EDGE_MEMO_MAX = 4_096

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Answering:
    """
    What a reply says of the model version that made it.

    Args:
        name: The model's name.
        version: As decimal text.
        signature: What callers send and get.
        edge_memo: What the edge serialized once for this version; `remember` bounds it.
    """

    name: str
    version: str
    signature: Signature
    edge_memo: dict[Any, Any] = field(default_factory=dict)

    def remember(self, key: Any, value: T) -> T:
        """Put into `edge_memo` what was not there; return it."""
        if len(self.edge_memo) >= EDGE_MEMO_MAX:  # variable shapes: start over rather than grow
            self.edge_memo.clear()
        self.edge_memo[key] = value
        return value


class Request(QueuedRequest):
    """
    One caller's rows on their way to a model.

    Args:
        inputs: What `ServedModel.signature.check` returned.
        deadline_s: Unix seconds; infinite when the caller gave none.
        arrival_s: When it reached the port, on `time.perf_counter`'s clock.
        byte_count: Size of its message.
    """

    __slots__ = ("own_shapes", "raws", "served", "trace")

    batch_key: tuple[tuple[int, ...], ...]
    """Of each input, its shape after the row in the batch."""

    own_shapes: tuple[tuple[int, ...], ...]
    """As it came: smaller, where a model pads it."""

    PREDICTION_ID_LENGTH = 26

    method = ""
    """As `package.Service/Method`."""

    first_row = 0
    """Of the caller's rows, the one with which it begins."""

    ends_whole = True
    """Whether its caller has been answered once it is; not so with most parts of a request."""

    number: int | None = None
    """Of a part, its request's number; others have that of their place in the batch."""

    def __init__(
        self, inputs: CheckedInputs, deadline_s: float, arrival_s: float, byte_count: int
    ) -> None:
        rows, self.raws, trailing = inputs
        self.own_shapes = trailing
        super().__init__(
            rows, trailing, deadline_s=deadline_s, arrival_s=arrival_s, byte_count=byte_count
        )
        self.served: Answering | None = None
        """Who is to answer it."""
        self.trace: Trace | None = None
        """Set for a sampled call, before it is queued."""

    @property
    def caller_rows(self) -> int:
        """How many rows the caller sent."""
        return self.rows

    @abstractmethod
    def answer(self, batch: "AnsweredBatch", start: int, prediction_id: str) -> None:
        """Reply with rows [start, start + self.rows) of the batch."""


class StandIn(Request):
    """
    What waits in the queue in place of a caller's request, all of it or some rows.

    Args:
        request: The caller's.
        rows: How many.
        raws: Those rows of each input.
        byte_count: Their size.
    """

    __slots__ = ("method",)

    def __init__(
        self, request: Request, rows: int, raws: tuple[bytes | memoryview, ...], byte_count: int
    ) -> None:
        super().__init__(
            CheckedInputs(rows, raws, request.batch_key),
            request.deadline_s,
            request.arrival_s,
            byte_count,
        )
        self.own_shapes = request.own_shapes
        self.priority = request.priority
        self.timeout_s = request.timeout_s
        self.served = request.served
        self.trace = request.trace
        self.method = request.method
        self.caller = request.caller

    def drop_for(self) -> Callable[[Request], None]:
        """Return what drops the caller's request for this one's reason; it does not lead here."""
        is_shed, is_displaced, retry_after_s = self.is_shed, self.is_displaced, self.retry_after_s

        def drop(request: Request) -> None:
            request.is_shed, request.is_displaced = is_shed, is_displaced
            request.retry_after_s = retry_after_s
            request.drop()

        return drop


class OutputBlock:
    """
    One output of a whole batch, ready to be cut per caller.

    Fixed-width outputs are turned into bytes once per batch: a caller's share is then one slice.

    Args:
        spec: Which output.
        array: Its values, shape (rows, …).
        is_shared: Whether several callers will cut it; otherwise nothing is done beforehand.
    """

    __slots__ = ("_raw", "_stride", "array", "spec", "trailing")

    def __init__(
        self, spec: TensorSpec, array: NDArray[np.generic], *, is_shared: bool = True
    ) -> None:
        self.spec = spec
        self.array = array
        self.trailing = array.shape[1:]
        self._raw: bytes | None = None
        self._stride = 0
        if is_shared and spec.datatype != "BYTES" and array.shape[0]:
            self._raw = array.tobytes()
            self._stride = len(self._raw) // array.shape[0]

    def cut(self, sizes: Mapping[int, int]) -> "OutputBlock":
        """Return a block whose axes after the row have the given sizes, no larger than now."""
        kept = tuple(slice(sizes.get(axis)) for axis in range(len(self.trailing)))
        return OutputBlock(self.spec, self.array[(slice(None), *kept)], is_shared=False)

    def rows(self, start: int, stop: int) -> NDArray[np.generic]:
        """Return a view of the rows [start, stop)."""
        return self.array[start:stop]

    def raw(self, start: int, stop: int) -> bytes:
        """Return the rows [start, stop) as OIP raw bytes."""
        if self._raw is None:
            return encode(self.array[start:stop])
        return self._raw[start * self._stride : stop * self._stride]


@dataclass(frozen=True, slots=True)
class AnsweredBatch:
    """
    What one batch produced.

    Args:
        model: Who answers.
        outputs: In signature order.
        join: The feature join, for a model that has one.
        features: What was read for it, row for row.
        missing_per_row: How many features the model saw as missing, row for row.
        stale_per_row: How many of them were found and too old.
        output_shapes: Each output's shape after the row.
        started_s: When the batch was taken, on `time.perf_counter`'s clock.
        features_s: How long reading and joining features took.
        infer_s: How long the model took.
        inferred_s: When the model had answered, on the clock of `started_s`.
        now_s: Unix seconds when the features were read; ages are relative to it.
    """

    model: Answering
    outputs: tuple[OutputBlock, ...]
    join: FeatureJoin | None
    features: FeatureRows | None
    missing_per_row: list[int] | None
    stale_per_row: list[int] | None
    output_shapes: tuple[tuple[int, ...], ...]
    started_s: float
    features_s: float
    infer_s: float
    inferred_s: float
    now_s: float
