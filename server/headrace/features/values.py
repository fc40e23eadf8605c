"""Feast's value types, and one stored value at a time.

A stored value is a serialized `feast.types.Value`: a oneof, so exactly one tagged field, or none at
all for null. The scalar ones are decoded here from their bytes; lists go through Feast's protobuf
class, which is imported when the first one is met (importing Feast takes seconds, and whoever
compiled a plan from a registry has paid that already).

Source: feast 0.67 `protos/feast/types/Value.proto`; Protocol Buffers encoding (varints of at most
10 bytes, little-endian fixed widths).
"""

import struct
from enum import IntEnum
from typing import Any

import numpy as np

from headrace.features.feast_import import import_feast

MAX_VARINT_BYTES = 10


class ValueType(IntEnum):
    """The value types that can be read, numbered as in Feast's `ValueType.Enum`."""

    BYTES = 1
    STRING = 2
    INT32 = 3
    INT64 = 4
    DOUBLE = 5
    FLOAT = 6
    BOOL = 7
    UNIX_TIMESTAMP = 8
    BYTES_LIST = 11
    STRING_LIST = 12
    INT32_LIST = 13
    INT64_LIST = 14
    DOUBLE_LIST = 15
    FLOAT_LIST = 16
    BOOL_LIST = 17
    UNIX_TIMESTAMP_LIST = 18
    MAP = 20
    MAP_LIST = 21
    BYTES_SET = 22
    STRING_SET = 23
    INT32_SET = 24
    INT64_SET = 25
    DOUBLE_SET = 26
    FLOAT_SET = 27
    BOOL_SET = 28
    UNIX_TIMESTAMP_SET = 29
    JSON = 32
    JSON_LIST = 33
    STRUCT = 34
    STRUCT_LIST = 35
    UUID = 36
    TIME_UUID = 37
    UUID_LIST = 38
    TIME_UUID_LIST = 39
    UUID_SET = 40
    TIME_UUID_SET = 41
    VALUE_LIST = 42
    VALUE_SET = 43
    DECIMAL = 44
    DECIMAL_LIST = 45
    DECIMAL_SET = 46
    SCALAR_MAP = 47
    ZONED_TIMESTAMP = 48

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype of a column of these; `object` for text (`str`), `bytes`, lists and opaque."""
        return _DTYPES.get(self, _OBJECT)

    @property
    def is_opaque(self) -> bool:
        """Whether values are handed on as they are stored: serialized `Value`s, as `bytes`."""
        return self not in _TEXT and self not in _DTYPES and not _FIRST_LIST <= self <= _LAST_LIST

    @property
    def is_text(self) -> bool:
        """Whether values are `str` or `bytes`."""
        return self in _TEXT


KEY_DATATYPES = {
    ValueType.BYTES: "BYTES",
    ValueType.STRING: "BYTES",
    ValueType.INT32: "INT32",
    ValueType.INT64: "INT64",
    ValueType.UNIX_TIMESTAMP: "INT64",
}
"""The value types that Feast lets a join key have, and the tensor datatype each takes."""

COLUMN_DATATYPES = KEY_DATATYPES | {
    ValueType.DOUBLE: "FP64",
    ValueType.FLOAT: "FP32",
    ValueType.BOOL: "BOOL",
}
"""The same of the data that a request may carry for on-demand feature views."""

TAGS = {
    ValueType.BYTES: 0x0A,
    ValueType.STRING: 0x12,
    ValueType.INT32: 0x18,
    ValueType.INT64: 0x20,
    ValueType.DOUBLE: 0x29,
    ValueType.FLOAT: 0x35,
    ValueType.BOOL: 0x38,
    ValueType.UNIX_TIMESTAMP: 0x40,
}
"""First byte of a serialized scalar value: the field number and wire type."""

_SECONDS_TAG, _NANOS_TAG = 0x08, 0x10  # of google.protobuf.Timestamp
_LENGTH_DELIMITED = 2
_NULL = b"\x98\x01\x00"  # null_val, the one value of its enum
_TYPES = {tag: value_type for value_type, tag in TAGS.items()}
_OBJECT: np.dtype[Any] = np.dtype(np.object_)
_DTYPES: dict[ValueType, np.dtype[Any]] = {
    ValueType.INT32: np.dtype(np.int32),
    ValueType.INT64: np.dtype(np.int64),
    ValueType.DOUBLE: np.dtype(np.float64),
    ValueType.FLOAT: np.dtype(np.float32),
    ValueType.BOOL: np.dtype(np.bool_),
    ValueType.UNIX_TIMESTAMP: np.dtype(np.int64),
}
_TEXT = frozenset(
    {
        ValueType.BYTES,
        ValueType.STRING,
        ValueType.JSON,
        ValueType.UUID,
        ValueType.TIME_UUID,
        ValueType.DECIMAL,
    }
)
_FIRST_LIST, _LAST_LIST = ValueType.BYTES_LIST, ValueType.UNIX_TIMESTAMP_LIST
_WIDENINGS = frozenset(
    {
        (ValueType.INT32, ValueType.INT64),
        (ValueType.FLOAT, ValueType.DOUBLE),
    }
)


_STORED_AS_BYTES = frozenset({30, 31})  # PDF_BYTES and IMAGE_BYTES: feast 0.67 `type_map.py`


def declared_type(number: int) -> ValueType:
    """
    Return the type as which values of a declared type are stored.

    Args:
        number: Of Feast's `ValueType.Enum`.

    Raises:
        ValueError: no values of that type are stored.
    """
    return ValueType.BYTES if number in _STORED_AS_BYTES else ValueType(number)


class ValueMismatchError(ValueError):
    """A stored value is damaged, or not of the type that the registry declares."""


def decode_value(raw: bytes, value_type: ValueType) -> Any:
    """
    Decode one serialized `Value`.

    Returns:
        A value that fits a column of `value_type.dtype`, or None for null. What was written before
        a feature was widened (INT32 to INT64, FLOAT to DOUBLE) is read as the wider type.

    Raises:
        ValueMismatchError: `raw` is anything else.
    """
    if not raw or raw == _NULL:
        return None
    if value_type.is_opaque:
        return _opaque(raw, value_type)
    stored = _TYPES.get(raw[0])
    if stored is None:
        return message_value(_parse_message(raw), value_type)
    if stored is not value_type and (stored, value_type) not in _WIDENINGS:
        raise ValueMismatchError(f"a {stored.name} where {value_type.name} is declared")
    return _decode_scalar(raw[1:], stored)


def message_value(message: Any, value_type: ValueType) -> Any:
    """
    Take the value out of a parsed `feast.types.Value`; contract as `decode_value`.

    Lists become Python lists.
    """
    name = message.WhichOneof("val")
    if name is None or name == "null_val":
        return None
    if value_type.is_opaque:
        return _opaque(message.SerializeToString(), value_type)
    stored = ValueType.__members__.get(name.removesuffix("_val").upper())
    if stored is None or (stored is not value_type and (stored, value_type) not in _WIDENINGS):
        raise ValueMismatchError(f"{name} where {value_type.name} is declared")
    value = getattr(message, name)
    return list(value.val) if stored.name.endswith("_LIST") else value


def encode_message(value: Any, value_type: ValueType) -> bytes:
    """Encode a value of a column, not null, as a serialized `Value`; slow, for rare ones."""
    if value_type.is_opaque:
        return bytes(value)
    import_feast()
    from feast.protos.feast.types.Value_pb2 import Value  # noqa: PLC0415 - seconds to import

    message = Value()
    name = f"{value_type.name.lower()}_val"
    if isinstance(value, list):
        field = getattr(message, name)
        field.SetInParent()
        field.val.extend(value)
    else:
        setattr(message, name, value)
    return bytes(message.SerializeToString())


def parse_default(text: str, value_type: ValueType) -> Any:
    """
    Read a default written as text, as a Feast tag holds it.

    Raises:
        ValueError: `text` is no value of that type, or is out of its range.
    """
    if value_type is ValueType.BYTES:
        return text.encode()
    if value_type.is_text:
        return text
    if value_type is ValueType.BOOL:
        if text.lower() not in {"true", "false"}:
            raise ValueError("a BOOL is true or false")
        return text.lower() == "true"
    if value_type.dtype.kind == "i":
        number, limits = int(text), np.iinfo(value_type.dtype)
        if not limits.min <= number <= limits.max:
            raise ValueError(f"out of range for {value_type.name}")
        return number
    if value_type.dtype.kind == "f":
        return float(text)
    raise ValueError(f"{value_type.name} features have no defaults")


def decode_varint(raw: bytes, position: int) -> tuple[int, int]:
    """
    Decode an unsigned 64-bit varint.

    Returns:
        The number and the position after it.

    Raises:
        ValueMismatchError: it runs past the end or over 64 bits.
    """
    number = 0
    for i, byte in enumerate(raw[position : position + MAX_VARINT_BYTES]):
        number |= (byte & 0x7F) << 7 * i
        if byte < 0x80:
            if number >= 1 << 64:
                break
            return number, position + i + 1
    raise ValueMismatchError("a damaged varint")


def decode_time(raw: bytes) -> float:
    """
    Decode a serialized `google.protobuf.Timestamp` into Unix seconds; nothing is 1970.

    Raises:
        ValueMismatchError: `raw` is anything else.
    """
    parts = {_SECONDS_TAG: 0, _NANOS_TAG: 0}
    position, last_tag = 0, 0
    while position < len(raw):
        tag = raw[position]
        if tag not in parts or tag <= last_tag:
            raise ValueMismatchError("a damaged event time")
        parts[tag], position = decode_varint(raw, position + 1)
        last_tag = tag
    return _signed(parts[_SECONDS_TAG]) + parts[_NANOS_TAG] * 1e-9


def _signed(number: int) -> int:
    return number - (1 << 64) if number >> 63 else number


def _decode_scalar(payload: bytes, value_type: ValueType) -> Any:
    if value_type is ValueType.FLOAT or value_type is ValueType.DOUBLE:
        layout = "<f" if value_type is ValueType.FLOAT else "<d"
        if len(payload) != struct.calcsize(layout):
            raise ValueMismatchError(f"a {value_type.name} of {len(payload)} bytes")
        return struct.unpack(layout, payload)[0]
    number, end = decode_varint(payload, 0)
    if value_type is ValueType.STRING or value_type is ValueType.BYTES:
        text = payload[end:]
        if len(text) != number:
            raise ValueMismatchError("text whose length prefix is wrong")
        if value_type is ValueType.BYTES:
            return text
        try:
            return text.decode()
        except UnicodeDecodeError:
            raise ValueMismatchError("text that is not UTF-8") from None
    if end != len(payload):
        raise ValueMismatchError("bytes after the value")
    if value_type is ValueType.BOOL:
        if number > 1:
            raise ValueMismatchError("a BOOL that is neither 0 nor 1")
        return bool(number)
    signed = _signed(number)
    if value_type is ValueType.INT32 and not -(1 << 31) <= signed < 1 << 31:
        raise ValueMismatchError("an INT32 out of range")
    return signed


def _opaque(raw: bytes, value_type: ValueType) -> bytes:
    """Check that the one field of a `Value` is of that type, whose number it has, and is whole."""
    tag, position = decode_varint(raw, 0)
    number, wire_type = tag >> 3, tag & 7
    if number != value_type:
        raise ValueMismatchError(f"field {number} where {value_type.name} is declared")
    if wire_type == _LENGTH_DELIMITED:
        length, position = decode_varint(raw, position)
        if position + length != len(raw):
            raise ValueMismatchError("a value whose length prefix is wrong")
    return raw


def _parse_message(raw: bytes) -> Any:
    import_feast()
    from feast.protos.feast.types.Value_pb2 import Value  # noqa: PLC0415 - seconds to import
    from google.protobuf.message import DecodeError  # noqa: PLC0415 - only of use with the above

    try:
        return Value.FromString(raw)
    except DecodeError:
        raise ValueMismatchError("bytes that are no Value") from None
