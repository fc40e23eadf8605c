"""What a tensor on the wire must look like, one rule at a time."""

import math
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from headrace.errors import InvalidTensor
from headrace.tensors import (
    MAX_ELEMENTS,
    NUMPY_DTYPES,
    GivenTensor,
    Signature,
    TensorSpec,
    check_bytes,
    encode,
    iterate_bytes,
    join,
)

FIXED = sorted(NUMPY_DTYPES.keys() - {"BYTES"})


def fp32(name="x", shape=(1, 2), raw=None):
    return GivenTensor(name, "FP32", shape, bytes(4 * math.prod(shape)) if raw is None else raw)


def elements(*values):
    return b"".join(struct.pack("<I", len(value)) + value for value in values)


ONE = Signature("m", [TensorSpec("x", "FP32", (-1, 2))], [TensorSpec("y", "FP32", (-1, 1))], 8)
TWO = Signature(
    "m",
    [TensorSpec("x", "FP32", (-1, 2)), TensorSpec("z", "INT64", (-1, 1), is_column=True)],
    [TensorSpec("y", "FP32", (-1, 1)), TensorSpec("label", "BYTES", (-1, 1))],
    8,
)
WIDE = Signature("m", [TensorSpec("x", "FP32", (-1, -1))], [], 8)
WHOLE = Signature("m", [TensorSpec("x", "FP32", (-1, -1))], [], 0)
TEXT = Signature("m", [TensorSpec("x", "BYTES", (-1, 1), is_column=True)], [], 8)
KEY = Signature("m", [TensorSpec("k", "INT64", (-1, 1), is_column=True, widens_int32=True)], [], 8)


@pytest.mark.parametrize(
    ("signature", "tensors", "message"),
    [
        pytest.param(
            ONE,
            [],
            "expected 1 inputs but got 0 inputs for model 'm'. Got input(s) [], but missing "
            "required input(s) ['x']. Please provide all required input(s).",
            id="nothing",
        ),
        pytest.param(
            TWO,
            [fp32()],
            "expected 2 inputs but got 1 inputs for model 'm'. Got input(s) ['x'], but missing "
            "required input(s) ['z']. Please provide all required input(s).",
            id="one is missing",
        ),
        pytest.param(
            ONE,
            [fp32(), fp32("w")],
            "unexpected inference input 'w' for model 'm'",
            id="one too many",
        ),
        pytest.param(
            ONE,
            [fp32("w")],
            "unexpected inference input 'w' for model 'm'",
            id="another name",
        ),
        pytest.param(
            ONE, [fp32(), fp32()], "input 'x' already exists in request", id="given twice"
        ),
        pytest.param(
            ONE,
            [GivenTensor("x", "INT64", (1, 2), bytes(16))],
            "inference input 'x' data-type is 'INT64', but model 'm' expects 'FP32'",
            id="datatype",
        ),
        pytest.param(
            ONE,
            [GivenTensor("x", "BF16", (1, 2), bytes(4))],
            "inference input 'x' data-type is 'BF16', but model 'm' expects 'FP32'",
            id="datatype without numpy dtype",
        ),
        pytest.param(
            TWO,
            [fp32(), GivenTensor("z", "INT32", (1, 1), bytes(4))],
            "inference input 'z' data-type is 'INT32', but model 'm' expects 'INT64'",
            id="only join keys are widened",
        ),
        pytest.param(
            ONE,
            [fp32(shape=(2,))],
            "unexpected shape for input 'x' for model 'm'. Expected [-1,2], got [2]",
            id="rank",
        ),
        pytest.param(
            ONE,
            [fp32(shape=())],
            "unexpected shape for input 'x' for model 'm'. Expected [-1,2], got []",
            id="scalar",
        ),
        pytest.param(
            ONE,
            [fp32(shape=(1, 3))],
            "unexpected shape for input 'x' for model 'm'. Expected [-1,2], got [1,3]",
            id="dimension",
        ),
        pytest.param(
            KEY,
            [GivenTensor("k", "INT64", (2, 2), bytes(32))],
            "unexpected shape for input 'k' for model 'm'. Expected [-1,1], got [2,2]",
            id="two columns for one",
        ),
        pytest.param(
            ONE,
            [fp32(shape=(9, 2))],
            "inference request batch-size must be <= 8 for 'm'; input 'x' has 9 rows",
            id="batch",
        ),
        pytest.param(
            ONE,
            [fp32(shape=(0, 2))],
            "input 'x' for model 'm' has no rows; send at least one",
            id="no rows",
        ),
        pytest.param(
            TWO,
            [fp32(shape=(2, 2)), GivenTensor("z", "INT64", (3,), bytes(24))],
            "input 'z' batch size does not match other inputs for 'm'",
            id="rows differ",
        ),
        pytest.param(
            ONE,
            [fp32(raw=bytes(7))],
            "input byte size mismatch for input 'x' for model 'm'. Expected 8, got 7",
            id="raw is shorter",
        ),
        pytest.param(
            ONE,
            [fp32(raw=bytes(12))],
            "input byte size mismatch for input 'x' for model 'm'. Expected 8, got 12",
            id="raw is longer",
        ),
        pytest.param(
            WIDE,
            [fp32(shape=(1, -2), raw=b"")],
            "shape [1,-2] of input 'x' for model 'm' has a negative dimension or too many elements",
            id="negative dimension",
        ),
        pytest.param(
            WHOLE,
            [fp32(shape=(-2, -2), raw=bytes(16))],
            "shape [-2,-2] of input 'x' for model 'm' has a negative dimension or too many "
            "elements",
            id="negative dimensions with a positive product",
        ),
        pytest.param(
            WHOLE,
            [fp32(shape=(2**62, 4), raw=b"")],  # 2**66 bytes: 0 in 64-bit arithmetic
            f"shape [{2**62},4] of input 'x' for model 'm' has a negative dimension or too many "
            "elements",
            id="product overflows to the size of raw",
        ),
        pytest.param(
            WHOLE,
            [fp32(shape=(0, 2**62), raw=b"")],
            f"shape [0,{2**62}] of input 'x' for model 'm' has a negative dimension or too many "
            "elements",
            id="a dimension of 0 beside a huge one",
        ),
        *(
            pytest.param(
                TEXT,
                [GivenTensor("x", "BYTES", (count, 1), raw)],
                "input 'x' for model 'm' has BYTES elements whose length prefixes do not add up to "
                f"its {len(raw)} bytes and {count} elements",
                id=f"BYTES {what}",
            )
            for what, count, raw in (
                ("without elements", 1, b""),
                ("with one element for two", 2, elements(b"ab")),
                ("with two elements for one", 1, elements(b"a", b"b")),
                ("cut in a prefix", 2, elements(b"ab") + b"\0\0"),
                ("cut in an element", 1, elements(b"ab")[:-1]),
                ("whose prefix lies", 1, b"\xff\xff\xff\xffab"),
                ("whose prefixes overlap", 2, b"\x04\0\0\0\x01\0\0\0"),
            )
        ),
    ],
)
def test_a_bad_input_is_refused_with_the_facts(signature, tensors, message):
    with pytest.raises(InvalidTensor) as refused:
        signature.check(tensors)
    assert str(refused.value) == message


def test_inputs_come_back_in_signature_order_whatever_their_order_in_the_request():
    x, z = fp32(shape=(2, 2), raw=bytes(range(16))), GivenTensor("z", "INT64", (2, 1), bytes(16))
    checked = TWO.check([z, x])
    assert (checked.rows, checked.raws) == (2, (x.raw, z.raw))
    assert checked.trailing == ((2,), (1,))


def test_a_column_may_be_sent_flat():
    flat = KEY.check([GivenTensor("k", "INT64", (3,), bytes(24))])
    assert flat == KEY.check([GivenTensor("k", "INT64", (3, 1), bytes(24))])
    assert (flat.rows, flat.trailing) == (3, ((1,),))


def test_a_model_without_a_batch_dimension_takes_its_shape_whole():
    checked = WHOLE.check([fp32(shape=(3, 0), raw=b"")])
    assert (checked.rows, checked.trailing) == (1, ((3, 0),))


def test_a_model_without_inputs_takes_an_empty_request():
    assert Signature("m", [], [], 0).check([]).rows == 1


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_and_infinities_pass_untouched(value):
    raw = struct.pack("<2f", value, 1.0)
    (got,) = ONE.check([fp32(raw=raw)]).raws
    assert got == raw


@pytest.mark.parametrize(
    ("names", "positions"), [((), (0, 1)), (("label",), (1,)), (("label", "y"), (1, 0))]
)
def test_outputs_are_found_in_the_order_asked_for(names, positions):
    assert TWO.check_outputs(names) == positions


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("y", "w"), "unexpected inference output 'w' for model 'm'"),
        (("y", "y"), "an output is requested twice for model 'm'"),
    ],
)
def test_a_bad_output_request_is_refused(names, message):
    with pytest.raises(InvalidTensor) as refused:
        TWO.check_outputs(names)
    assert str(refused.value) == message


def test_a_spec_of_an_unknown_datatype_is_refused():
    with pytest.raises(ValueError, match="datatype 'BF16' is not supported"):
        TensorSpec("x", "BF16", (1,))


def test_any_bool_byte_but_zero_is_true():
    got = join(TensorSpec("x", "BOOL", (-1,)), [b"\x00\x01", b"\x02\xff"], (4,))
    assert got.tobytes() == b"\x00\x01\x01\x01"


def test_joined_numbers_cannot_be_written_to():
    assert not join(TensorSpec("x", "FP32", (-1,)), [bytes(8)], (2,)).flags.writeable


def test_an_object_array_of_numbers_is_no_bytes_tensor():
    with pytest.raises(TypeError):
        encode(np.array([5], object))


def test_text_is_sent_as_utf_8():
    assert encode(np.array(["é", b"\xff"], object)) == elements("é".encode(), b"\xff")


@given(st.lists(st.binary(max_size=20), max_size=20))
def test_bytes_elements_survive_the_wire(values):
    array = np.empty(len(values), object)
    array[:] = values
    raw = encode(array)
    check_bytes(raw, len(values), "x", "m")
    assert list(iterate_bytes(raw)) == values
    assert join(TensorSpec("x", "BYTES", (-1,)), [raw], (len(values),)).tolist() == values


# Small prefixes, so that many of these happen to be well-formed.
RAW = st.lists(
    st.one_of(
        st.integers(0, 6).map(lambda length: struct.pack("<I", length)), st.binary(max_size=5)
    ),
    max_size=8,
).map(b"".join)


@given(RAW, st.integers(0, 8))
def test_bytes_are_accepted_only_as_they_will_be_read(raw, count):
    try:
        check_bytes(raw, count, "x", "m")
    except InvalidTensor:
        return
    values = list(iterate_bytes(raw))
    assert len(values) == count
    assert elements(*values) == raw


@st.composite
def requests(draw, datatype):
    """Arrays of one datatype and trailing shape, as several requests bring them."""
    trailing = draw(hnp.array_shapes(min_dims=0, max_dims=2, min_side=0, max_side=3))
    rows = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    if datatype == "BYTES":
        values = {"dtype": np.dtype(object), "elements": st.binary(max_size=6)}
    elif datatype == "FP16":  # by its bits: Hypothesis draws few halves and throws away most
        values = {"dtype": np.dtype("<u2")}
    else:
        values = {"dtype": NUMPY_DTYPES[datatype]}
    arrays = [draw(hnp.arrays(shape=(count, *trailing), **values)) for count in rows]
    return [array.view("<f2") for array in arrays] if datatype == "FP16" else arrays


@pytest.mark.parametrize("datatype", sorted(NUMPY_DTYPES))
@given(data=st.data())
def test_joined_requests_are_the_concatenation_of_their_arrays(datatype, data):
    arrays = data.draw(requests(datatype))
    trailing = arrays[0].shape[1:]
    spec = TensorSpec("x", datatype, (-1, *trailing))
    signature = Signature("m", [spec], [], 8)
    raws = []
    for array in arrays:
        checked = signature.check([GivenTensor("x", datatype, array.shape, encode(array))])
        assert (checked.rows, checked.trailing) == (len(array), (trailing,))
        raws += checked.raws
    whole = np.concatenate(arrays)
    got = join(spec, raws, whole.shape)
    assert (got.dtype, got.shape) == (whole.dtype, whole.shape)
    assert encode(got) == encode(whole)  # bit for bit, NaN payloads included


@given(hnp.arrays(np.dtype("<i4"), st.integers(1, 8)))
def test_widening_a_join_key_keeps_its_values(values):
    (raw,) = KEY.check([GivenTensor("k", "INT32", values.shape, values.tobytes())]).raws
    assert np.frombuffer(raw, "<i8").tolist() == values.tolist()


@given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=2, max_size=2))
def test_an_accepted_shape_can_always_be_made(shape):
    if 0 not in shape:
        shape[0] = 0  # no bytes are needed, so only the shape itself can be wrong
    try:
        (raw,) = WHOLE.check([fp32(shape=tuple(shape), raw=b"")]).raws
    except InvalidTensor:
        assert min(shape) < 0 or max(shape) > MAX_ELEMENTS
        return
    assert join(WHOLE.inputs[0], [raw], shape).shape == tuple(shape)


@pytest.mark.parametrize("datatype", FIXED)
def test_a_datatype_has_the_size_that_its_name_says(datatype):
    bits = {"BOOL": 8}.get(datatype) or int(datatype.lstrip("UINTFP"))
    assert TensorSpec("x", datatype, (1,)).itemsize * 8 == bits
