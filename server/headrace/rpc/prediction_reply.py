"""`headrace.v1.PredictResponse`, written as bytes: what replies of one shape share, then their own.

The names, the shape and the lengths of fixed-width outputs are the same in every reply of so many
rows, so they are written once per model version; what a batch took is written once per batch.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from google.protobuf import duration_pb2
from numpy.typing import NDArray

from headrace.features.plan import FeaturePlan
from headrace.request import AnsweredBatch, OutputBlock, Request
from headrace.rpc.columns import FIXED_COLUMNS, encode_column
from headrace.v1 import prediction_service_pb2 as pb
from headrace.wire import delimited, tag, varint

_BATCHES_KEPT = 64
"""As many as may be answered at a time, with some to spare."""


def write_reply(
    batch: AnsweredBatch,
    selection: tuple[int, ...],
    start: int,
    stop: int,
    *,
    prediction_id: str,
    arrival_s: float,
    include_features: bool,
) -> bytes:
    """
    Serialize the reply to one request.

    Args:
        batch: That the request was in.
        selection: Places of the outputs that are returned, in order.
        start: Its first row in the batch.
        stop: After its last row.
        prediction_id: Of `Request.PREDICTION_ID_LENGTH` ASCII characters.
        arrival_s: When it came, on the clock of `batch.started_s`.
        include_features: Whether to return what the model saw, if it has features.
    """
    frame = _frame(batch, selection, stop - start)
    parts = [_PREDICTION_ID, prediction_id.encode(), frame.model]
    missing, stale = batch.missing_per_row, batch.stale_per_row
    if missing is not None and stale is not None:
        if stop - start == 1:
            parts.append(_counts(missing[start], stale[start]))
        else:
            parts.append(_counts(sum(missing[start:stop]), sum(stale[start:stop])))
    parts.append(_timings(batch, arrival_s))
    outputs = batch.outputs
    for i, dtype, prefix, head in frame.outputs:
        block = outputs[i]
        if dtype is not None and block.array.dtype == dtype:
            parts += (prefix, block.raw(start, stop))
        else:
            parts.append(_output(head, block, start, stop))
    if include_features and batch.features is not None:
        parts += _features(batch, start, stop)
    return b"".join(parts)


class _Output(NamedTuple):
    """
    One output of every reply of one shape.

    Args:
        place: Which of the batch's.
        dtype: Of arrays whose bytes are the column's; None for columns that must be encoded.
        prefix: What comes before those bytes.
        head: The name and the shape, serialized.
    """

    place: int
    dtype: np.dtype[Any] | None
    prefix: bytes
    head: bytes


class _Frame(NamedTuple):
    """
    What all replies of one shape have in common.

    Args:
        model: Its name and version, serialized.
        outputs: Those that are returned, in order.
    """

    model: bytes
    outputs: tuple[_Output, ...]


def _frame(batch: AnsweredBatch, selection: tuple[int, ...], rows: int) -> _Frame:
    key = (pb.PredictResponse, selection, rows, batch.output_shapes)
    frame: _Frame | None = batch.model.edge_memo.get(key)
    if frame is None:
        frame = batch.model.remember(key, _make_frame(batch, selection, rows))
    return frame


def _make_frame(batch: AnsweredBatch, selection: Sequence[int], rows: int) -> _Frame:
    model = batch.model
    reply = pb.PredictResponse(model_name=model.name, model_version=int(model.version))
    outputs = []
    for i in selection:
        block = batch.outputs[i]
        shape = (rows, *block.trailing) if model.signature.max_batch_size else block.trailing
        head = pb.OutputColumn(name=block.spec.name, shape=shape).SerializeToString()
        dtype, prefix = block.array.dtype, b""
        fields = FIXED_COLUMNS.get(dtype)
        if fields is not None:
            size = block.array[:1].nbytes * (rows if model.signature.max_batch_size else 1)
            for field in (*fields, _VALUES_OF_OUTPUT):  # from the inside
                prefix = field + varint(len(prefix) + size) + prefix
            prefix = _OUTPUTS + varint(len(head) + len(prefix) + size) + head + prefix
        outputs.append(_Output(i, None if fields is None else dtype, prefix, head))
    return _Frame(reply.SerializeToString(), tuple(outputs))


def _output(head: bytes, block: OutputBlock, start: int, stop: int) -> bytes:
    values = encode_column(block.rows(start, stop))
    return delimited(_OUTPUTS, head + delimited(_VALUES_OF_OUTPUT, values))


def _features(batch: AnsweredBatch, start: int, stop: int) -> list[bytes]:
    assert batch.join is not None
    assert batch.features is not None
    plan, rows = batch.join.plan, batch.features
    ages_s: NDArray[np.float64] = batch.now_s - rows.event_times_s[:, start:stop]
    ages = [delimited(_AGES, one.tobytes()) for one in ages_s.astype("<f8", copy=False)]
    return [
        delimited(
            _FEATURES,
            head
            + delimited(_VALUES_OF_FEATURE, encode_column(values[start:stop]))
            # A status is one byte, and so is its varint.
            + delimited(_STATUSES, statuses.tobytes())
            + ages[feature.view_index],
        )
        for head, feature, values, statuses in zip(
            _feature_heads(batch, plan),
            plan.features,
            rows.values,
            rows.statuses[:, start:stop],
            strict=True,
        )
    ]


def _feature_heads(batch: AnsweredBatch, plan: FeaturePlan) -> list[bytes]:
    heads: list[bytes] | None = batch.model.edge_memo.get(plan)
    if heads is None:
        columns = [pb.FeatureColumn(name=feature.name) for feature in plan.features]
        heads = batch.model.remember(plan, [column.SerializeToString() for column in columns])
    return heads


@lru_cache(maxsize=8_192)
def _counts(missing: int, stale: int) -> bytes:
    reply = pb.PredictResponse(missing_feature_count=missing, stale_feature_count=stale)
    return bytes(reply.SerializeToString())


def _timings(batch: AnsweredBatch, arrival_s: float) -> bytes:
    queue = _duration(batch.started_s - arrival_s)
    total = _duration(batch.inferred_s - arrival_s)
    size, of_batch = _timings_of_batch(batch.features_s, batch.infer_s)
    # Each of the two has a tag and a length; all four together are less than 128 bytes.
    size += len(queue) + len(total) + 4
    head = (_TIMINGS, _BYTE[size], _QUEUE, _BYTE[len(queue)], queue)
    return b"".join((*head, of_batch, _TOTAL, _BYTE[len(total)], total))


@lru_cache(maxsize=_BATCHES_KEPT)
def _timings_of_batch(features_s: float, infer_s: float) -> tuple[int, bytes]:
    """Return what all requests of a batch have of its timings, and the size of that."""
    written = delimited(_FEATURES_TOOK, _duration(features_s))
    written += delimited(_INFER_TOOK, _duration(infer_s))
    return len(written), written


def _duration(seconds: float) -> bytes:
    """Serialize a `google.protobuf.Duration`: 22 bytes at most."""
    whole = int(seconds)
    nanos = int((seconds - whole) * 1e9)
    if whole or nanos <= 0:
        return bytes(duration_pb2.Duration(seconds=whole, nanos=nanos).SerializeToString())
    if 1 << 14 <= nanos < 1 << 21:  # 16 µs to 2 ms
        return bytes((_NANOS, nanos & 0x7F | 0x80, nanos >> 7 & 0x7F | 0x80, nanos >> 14))
    return _NANOS_TAG + varint(nanos)


def _tag_of(message: Any, field: str) -> bytes:
    return tag(message.DESCRIPTOR.fields_by_name[field].number)


_BYTE = tuple(bytes((i,)) for i in range(0x80))
_PREDICTION_ID = _tag_of(pb.PredictResponse, "prediction_id") + varint(Request.PREDICTION_ID_LENGTH)
_OUTPUTS = _tag_of(pb.PredictResponse, "outputs")
_FEATURES = _tag_of(pb.PredictResponse, "features")
_TIMINGS = _tag_of(pb.PredictResponse, "timings")
_VALUES_OF_OUTPUT = _tag_of(pb.OutputColumn, "values")
_VALUES_OF_FEATURE = _tag_of(pb.FeatureColumn, "values")
_STATUSES = _tag_of(pb.FeatureColumn, "statuses")
_AGES = _tag_of(pb.FeatureColumn, "ages_s")
_QUEUE = _tag_of(pb.Timings, "queue")
_FEATURES_TOOK = _tag_of(pb.Timings, "features")
_INFER_TOOK = _tag_of(pb.Timings, "infer")
_TOTAL = _tag_of(pb.Timings, "total")
_NANOS_TAG = duration_pb2.Duration(nanos=1).SerializeToString()[:1]
_NANOS = _NANOS_TAG[0]
