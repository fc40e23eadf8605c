"""What somebody types is read as the model takes it, or refused in a sentence."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.errors import StartupError
from headrace.row_arguments import Input, read_rows

HOME, AREA = Input("home_id", "INT64", (1,)), Input("area", "BYTES", ())
LINE, GRID = Input("x", "FP32", (-1,)), Input("x", "INT32", (2, 2))
WHOLE = Input("x", "FP32", (2, 2), is_batched=False)


def read(inputs, *pairs):
    return read_rows("m", inputs, pairs)


def test_a_single_row_stands_for_as_many_as_the_others_have():
    assert read([HOME, AREA], "area=a", "home_id=1,2") == {"home_id": [1, 2], "area": ["a", "a"]}


def test_columns_come_in_the_models_order():
    assert list(read([HOME, AREA], "area=a", "home_id=1")) == ["home_id", "area"]


@pytest.mark.parametrize(
    ("of", "text", "rows"),
    [
        (HOME, "[1,2]", [1, 2]),
        (AREA, '["a,b","[c"]', ["a,b", "[c"]),
        (AREA, "", [""]),
        (LINE, "[1,2,3]", [[1, 2, 3]]),
        (LINE, "[[1,2],[3,4]]", [[1, 2], [3, 4]]),
        (GRID, "[[1,2],[3,4]]", [[[1, 2], [3, 4]]]),
        (GRID, "[[[1,2],[3,4]]]", [[[1, 2], [3, 4]]]),
        (WHOLE, "[[1,2],[3,4]]", [[[1, 2], [3, 4]]]),
        (Input("x", "BOOL", (1,)), "yes,0,True", [True, False, True]),
        (Input("x", "BOOL", (2,)), "[true,false]", [[True, False]]),
        (Input("x", "UINT64", (1,)), str(2**64 - 1), [2**64 - 1]),
    ],
)
def test_lists_are_rows_or_a_row_by_the_models_shape(of, text, rows):
    assert read([of], f"{of.name}={text}") == {of.name: rows}


@pytest.mark.parametrize(
    ("of", "text", "complaint"),
    [
        (HOME, "[]", "one value a row"),
        (HOME, "[[1]]", "one value a row"),
        (HOME, "1.5", "is no INT64"),
        (HOME, "9" * 20, "is no INT64"),
        (AREA, "[1]", "is no BYTES"),
        (AREA, "\udcff", "is no BYTES"),
        (LINE, "1", "a JSON list of shape"),
        (LINE, "[[[1]]]", "a JSON list of shape"),
        (LINE, "[[1,2],[3]]", "different lengths"),
        (LINE, "[[1],2]", "different lengths"),
        (LINE, "[null]", "'null' is no FP32"),
        (LINE, '[{"a":1}]', "an object in it"),
        (LINE, "[1", "not a JSON list"),
        (LINE, "[" * 100_000, "not a JSON list"),
        (GRID, "[1,2]", "a JSON list of lists of shape"),
        (GRID, "[[[1]],[[1,2]]]", "different lengths"),
        (WHOLE, "[[[1,2],[3,4]]]", "a JSON list of lists of shape"),
        (Input("x", "FP32", (1,)), "1e39", "is no FP32"),
        (Input("x", "FP16", (1,)), "7e4", "is no FP16"),
        (Input("x", "BF16", (1,)), "1", "is no BF16"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_column(of, text, complaint):
    with pytest.raises(StartupError, match=complaint) as refused:
        read([of], f"{of.name}={text}")
    assert f"column '{of.name}'" in str(refused.value)


def test_a_servers_own_names_cannot_move_the_cursor():
    with pytest.raises(StartupError) as refused:
        read([Input("a\x1b[2J", "INT64", (1,))])
    assert "\x1b" not in str(refused.value)


@pytest.mark.parametrize("datatype", ["FP16", "FP32", "FP64"])
@given(st.floats(width=16))
def test_numbers_that_fit_are_kept_to_the_last_digit(datatype, value):
    (read_back,) = read([Input("x", datatype, (1,))], f"x={value!r}")["x"]
    assert np.array_equal(read_back, value, equal_nan=True)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner),
    max_leaves=12,
)


@given(st.sampled_from([HOME, AREA, LINE, GRID, WHOLE]), JSON.map(json.dumps) | st.text())
def test_whatever_is_typed_is_read_or_refused_and_never_breaks(of, text):
    try:
        rows = read([of], f"{of.name}={text}")[of.name]
    except StartupError:
        return
    assert rows
