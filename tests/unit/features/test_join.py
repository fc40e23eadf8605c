"""The feature join: which models fit which services, and what the model is given."""

import numpy as np
import pytest

from headrace.errors import ModelLoadError
from headrace.features.join import KEY_BYTES_MAX, FeatureJoin
from headrace.features.memory_store import MemoryStore
from headrace.features.plan import FeatureSource, ViewSource, compile_plan
from headrace.features.values import ValueType
from headrace.tensors import TensorSpec

DRIVER = ("driver_id", "driver_id", ValueType.INT64)
NAME = ("name", "name", ValueType.STRING)
NAN = np.nan


def plan_of(*keys, **features):
    """A service of one view; a feature is a type, or a type and its default."""
    sources = tuple(
        FeatureSource(name, *(spec if isinstance(spec, tuple) else (spec,)))
        for name, spec in features.items()
    )
    view = ViewSource("view", keys or (DRIVER,), sources, ttl_s=100.0)
    return compile_plan("service", "demo", "1", [view])


def join_of(plan, *inputs, feature_order=None, missing="nan", max_batch_size=8):
    return FeatureJoin(
        plan=plan,
        model_inputs=inputs,
        model="model",
        feature_order=feature_order,
        missing_features=missing,
        max_batch_size=max_batch_size,
    )


def rows_of(plan, *rows):
    """Read rows, each the values of a driver: its age in seconds first, None for no such driver."""
    store = MemoryStore()
    for driver, row in enumerate(rows):
        if row is not None:
            age_s, values = row
            store.put("view", {"driver_id": driver}, values, event_time_s=1e9 - age_s)
    drivers = np.arange(len(rows))
    return store.read(plan, {"driver_id": drivers}, now_s=1e9, timeout_s=1.0)


def matrix(columns, datatype="FP32"):
    return TensorSpec("x", datatype, (-1, columns))


FLOATS = plan_of(a=ValueType.FLOAT, b=ValueType.FLOAT)
DEFAULTS = plan_of(a=(ValueType.FLOAT, "-1"), b=(ValueType.FLOAT, "-2"))
MIXED = plan_of(
    real=ValueType.FLOAT, wide=ValueType.DOUBLE, whole=ValueType.INT64, flag=ValueType.BOOL
)


def test_callers_send_the_join_keys_one_value_per_row():
    join = join_of(plan_of(DRIVER, NAME, a=ValueType.FLOAT), matrix(1))
    assert join.inputs == (
        TensorSpec("driver_id", "INT64", (-1, 1), is_column=True, widens_int32=True),
        TensorSpec("name", "BYTES", (-1, 1), is_column=True, element_bytes_max=KEY_BYTES_MAX),
    )


def test_a_name_in_feature_order_that_the_service_lacks_is_sent_with_the_request():
    join = join_of(FLOATS, matrix(3, "FP64"), feature_order=["a", "distance", "b"])
    assert join.inputs[1:] == (TensorSpec("distance", "FP64", (-1, 1), is_column=True),)
    got = join.assemble(
        rows_of(FLOATS, (0, {"a": 1.0, "b": 2.0}), (0, {"a": 3.0, "b": 4.0})),
        {"distance": np.array([[0.1], [0.2]])},
    )
    np.testing.assert_array_equal(got["x"], [[1.0, 0.1, 2.0], [3.0, 0.2, 4.0]])


def test_an_input_that_the_service_lacks_is_sent_with_the_request():
    inputs = [TensorSpec("a", "FP32", (-1, 1)), TensorSpec("day", "INT32", (-1,))]
    join = join_of(plan_of(a=ValueType.FLOAT), *inputs)
    assert join.inputs[1:] == (TensorSpec("day", "INT32", (-1, 1), is_column=True),)
    got = join.assemble(rows_of(join.plan, (0, {"a": 1.0})), {"day": np.array([[5]], np.int32)})
    assert (got["a"].tolist(), got["day"].tolist()) == ([[1.0]], [5])


def test_columns_come_in_the_services_order_when_no_other_is_given():
    rows = rows_of(FLOATS, (0, {"a": 1.0, "b": 2.0}))
    assert join_of(FLOATS, matrix(2)).assemble(rows, {})["x"].tolist() == [[1.0, 2.0]]


@pytest.mark.parametrize("order", [["b", "a"], ["b"]])
def test_columns_come_in_feature_order(order):
    rows = rows_of(FLOATS, (0, {"a": 1.0, "b": 2.0}), (0, {"a": 3.0, "b": 4.0}))
    got = join_of(FLOATS, matrix(-1), feature_order=order).assemble(rows, {})["x"]
    assert got.tolist() == [[2.0, 1.0][: len(order)], [4.0, 3.0][: len(order)]]
    assert got.dtype == np.float32


def test_the_stores_matrix_is_used_as_it_is_when_it_is_the_models_input():
    rows = rows_of(FLOATS, (0, {"a": 1.0, "b": 2.0}))
    assert join_of(FLOATS, matrix(2)).assemble(rows, {})["x"] is rows.matrix


@pytest.mark.parametrize("datatype", ["FP16", "FP32", "FP64"])
def test_integers_and_booleans_become_floats(datatype):
    values = {"real": 0.5, "wide": 0.25, "whole": 3, "flag": True}
    join = join_of(MIXED, matrix(4, datatype))
    got = join.assemble(rows_of(MIXED, (0, values)), {})["x"]
    assert got.tolist() == [[0.5, 0.25, 3.0, 1.0]]
    assert got.dtype == join._inputs[0].spec.dtype


def test_a_double_too_large_for_the_models_float_is_infinite():
    plan = plan_of(a=ValueType.DOUBLE)
    got = join_of(plan, matrix(1)).assemble(rows_of(plan, (0, {"a": -1e300})), {})
    assert got["x"].tolist() == [[-np.inf]]


def test_text_goes_into_bytes_inputs_as_utf8():
    plan = plan_of(city=(ValueType.STRING, "?"), blob=(ValueType.BYTES, "!"))
    join = join_of(plan, matrix(2, "BYTES"), missing="default")
    got = join.assemble(rows_of(plan, (0, {"city": "Zürich", "blob": b"\xff"}), None), {})["x"]
    assert got.tolist() == [["Zürich".encode(), b"\xff"], [b"?", b"!"]]


MISSING_ROWS = [
    (0, {"a": 1.0, "b": None}),  # null
    (0, {"a": 1.0}),  # absent
    None,  # no row
    (200, {"a": 1.0, "b": 2.0}),  # too old
]


@pytest.mark.parametrize(
    ("plan", "order", "policy", "expected"),
    [
        (FLOATS, None, "nan", [[1, NAN], [1, NAN], [NAN, NAN], [NAN, NAN]]),
        (FLOATS, ["b", "a"], "nan", [[NAN, 1], [NAN, 1], [NAN, NAN], [NAN, NAN]]),
        (DEFAULTS, None, "default", [[1, -2], [1, -2], [-1, -2], [-1, -2]]),
        (DEFAULTS, ["b", "a"], "default", [[-2, 1], [-2, 1], [-2, -1], [-2, -1]]),
    ],
)
def test_null_absent_and_too_old_are_missing_alike(plan, order, policy, expected):
    join = join_of(plan, matrix(2), feature_order=order, missing=policy)
    rows = rows_of(plan, *MISSING_ROWS)
    np.testing.assert_array_equal(join.assemble(rows, {})["x"], expected)
    assert join.missing(rows).tolist() == [[False, False, True, True], [True] * 4]


def test_what_the_store_read_is_not_changed_by_filling():
    rows = rows_of(DEFAULTS, *MISSING_ROWS)
    before = rows.matrix.copy()
    join_of(DEFAULTS, matrix(2), missing="default").assemble(rows, {})
    np.testing.assert_array_equal(rows.matrix, before)


def test_a_feature_that_the_model_does_not_use_is_not_missed():
    rows = rows_of(FLOATS, (0, {"a": 1.0}))
    join = join_of(FLOATS, matrix(1), feature_order=["a"])
    assert join.missing(rows).tolist() == [[False], [False]]


def test_integer_models_take_defaults():
    plan = plan_of(whole=(ValueType.INT32, "7"), flag=(ValueType.BOOL, "true"))
    join = join_of(plan, matrix(2, "INT64"), missing="default")
    got = join.assemble(rows_of(plan, (0, {"whole": -1, "flag": False}), None), {})["x"]
    assert got.tolist() == [[-1, 0], [7, 1]]
    assert got.dtype == np.int64


@pytest.mark.parametrize("policy", ["nan", "default", "reject"])
def test_only_reject_rejects(policy):
    join = join_of(DEFAULTS, matrix(2), missing=policy)
    assert join.rejects_missing == (policy == "reject")


def test_a_row_to_be_rejected_holds_fillers_and_the_others_are_whole():
    plan = plan_of(whole=ValueType.INT64)
    join = join_of(plan, matrix(1, "INT64"), missing="reject")
    got = join.assemble(rows_of(plan, None, (0, {"whole": 5})), {})["x"]
    assert got.tolist() == [[0], [5]]


def one(name, datatype="FP32", shape=(-1, 1)):
    return TensorSpec(name, datatype, shape)


TEXT = plan_of(city=(ValueType.STRING, "?"))
LIST = plan_of(embedding=ValueType.FLOAT_LIST)
WHOLE = plan_of(a=ValueType.INT64)


@pytest.mark.parametrize(
    ("plan", "inputs", "options", "message"),
    [
        (
            FLOATS,
            [matrix(3)],
            {},
            r"3 columns in input 'x', and service 'service' names 2: 'a', 'b'",
        ),
        (
            FLOATS,
            [matrix(2)],
            {"feature_order": ["a"]},
            "2 columns in input 'x', and feature_order names 1: 'a'",
        ),
        (FLOATS, [matrix(2)], {"feature_order": ["a", "a"]}, "'a' twice in feature_order"),
        (
            FLOATS,
            [matrix(2)],
            {"feature_order": ["c", "d"]},
            "feature_order has 'c', 'd', the service has 'a', 'b'",
        ),
        (
            FLOATS,
            [matrix(2)],
            {"feature_order": ["a", "driver_id"]},
            "'driver_id' as a value, which is a join key",
        ),
        (FLOATS, [one("a"), one("bb")], {}, "no input for 'b' .* its inputs 'bb' are not in"),
        (FLOATS, [one("a"), one("b")], {"feature_order": ["a", "b"]}, "are matched by name"),
        (FLOATS, [one("a"), one("b", shape=(-1, 3))], {}, "'b' of shape .*is .-1,1. or .-1."),
        (FLOATS, [matrix(2)], {"max_batch_size": 0}, "set max_batch_size"),
        (FLOATS, [matrix(2, "INT64")], {"missing": "reject"}, "'a' is FLOAT.*without loss"),
        (FLOATS, [matrix(2, "BYTES")], {"missing": "reject"}, "'a' is FLOAT.*without loss"),
        (WHOLE, [matrix(1, "INT32")], {"missing": "reject"}, "'a' is INT64.*without loss"),
        (TEXT, [matrix(1)], {}, "'city' is STRING.*without loss"),
        (LIST, [matrix(1)], {}, "'embedding' is FLOAT_LIST.*without loss"),
        (LIST, [matrix(1, "BYTES")], {"missing": "reject"}, "'embedding' is FLOAT_LIST"),
        (WHOLE, [matrix(1, "INT64")], {}, "cannot be NaN; set missing_features to default or"),
        (TEXT, [matrix(1, "BYTES")], {}, "cannot be NaN; set missing_features to default or"),
        (FLOATS, [matrix(2)], {"missing": "default"}, "'a', 'b' .* have no tag headrace.default"),
    ],
)
def test_a_model_that_does_not_fit_its_service_is_refused_with_what_to_do(
    plan, inputs, options, message
):
    with pytest.raises(ModelLoadError, match=message) as caught:
        join_of(plan, *inputs, **options)
    assert str(caught.value).startswith("model 'model' ")


def test_a_default_is_needed_only_of_features_that_the_model_uses():
    plan = plan_of(a=(ValueType.FLOAT, "1"), b=ValueType.FLOAT)
    join = join_of(plan, matrix(1), feature_order=["a"], missing="default")
    assert join.assemble(rows_of(plan, None), {})["x"].tolist() == [[1.0]]
