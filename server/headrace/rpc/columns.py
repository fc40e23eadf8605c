"""`headrace.v1.Column`, written from an array."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from headrace.v1 import prediction_service_pb2 as pb
from headrace.wire import delimited, tag


def encode_column(array: NDArray[Any], *, as_bytes: bool | None = None) -> bytes:
    """
    Serialize a `Column` of all elements, row-major.

    Args:
        array: The elements; None for placeholders of text.
        as_bytes: Whether text is BYTES rather than STRING; None to see by the elements.
    """
    dtype = array.dtype
    if dtype in (np.float32, np.float16):
        return delimited(_FLOATS, delimited(_VALUES, array.astype("<f4").tobytes()))
    if dtype == np.float64:
        return delimited(_DOUBLES, delimited(_VALUES, array.astype("<f8").tobytes()))
    if dtype == np.bool_:  # one byte each, 0 or 1: its own varint
        return delimited(_BOOLS, delimited(_VALUES, array.tobytes()))
    flat = array.ravel().tolist()
    column = pb.Column()
    if dtype == np.object_ or dtype.kind in "SU":
        if as_bytes is None:
            as_bytes = any(isinstance(value, bytes) for value in flat)
        if as_bytes:
            column.bytes_values.values.extend(_as_bytes(value) for value in flat)
        elif all(value is None or isinstance(value, str) for value in flat):
            column.strings.values.extend(value or "" for value in flat)
        # Lists have no column kind: their statuses and ages are still told.
    elif dtype.itemsize <= 4 and dtype != np.uint32:
        column.int32s.values.extend(flat)
    else:
        column.int64s.values.extend(_signed(value) for value in flat)
    return bytes(column.SerializeToString())


def _as_bytes(value: Any) -> bytes:
    return value.encode() if isinstance(value, str) else value or b""


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


def _tag_of(message: Any, field: str) -> bytes:
    return tag(message.DESCRIPTOR.fields_by_name[field].number)


_FLOATS = _tag_of(pb.Column, "floats")
_DOUBLES = _tag_of(pb.Column, "doubles")
_BOOLS = _tag_of(pb.Column, "bools")
_VALUES = _tag_of(pb.FloatColumn, "values")
