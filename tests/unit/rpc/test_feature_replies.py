"""Replies written as bytes say what those made of messages would: Feast's, and the packed ones."""

import gc
import math
import weakref
from itertools import pairwise

import numpy as np
import pytest
from feast.protos.feast.serving.ServingService_pb2 import GetOnlineFeaturesResponse
from feast.protos.feast.types.Value_pb2 import RepeatedValue, Value
from hypothesis import given
from hypothesis import strategies as st

from headrace.feature_reads import FeatureRead
from headrace.features.memory_store import MemoryStore
from headrace.features.plan import FeatureSource, FeatureStatus, ViewSource, compile_plan
from headrace.features.values import ValueType
from headrace.rpc.feast_reply import FeastReplies, FeastReplyPlan
from headrace.rpc.packed_reply import PackedReplies
from headrace.v1 import feature_service_pb2 as pb

PRESENT, NULL, NOT_FOUND, OUTSIDE = FeatureStatus
NOW_S = 1_700_000_000.0
KEY = (("driver_id", "driver_id", ValueType.INT64),)
FLOATS = st.floats(width=32, allow_nan=False)
VALUES = {
    ValueType.FLOAT: FLOATS,
    ValueType.DOUBLE: st.floats(allow_nan=False),
    ValueType.BOOL: st.booleans(),
    ValueType.INT32: st.integers(-(2**31), 2**31 - 1),
    ValueType.INT64: st.integers(-(2**63), 2**63 - 1),
    ValueType.UNIX_TIMESTAMP: st.integers(0, 2**40),
    ValueType.STRING: st.text(max_size=200),
    ValueType.BYTES: st.binary(max_size=200),
    ValueType.FLOAT_LIST: st.lists(FLOATS, max_size=3),
    ValueType.STRING_LIST: st.lists(st.text(max_size=3), max_size=3),
    ValueType.UUID: st.uuids().map(str),
    ValueType.STRING_SET: st.lists(st.text(max_size=3), max_size=3).map(
        lambda texts: Value(string_set_val={"val": texts}).SerializeToString()
    ),
}
TIMES_S = st.sampled_from([0.0, 1.0, 127.0, 128.0, 1.5e9, NOW_S - 5, NOW_S - 4.25, NOW_S - 1e-6])


@st.composite
def stores(draw, fixed_width_only=False):
    kinds = list(VALUES)[:3] if fixed_width_only else list(VALUES)
    types = draw(st.lists(st.lists(st.sampled_from(kinds), min_size=1, max_size=4), max_size=3))
    types = types or [[ValueType.FLOAT]]
    store, sources = MemoryStore(), []
    for i, own in enumerate(types):
        features = tuple(FeatureSource(f"f{i}_{j}", kind) for j, kind in enumerate(own))
        sources.append(
            ViewSource(f"view{i}", KEY, features, ttl_s=draw(st.sampled_from([None, 4.5])))
        )
    plan = compile_plan("service", "demo", "1", sources)
    rows = draw(st.integers(1, 6))
    for row in range(rows):
        for source in sources:
            if draw(st.integers(0, 4)):
                missing = st.just(None)
                values = {
                    feature.name: draw(
                        VALUES[feature.value_type] if draw(st.integers(0, 5)) else missing
                    )
                    for feature in source.features
                    if draw(st.integers(0, 5))
                }
                store.put(source.name, {"driver_id": row}, values, draw(TIMES_S))
    return plan, store, rows


def expected(plan, rows, start, stop, *, as_feast):
    reply = GetOnlineFeaturesResponse()
    reply.metadata.feature_names.val.extend(["driver_id", *(of.name for of in plan.features)])
    entity = reply.results.add()
    for row in range(start, stop):
        entity.values.add(int64_val=row)
        entity.statuses.append(PRESENT)
        entity.event_timestamps.add()
    for i, feature in enumerate(plan.features):
        vector = reply.results.add()
        for row in range(start, stop):
            status = rows.statuses[i, row]
            value = vector.values.add()
            if status == PRESENT or (as_feast and status == OUTSIDE):
                found = rows.values[i][row]
                name = f"{feature.value_type.name.lower()}_val"
                if feature.value_type.is_opaque:
                    value.ParseFromString(found)
                elif isinstance(found, list):
                    getattr(value, name).SetInParent()
                    getattr(value, name).val.extend(found)
                else:
                    setattr(value, name, getattr(found, "item", lambda found=found: found)())
            vector.statuses.append(PRESENT if as_feast else status)
            time_s = rows.event_times_s[feature.view_index, row]
            time = vector.event_timestamps.add()
            if not math.isnan(time_s):
                micros = round(time_s * 1e6)
                time.seconds, time.nanos = micros // 10**6, micros % 10**6 * 1000
    return reply


def check(plan, store, row_count, cuts, *, as_feast):
    rows = store.read(plan, {"driver_id": np.arange(row_count)}, now_s=NOW_S, timeout_s=1.0)
    bounds = sorted({0, row_count, *(cut for cut in cuts if cut < row_count)})
    singles = [start for start, stop in pairwise(bounds) if stop - start == 1]
    replies = FeastReplies(
        FeastReplyPlan(plan, as_feast=as_feast), FeatureRead(plan, rows, NOW_S, singles)
    )
    for start, stop in pairwise(bounds):
        keys = RepeatedValue()
        for row in range(start, stop):
            keys.val.add(int64_val=row)
        message = replies.message(start, stop, [keys.SerializeToString()], with_versions=False)
        own = GetOnlineFeaturesResponse.FromString(message)
        assert own == expected(plan, rows, start, stop, as_feast=as_feast)


@given(stores(), st.sets(st.integers(1, 5)), st.booleans())
def test_any_values_are_written_as_messages_would_be(drawn, cuts, as_feast):
    check(*drawn, cuts, as_feast=as_feast)


@given(stores(fixed_width_only=True), st.booleans())
def test_one_row_replies_of_fixed_width_are_too(drawn, as_feast):
    check(*drawn, range(1, 6), as_feast=as_feast)


def packed_value(of, row):
    """A feature's value in a packed reply, as Feast's message; None for a placeholder."""
    if of.statuses and of.statuses[row] not in {PRESENT, OUTSIDE}:
        return None
    if of.WhichOneof("kind") == "serialized_values":
        return Value.FromString(of.serialized_values.values[row])
    return getattr(of.values, of.values.WhichOneof("kind")).values[row]


@given(stores(), st.sets(st.integers(1, 5)))
def test_packed_replies_hold_the_same(drawn, cuts):
    plan, store, row_count = drawn
    rows = store.read(plan, {"driver_id": np.arange(row_count)}, now_s=NOW_S, timeout_s=1.0)
    replies = PackedReplies(FeatureRead(plan, rows, NOW_S, []))
    bounds = sorted({0, row_count, *(cut for cut in cuts if cut < row_count)})
    for start, stop in pairwise(bounds):
        reply = pb.GetOnlineFeaturesResponse.FromString(
            replies.message(start, stop, with_times=True)
        )
        wanted = expected(plan, rows, start, stop, as_feast=False)
        for i, (feature, of) in enumerate(zip(plan.features, reply.features, strict=True)):
            statuses = list(of.statuses) or [PRESENT] * (stop - start)
            assert statuses == list(wanted.results[i + 1].statuses)
            times_s = reply.event_times[of.view_index].event_times_s
            np.testing.assert_array_equal(times_s, rows.event_times_s[of.view_index, start:stop])
            for row, status in enumerate(statuses):
                value = packed_value(of, row)
                if status == PRESENT and not isinstance(value, Value):
                    value = Value(**{f"{feature.value_type.name.lower()}_val": value})
                if status == PRESENT:
                    assert value == wanted.results[i + 1].values[row]
                elif status != OUTSIDE:
                    assert value is None


def test_event_times_of_many_lengths_do_without_a_template():
    source = ViewSource("v", KEY, (FeatureSource("f", ValueType.FLOAT),))
    plan = compile_plan("service", "demo", "1", [source])
    store = MemoryStore()
    for row in range(60):
        store.put("v", {"driver_id": row}, {"f": 0.5}, float(2 ** (row % 40)) + row % 3 * 1e-6)

    check(plan, store, 60, range(1, 60), as_feast=False)


def test_a_version_of_a_view_is_told_by_its_number():
    source = ViewSource(
        "v_v2", KEY, (FeatureSource("f", ValueType.FLOAT),), label="v@v2", version=2
    )
    plan = compile_plan("", "demo", "1", [source], full_feature_names=True)
    rows = MemoryStore().read(plan, {"driver_id": np.arange(1)}, now_s=NOW_S, timeout_s=1.0)
    replies = FeastReplies(
        FeastReplyPlan(plan, as_feast=False), FeatureRead(plan, rows, NOW_S, [0])
    )

    reply = GetOnlineFeaturesResponse.FromString(replies.message(0, 1, [b""], with_versions=True))

    assert list(reply.metadata.feature_names.val) == ["driver_id", "v@v2__f"]
    (view,) = reply.metadata.feature_view_metadata
    assert (view.name, view.version) == ("v", 2)


@pytest.mark.parametrize("as_feast", [True, False])
def test_a_value_that_is_too_old_is_withheld_unless_feast_is_imitated(as_feast):
    source = ViewSource("v", KEY, (FeatureSource("f", ValueType.FLOAT),), ttl_s=1.0)
    plan = compile_plan("service", "demo", "1", [source])
    store = MemoryStore()
    store.put("v", {"driver_id": 0}, {"f": 0.5}, NOW_S - 60)
    rows = store.read(plan, {"driver_id": np.arange(1)}, now_s=NOW_S, timeout_s=1.0)
    replies = FeastReplies(
        FeastReplyPlan(plan, as_feast=as_feast), FeatureRead(plan, rows, NOW_S, [0])
    )

    reply = GetOnlineFeaturesResponse.FromString(replies.message(0, 1, [b""], with_versions=False))

    assert reply.results[1].values[0].HasField("float_val") is as_feast
    assert list(reply.results[1].statuses) == [PRESENT if as_feast else OUTSIDE]


def view(name="v", label="", version=0, features=(("f", ValueType.FLOAT),)):
    sources = tuple(FeatureSource(feature, value_type) for feature, value_type in features)
    return ViewSource(name, KEY, sources, label=label, version=version)


def read_of(plan, rows=1, store=None):
    found = (store or MemoryStore()).read(
        plan, {"driver_id": np.arange(rows)}, now_s=NOW_S, timeout_s=1.0
    )
    return FeatureRead(plan, found, NOW_S, [0] if rows == 1 else [])


def feast_message(plan, rows=1, store=None, **how):
    replies = FeastReplies(FeastReplyPlan(plan, as_feast=False), read_of(plan, rows, store))
    return replies.message(0, rows, [b""], with_versions=how.get("with_versions", False))


def test_of_two_versions_of_a_view_the_first_is_told():
    plan = compile_plan(
        "", "demo", "1", [view("v_v1", "v@v1", 1), view("v_v2", "v@v2", 2)], full_feature_names=True
    )

    reply = GetOnlineFeaturesResponse.FromString(feast_message(plan, with_versions=True))

    assert [(one.name, one.version) for one in reply.metadata.feature_view_metadata] == [("v", 1)]


def test_a_plan_that_was_replied_with_dies_with_its_last_user():
    plan = compile_plan("service", "demo", "1", [view()])
    read = read_of(plan)
    reply_plan = FeastReplyPlan(plan, as_feast=False)
    FeastReplies(reply_plan, read).message(0, 1, [b""], with_versions=True)
    PackedReplies(read).message(0, 1, with_times=True)
    watched = weakref.ref(plan)

    del plan, read
    gc.collect()

    assert watched() is None
    assert reply_plan.value_types == [ValueType.FLOAT]  # what is kept is enough to go on with


@pytest.mark.parametrize(
    ("value_type", "kind"), [(ValueType.BYTES, "bytes_values"), (ValueType.STRING, "strings")]
)
@pytest.mark.parametrize("value", [None, "text"])
def test_the_kind_of_a_packed_column_is_that_of_its_feature_whatever_is_missing(
    value_type, kind, value
):
    plan = compile_plan("service", "demo", "1", [view(features=[("f", value_type)])])
    store = MemoryStore()
    if value is not None and value_type is ValueType.BYTES:
        value = value.encode()
    store.put("v", {"driver_id": 0}, {"f": value}, NOW_S)

    message = PackedReplies(read_of(plan, 2, store)).message(0, 2, with_times=False)

    (feature,) = pb.GetOnlineFeaturesResponse.FromString(message).features
    assert feature.values.WhichOneof("kind") == kind
    assert len(getattr(feature.values, kind).values) == 2


def test_a_hundred_rows_of_fifty_floats_are_a_fifth_of_feasts_bytes():
    """What `docs/features.md` says: 20 KB of numbers, and next to nothing around them."""
    views = [
        view(f"view{i}", features=[(f"f{i}_{j}", ValueType.FLOAT) for j in range(10)])
        for i in range(5)
    ]
    plan = compile_plan("service", "demo", "1", views)
    store = MemoryStore()
    for row in range(100):
        for i in range(5):
            values = {f"f{i}_{j}": row + i + j / 8 for j in range(10)}
            store.put(f"view{i}", {"driver_id": row}, values, NOW_S - 0.25)

    packed = PackedReplies(read_of(plan, 100, store)).message(0, 100, with_times=False)
    feasts = feast_message(plan, 100, store)

    assert 20_000 < len(packed) < 21_500
    assert len(feasts) > 5 * len(packed)
