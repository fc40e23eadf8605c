"""One stored value at a time: what is read, and what is refused."""

import contextlib
import math
import struct

import pytest
from feast.protos.feast.types.Value_pb2 import Value
from feast.type_map import python_values_to_proto_values
from feast.value_type import ValueType as FeastType
from hypothesis import given
from hypothesis import strategies as st

from headrace.features.values import (
    ValueMismatchError,
    ValueType,
    declared_type,
    decode_time,
    decode_value,
    encode_message,
    message_value,
    parse_default,
)


@pytest.mark.parametrize(
    ("raw", "value_type", "expected"),
    [
        ("350000003f", ValueType.FLOAT, 0.5),
        ("2000", ValueType.INT64, 0),
        ("20ac02", ValueType.INT64, 300),
        ("20ffffffffffffffffff01", ValueType.INT64, -1),
        ("18ffffffffffffffffff01", ValueType.INT32, -1),
        ("29000000000000f83f", ValueType.DOUBLE, 1.5),
        ("3800", ValueType.BOOL, False),
        ("3801", ValueType.BOOL, True),
        ("1200", ValueType.STRING, ""),
        ("1202c3a9", ValueType.STRING, "é"),
        ("0a03000d0a", ValueType.BYTES, b"\0\r\n"),
        ("4080e2cfaa06", ValueType.UNIX_TIMESTAMP, 1_700_000_000),
        ("82010a0a080000803f00000040", ValueType.FLOAT_LIST, [1.0, 2.0]),
        ("", ValueType.FLOAT, None),
        ("980100", ValueType.INT64, None),
    ],
)
def test_feasts_encodings_decode(raw, value_type, expected):
    value = decode_value(bytes.fromhex(raw), value_type)
    assert value == expected
    assert type(value) is type(expected)


def test_what_was_written_before_a_feature_was_widened_is_read():
    assert decode_value(bytes.fromhex("1807"), ValueType.INT64) == 7
    assert decode_value(bytes.fromhex("350000003f"), ValueType.DOUBLE) == 0.5


@pytest.mark.parametrize(
    ("raw", "value_type"),
    [
        ("2007", ValueType.INT32),
        ("29000000000000f83f", ValueType.FLOAT),
        ("2007", ValueType.FLOAT),
        ("120161", ValueType.BYTES),
        ("3800", ValueType.INT64),
        ("82010a0a080000803f00000040", ValueType.FLOAT),
        ("350000003f", ValueType.FLOAT_LIST),
    ],
)
def test_a_value_of_another_type_is_a_mismatch(raw, value_type):
    with pytest.raises(ValueMismatchError):
        decode_value(bytes.fromhex(raw), value_type)


@pytest.mark.parametrize(
    ("raw", "value_type"),
    [
        ("350000", ValueType.FLOAT),
        ("350000003f00", ValueType.FLOAT),
        ("20", ValueType.INT64),
        ("20ff", ValueType.INT64),
        ("2000ff", ValueType.INT64),
        ("20ffffffffffffffffff02", ValueType.INT64),
        ("188080808010", ValueType.INT32),
        ("3802", ValueType.BOOL),
        ("1205c3a9", ValueType.STRING),
        ("1201ff", ValueType.STRING),
        ("8201ff", ValueType.FLOAT_LIST),
    ],
)
def test_damaged_bytes_are_a_mismatch(raw, value_type):
    with pytest.raises(ValueMismatchError):
        decode_value(bytes.fromhex(raw), value_type)


@given(st.binary(max_size=24), st.sampled_from(ValueType))
def test_no_bytes_whatever_raise_anything_else(raw, value_type):
    with contextlib.suppress(ValueMismatchError):
        decode_value(raw, value_type)


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ("08a5bbb5f0051080eba5c302", 1577934245.678),
        ("08a5bbb5f005", 1577934245.0),
        ("10808ece1c", 0.06),
        ("", 0.0),
        ("08ffffffffffffffffff01", -1.0),
    ],
)
def test_event_times_decode_whichever_of_their_parts_is_left_out(raw, expected):
    assert decode_time(bytes.fromhex(raw)) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("raw", ["08", "0800080a", "1000ff", "1801", "08ff"])
def test_a_damaged_event_time_is_a_mismatch(raw):
    with pytest.raises(ValueMismatchError):
        decode_time(bytes.fromhex(raw))


@given(st.floats(width=32, allow_nan=False))
def test_every_float_survives(number):
    assert decode_value(b"\x35" + struct.pack("<f", number), ValueType.FLOAT) == number


@pytest.mark.parametrize(
    ("text", "value_type", "expected"),
    [
        ("1.5", ValueType.FLOAT, 1.5),
        ("-3", ValueType.INT32, -3),
        ("True", ValueType.BOOL, True),
        ("false", ValueType.BOOL, False),
        ("unknown", ValueType.STRING, "unknown"),
        ("raw", ValueType.BYTES, b"raw"),
        ("inf", ValueType.DOUBLE, math.inf),
    ],
)
def test_defaults_are_read_as_their_features_type(text, value_type, expected):
    assert parse_default(text, value_type) == expected


@pytest.mark.parametrize(
    ("text", "value_type"),
    [
        ("half", ValueType.FLOAT),
        ("1.5", ValueType.INT64),
        ("2147483648", ValueType.INT32),
        ("1", ValueType.BOOL),
        ("[]", ValueType.FLOAT_LIST),
    ],
)
def test_a_default_that_its_type_cannot_hold_is_refused(text, value_type):
    with pytest.raises(ValueError):
        parse_default(text, value_type)


STORED_AS = {FeastType.PDF_BYTES: FeastType.BYTES, FeastType.IMAGE_BYTES: FeastType.BYTES}
"""What Feast stores as another type."""


def every_kind_of_value():
    """A stored value of each type that a field can be declared to have, as Feast writes it."""
    for declared in FeastType:
        if declared in (FeastType.UNKNOWN, FeastType.NULL):
            continue
        number = STORED_AS.get(declared, declared).value
        field = Value.DESCRIPTOR.fields_by_number[number]
        message = Value()
        if field.message_type is None:
            setattr(
                message,
                field.name,
                {"bytes_val": b"x", "bool_val": True}.get(
                    field.name, "x" if field.type == field.TYPE_STRING else 1
                ),
            )
        else:
            getattr(message, field.name).SetInParent()
        yield pytest.param(declared_type(declared.value), message, id=declared.name)


def test_pictures_and_documents_are_stored_as_feast_stores_them():
    assert {
        declared.name: python_values_to_proto_values([b"x"], declared)[0].WhichOneof("val")
        for declared in STORED_AS
    } == {"PDF_BYTES": "bytes_val", "IMAGE_BYTES": "bytes_val"}
    assert {declared_type(declared.value) for declared in STORED_AS} == {ValueType.BYTES}


@pytest.mark.parametrize("number", [0, 19, 99])
def test_a_type_without_values_is_none(number):
    with pytest.raises(ValueError, match="is not a valid ValueType"):
        declared_type(number)


@pytest.mark.parametrize(("value_type", "message"), list(every_kind_of_value()))
def test_every_type_of_feast_is_read(value_type, message):
    raw = message.SerializeToString()

    decoded = decode_value(raw, value_type)

    assert message_value(message, value_type) == decoded
    assert encode_message(decoded, value_type) == raw


OPAQUE = [one for one in every_kind_of_value() if one.values[0].is_opaque]


@pytest.mark.parametrize(("value_type", "message"), OPAQUE)
def test_an_opaque_value_is_of_its_type_and_whole(value_type, message):
    raw = message.SerializeToString()
    kinds = [one.values for one in OPAQUE]
    other = next(m for t, m in kinds if t is not value_type).SerializeToString()

    for damaged in (other, raw + b"\0", b"\x18\x01"):
        with pytest.raises(ValueMismatchError):
            decode_value(damaged, value_type)
    assert decode_value(b"", value_type) is None
