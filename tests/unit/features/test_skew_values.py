"""Two values of a feature: the same or not, and how far apart."""

from datetime import UTC, date, datetime
from decimal import Decimal
from uuid import UUID

import numpy as np
import pandas as pd
import pytest
from feast.type_map import python_values_to_proto_values
from feast.value_type import ValueType as FeastType
from hypothesis import given
from hypothesis import strategies as st

from headrace.features.skew_values import Tolerance, differences, shown
from headrace.features.values import ValueType as V

NAN = float("nan")
MOMENT = datetime(2026, 1, 31, 12, tzinfo=UTC)


def objects(*values):
    array = np.empty(len(values), np.object_)
    array[:] = values
    return array


def compared(value_type, online, offline, tolerance=None):
    if value_type.dtype.kind == "O":
        online = objects(online)
    else:
        online = np.array([online], value_type.dtype)
    offline = offline if isinstance(offline, np.ndarray) else objects(offline)
    differs, distance = differences(value_type, online, offline, tolerance or Tolerance())
    return bool(differs[0]), float(distance[0])


@pytest.mark.parametrize(
    ("value_type", "online", "offline"),
    [
        pytest.param(V.FLOAT, 0.1, np.array([0.1]), id="a double stored as a float"),
        pytest.param(V.FLOAT, 0.1, 0.1, id="a double among objects"),
        pytest.param(V.FLOAT, np.inf, np.array([1e300]), id="a double too large for a float"),
        pytest.param(V.DOUBLE, -np.inf, np.array([-np.inf]), id="infinite alike"),
        pytest.param(V.INT64, 7, np.array([7.0]), id="an integer among missing ones"),
        pytest.param(V.INT32, 7, np.array([7], np.int64), id="a narrower integer"),
        pytest.param(V.INT64, 2**62 + 1, 2**62 + 1, id="a large integer among objects"),
        pytest.param(V.BOOL, True, True, id="a boolean among missing ones"),
        pytest.param(V.STRING, "é", "é", id="text"),
        pytest.param(V.STRING, "é", "é".encode(), id="text as bytes"),
        pytest.param(V.BYTES, b"\xff", b"\xff", id="bytes"),
        pytest.param(V.JSON, '{"a": 1, "b": [2]}', '{"b":[2],"a":1}', id="JSON in another order"),
        pytest.param(V.JSON, '{"a": 1}', {"a": 1}, id="JSON read already"),
        pytest.param(V.UUID, str(UUID(int=10)), UUID(int=10), id="a UUID"),
        pytest.param(V.DECIMAL, "1.50", Decimal("1.5"), id="a decimal"),
        pytest.param(V.UNIX_TIMESTAMP, int(MOMENT.timestamp()), MOMENT, id="a datetime"),
        pytest.param(
            V.UNIX_TIMESTAMP,
            int(MOMENT.timestamp()),
            pd.Series([MOMENT]).dt.tz_localize(None).to_numpy(),
            id="a column of datetimes",
        ),
        pytest.param(V.FLOAT_LIST, [0.5, 0.1], np.array([0.5, 0.1]), id="an array"),
        pytest.param(V.INT64_LIST, [1, 2], [1, 2], id="a list of integers"),
        pytest.param(V.STRING_LIST, ["a", ""], objects("a", ""), id="texts"),
        pytest.param(V.DOUBLE_LIST, [], [], id="an empty list"),
    ],
)
def test_what_materialization_would_have_made_of_it_is_the_same(value_type, online, offline):
    if value_type.name.endswith("_LIST"):
        offline = objects(offline)

    differs, distance = compared(value_type, online, offline)

    assert not differs
    assert np.isnan(distance) or distance < 1e-6


@pytest.mark.parametrize(
    ("value_type", "online", "offline", "distance"),
    [
        pytest.param(V.FLOAT, 1.0, 1.00001, 1e-5, id="floats"),
        pytest.param(V.DOUBLE, np.inf, 1.0, NAN, id="infinite on one side"),
        pytest.param(V.INT64, 2, 2.5, 0.5, id="an integer that offline is none"),
        pytest.param(V.INT64, 2**62 + 1, 2**62, 0.0, id="large integers, a bit apart"),
        pytest.param(V.BOOL, True, False, 1.0, id="booleans"),
        pytest.param(V.INT64, 1, "one", NAN, id="text for a number"),
        pytest.param(V.FLOAT, 1.0, "one", NAN, id="text for a float"),
        pytest.param(V.STRING, "a", "A", NAN, id="texts"),
        pytest.param(V.JSON, "{", '{"a": 1}', NAN, id="JSON that is none"),
        pytest.param(V.DECIMAL, "1.5", "x", NAN, id="a decimal that is none"),
        pytest.param(V.FLOAT_LIST, [1.0, 4.0], [2.0, 2.0], 2.0, id="lists, the farthest apart"),
        pytest.param(V.FLOAT_LIST, [1.0], [1.0, 2.0], NAN, id="lists of different lengths"),
        pytest.param(V.STRING_LIST, ["a"], "a", NAN, id="a list that offline is none"),
    ],
)
def test_everything_else_differs(value_type, online, offline, distance):
    differs, found = compared(value_type, online, objects(offline))

    assert differs
    assert found == pytest.approx(distance, rel=1e-2, nan_ok=True)


def stored(value_type, value):
    """What the online store holds of a Python value: what Feast's materialization writes."""
    return python_values_to_proto_values([value], FeastType(int(value_type)))[0].SerializeToString()


UUIDS = [UUID(int=1), UUID(int=2)]


@pytest.mark.parametrize(
    ("value_type", "online", "offline", "other"),
    [
        pytest.param(V.INT64_SET, {1, 2, 300}, np.array([300, 2, 1]), [1, 2], id="integers"),
        pytest.param(V.FLOAT_SET, {0.1, 2.0}, [2.0, 0.1], [2.0, 0.2], id="floats"),
        pytest.param(V.STRING_SET, {"a", "b"}, ["b", "a"], ["a"], id="texts"),
        pytest.param(V.MAP, {"a": 1, "b": 2}, [("b", 2), ("a", 1)], {"a": 1}, id="a map"),
        pytest.param(V.STRUCT, {"a": 1, "b": "x"}, {"b": "x", "a": 1}, {"a": 1}, id="a struct"),
        pytest.param(V.MAP_LIST, [{"a": 1}], [{"a": 1}], [{"a": 2}], id="maps"),
        pytest.param(V.UUID_LIST, UUIDS, [str(one) for one in UUIDS], UUIDS[:1], id="UUIDs"),
        pytest.param(V.DECIMAL_LIST, [Decimal(1)], [Decimal(1)], [Decimal(2)], id="decimals"),
        pytest.param(V.JSON_LIST, ['{"a": 1}'], ['{"a": 1}'], ["{}"], id="documents"),
        pytest.param(V.INT64_SET, {1}, [1], "nonsense", id="what nothing can be made of"),
    ],
)
def test_what_is_handed_on_as_it_is_stored_is_compared_too(value_type, online, offline, other):
    raw = stored(value_type, online)

    assert compared(value_type, raw, objects(offline))[0] is False
    assert compared(value_type, raw, objects(other))[0] is True


@pytest.mark.parametrize(
    ("value_type", "online", "offline"),
    [
        pytest.param(V.INT64, [1, 2, 2**62 + 1, 4], ["one", 2, Decimal(2**62 + 1), 5], id="text"),
        pytest.param(V.INT64, [1, 2, 3, 4], [2**70, 2, np.int64(3), 5.0], id="too large"),
        pytest.param(V.FLOAT, [1, 0.5, 0.1, 4], ["one", 0.5, Decimal("0.1"), 5], id="floats"),
        pytest.param(V.BOOL, [True, False, True, True], ["no", False, True, False], id="booleans"),
        pytest.param(V.UNIX_TIMESTAMP, [1, 86_400, 3, 4], ["x", date(1970, 1, 2), 3, 5], id="days"),
    ],
)
def test_a_value_that_cannot_be_compared_differs_alone(value_type, online, offline):
    online = np.array(online, value_type.dtype)

    differs, _ = differences(value_type, online, objects(*offline), Tolerance())

    assert differs.tolist() == [True, False, False, True]


@pytest.mark.parametrize(
    ("value_type", "value", "expected"),
    [
        (V.UNIX_TIMESTAMP, pd.Timestamp(MOMENT).to_numpy(), int(MOMENT.timestamp())),
        (V.UNIX_TIMESTAMP, MOMENT, int(MOMENT.timestamp())),
        (V.UNIX_TIMESTAMP_LIST, [MOMENT], [int(MOMENT.timestamp())]),
        (V.INT64_SET, stored(V.INT64_SET, {3, 1, 2}), [1, 2, 3]),
        (V.INT64_SET, np.array([3, 1, 2]), [1, 2, 3]),
        (V.INT64_SET, "nonsense", "nonsense"),
        (V.FLOAT, 0.5, 0.5),
    ],
)
def test_both_sides_of_a_mismatch_are_shown_alike(value_type, value, expected):
    assert shown(value_type, value) == expected


FINITE = st.floats(-1e30, 1e30)


@given(FINITE, FINITE, st.floats(0, 1), st.floats(0, 1e20))
def test_the_tolerance_is_what_it_says(online, offline, relative, absolute):
    differs, distance = compared(
        V.DOUBLE, online, np.array([offline]), Tolerance(relative, absolute)
    )

    assert differs == (abs(online - offline) > absolute + relative * abs(offline))
    assert distance == abs(online - offline)


@given(st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_a_float_that_went_through_the_online_store_is_the_same(value):
    assert compared(V.FLOAT, np.float32(value), np.array([value]), Tolerance(0, 0)) == (False, 0.0)
