"""Predictions written as bytes say what those made of messages would."""

from types import SimpleNamespace

import numpy as np
import pytest
from google.protobuf.duration_pb2 import Duration
from hypothesis import example, given
from hypothesis import strategies as st

from headrace.features.memory_store import MemoryStore
from headrace.features.plan import FeatureSource, ViewSource, compile_plan
from headrace.features.values import ValueType
from headrace.request import AnsweredBatch, Answering, OutputBlock
from headrace.rpc.prediction_reply import write_reply
from headrace.tensors import NUMPY_DTYPES, Signature, TensorSpec
from headrace.v1 import prediction_service_pb2 as pb

ID = "0123456789abcdef0123456789"
NOW_S = 1_700_000_000.0
KINDS = {
    "FP16": ("floats", st.floats(width=16)),
    "FP32": ("floats", st.floats(width=32)),
    "FP64": ("doubles", st.floats()),
    "BOOL": ("bools", st.booleans()),
    "INT8": ("int32s", st.integers(-(2**7), 2**7 - 1)),
    "UINT16": ("int32s", st.integers(0, 2**16 - 1)),
    "UINT32": ("int64s", st.integers(0, 2**32 - 1)),
    "INT64": ("int64s", st.integers(-(2**63), 2**63 - 1)),
    "BYTES": ("strings", st.text(max_size=3)),
}
"""By datatype, the column in which it is returned, and values."""

TOOK_S = st.one_of(
    st.sampled_from([0.0, 1e-9, 127e-9, 128e-9, 16.384e-6, 2.097151e-3, 2.097152e-3, 0.3, 1.0]),
    st.floats(0.0, 0.01),
    st.floats(0.0, 1e6),
)


@st.composite
def outputs(draw, rows, name):
    datatype = draw(st.sampled_from(list(KINDS)))
    trailing = tuple(draw(st.lists(st.integers(0, 3), max_size=2)))
    count = rows * int(np.prod(trailing))
    values = draw(st.lists(KINDS[datatype][1], min_size=count, max_size=count))
    array = np.array(values, NUMPY_DTYPES[datatype]).reshape(rows, *trailing)
    if array.dtype.kind == "f" and draw(st.booleans()):  # as a backend of another machine may do
        array = array.astype(array.dtype.newbyteorder(">"))
    spec = TensorSpec(name, datatype, (-1,) * array.ndim)
    return OutputBlock(spec, array, is_shared=draw(st.booleans()))


@st.composite
def features(draw, rows):
    kinds = [ValueType.FLOAT, ValueType.DOUBLE, ValueType.BOOL, ValueType.INT64, ValueType.STRING]
    some = {"FLOAT": 0.5, "DOUBLE": 0.25, "BOOL": True, "INT64": -7, "STRING": "nötig"}
    key, store, sources = (("id", "id", ValueType.INT64),), MemoryStore(), []
    for view in ("near", "far"):
        types = draw(st.lists(st.sampled_from(kinds), min_size=1, max_size=3))
        own = tuple(FeatureSource(f"{view}_{i}", kind) for i, kind in enumerate(types))
        sources.append(ViewSource(view, key, own, ttl_s=4.5))
        for row in range(rows):
            values = {one.name: some[one.value_type.name] for one in own if draw(st.booleans())}
            store.put(view, {"id": row}, values, NOW_S - draw(st.sampled_from([0.0, 3.25, 5.0])))
    plan = compile_plan("service", "demo", "1", sources)
    read = store.read(plan, {"id": np.arange(rows)}, now_s=NOW_S, timeout_s=1.0, max_age_s=None)
    return SimpleNamespace(plan=plan), read


@st.composite
def batches(draw):
    """Return an answered batch, and how many rows each of its requests has."""
    is_batched = draw(st.booleans())
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4)) if is_batched else [1]
    rows = sum(sizes)
    count = draw(st.integers(1, 3))
    blocks = tuple(draw(outputs(rows, f"y{i}")) for i in range(count))
    has_features = draw(st.booleans())
    join, read = draw(features(rows)) if has_features else (None, None)
    counts = st.lists(st.integers(0, 200), min_size=rows, max_size=rows)
    signature = Signature(
        "m", [TensorSpec("x", "FP32", (-1, 1))], [one.spec for one in blocks], 64 * is_batched
    )
    started_s = draw(TOOK_S)
    return sizes, AnsweredBatch(
        model=Answering("m", str(draw(st.integers(1, 2**40))), signature),
        outputs=blocks,
        join=join,
        features=read,
        missing_per_row=draw(counts) if has_features else None,
        stale_per_row=draw(counts) if has_features else None,
        output_shapes=tuple(one.trailing for one in blocks),
        started_s=started_s,
        features_s=draw(TOOK_S),
        infer_s=draw(TOOK_S),
        inferred_s=started_s + draw(TOOK_S),
        now_s=NOW_S,
    )


def duration(seconds):
    whole = int(seconds)
    return Duration(seconds=whole, nanos=int((seconds - whole) * 1e9))


def fill(column, kind, array):
    """Put an array's values into a `Column`, one by one."""
    values = [value.item() if isinstance(value, np.generic) else value for value in array.ravel()]
    getattr(column, kind).SetInParent()
    getattr(column, kind).values.extend(values)


def expected(batch, start, stop, selection, arrival_s, include_features):
    """Make the reply of messages."""
    reply = pb.PredictResponse(
        prediction_id=ID,
        model_name=batch.model.name,
        model_version=int(batch.model.version),
        timings=pb.Timings(
            queue=duration(batch.started_s - arrival_s),
            features=duration(batch.features_s),
            infer=duration(batch.infer_s),
            total=duration(batch.inferred_s - arrival_s),
        ),
    )
    if batch.missing_per_row is not None:
        reply.missing_feature_count = sum(batch.missing_per_row[start:stop])
        reply.stale_feature_count = sum(batch.stale_per_row[start:stop])
    for i in selection:
        block = batch.outputs[i]
        array = block.array[start:stop]
        is_batched = batch.model.signature.max_batch_size
        column = reply.outputs.add(
            name=block.spec.name, shape=array.shape if is_batched else array.shape[1:]
        )
        fill(column.values, KINDS[block.spec.datatype][0], array)
    if include_features and batch.features is not None:
        ages_s = NOW_S - batch.features.event_times_s
        for i, feature in enumerate(batch.join.plan.features):
            column = reply.features.add(name=feature.name)
            kind = {"FLOAT": "FP32", "DOUBLE": "FP64", "STRING": "BYTES"}
            name = feature.value_type.name
            values = batch.features.values[i][start:stop]
            if name == "STRING":
                values = np.array([value or "" for value in values], object)
            fill(column.values, KINDS[kind.get(name, name)][0], values)
            column.statuses.extend(batch.features.statuses[i, start:stop].tolist())
            column.ages_s.extend(ages_s[feature.view_index, start:stop].tolist())
    return reply


@given(batches(), st.data(), st.booleans())
def test_a_reply_says_what_one_made_of_messages_would(made, data, include_features):
    sizes, batch = made
    start = 0
    for rows in sizes:
        selection = tuple(data.draw(st.permutations(range(len(batch.outputs)))))
        arrival_s = batch.started_s - data.draw(TOOK_S)

        reply = write_reply(
            batch,
            selection[: data.draw(st.integers(1, len(selection)))],
            start,
            start + rows,
            prediction_id=ID,
            arrival_s=arrival_s,
            include_features=include_features,
        )

        chosen = [int(one.name[1:]) for one in pb.PredictResponse.FromString(reply).outputs]
        own = expected(batch, start, start + rows, chosen, arrival_s, include_features)
        assert pb.PredictResponse.FromString(reply).SerializeToString() == own.SerializeToString()
        start += rows


def one_row(queued_s, features_s=0.0, infer_s=0.0, total_s=0.0):
    array = np.ones((1, 1), np.float32)
    spec = TensorSpec("y", "FP32", (-1, 1))
    batch = AnsweredBatch(
        model=Answering("m", "1", Signature("m", [spec], [spec], 8)),
        outputs=(OutputBlock(spec, array),),
        join=None,
        features=None,
        missing_per_row=None,
        stale_per_row=None,
        output_shapes=((1,),),
        started_s=queued_s,
        features_s=features_s,
        infer_s=infer_s,
        inferred_s=total_s,
        now_s=NOW_S,
    )
    options = {"prediction_id": ID, "arrival_s": 0.0, "include_features": False}
    return batch, pb.PredictResponse.FromString(write_reply(batch, (0,), 0, 1, **options))


@given(TOOK_S, TOOK_S, TOOK_S, TOOK_S)
@example(1e8 + 0.5, 1e8 + 0.25, 1e8 + 0.125, 1e9 + 0.75)  # as long as four durations can be
@example(-1e-6, -2.0, -1e9, -1.5)  # a clock that went backwards
def test_times_of_any_length_are_told(queued_s, features_s, infer_s, total_s):
    _, reply = one_row(queued_s, features_s, infer_s, total_s)

    assert reply.timings.queue == duration(queued_s)
    assert reply.timings.features == duration(features_s)
    assert reply.timings.infer == duration(infer_s)
    assert reply.timings.total == duration(total_s)


@pytest.mark.parametrize("rows", [1, 2])
def test_another_dtype_than_that_of_the_first_reply_is_written_as_what_it_is(rows):
    """A model's outputs have one; a backend that returns another must not have it read wrong."""
    batch, _ = one_row(0.0)
    array = np.arange(rows, dtype=np.int32).reshape(rows, 1)
    spec = batch.outputs[0].spec
    options = {"prediction_id": ID, "arrival_s": 0.0, "include_features": False}
    for other in (array.astype(np.float32), array, array.astype(np.float64)):
        object.__setattr__(batch, "outputs", (OutputBlock(spec, other),))

        reply = pb.PredictResponse.FromString(write_reply(batch, (0,), 0, rows, **options))

        values = reply.outputs[0].values
        assert list(getattr(values, values.WhichOneof("kind")).values) == list(range(rows))


def test_shapes_that_never_repeat_do_not_fill_the_memory():
    batch, _ = one_row(0.0)
    spec = batch.outputs[0].spec
    for width in range(5_000):
        object.__setattr__(batch, "outputs", (OutputBlock(spec, np.ones((1, width), np.float32)),))
        object.__setattr__(batch, "output_shapes", ((width,),))
        write_reply(batch, (0,), 0, 1, prediction_id=ID, arrival_s=0.0, include_features=False)

    assert len(batch.model.edge_memo) <= 4_096
