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
    fields = FIXED_COLUMNS.get(dtype)
    if fields is not None:
        values, kind = fields
        return delimited(kind, delimited(values, array.tobytes()))
    if dtype.kind == "f":
        wider = array.astype("<f8" if dtype.itemsize > 4 else "<f4")
        return encode_column(wider)
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


_VALUES = _tag_of(pb.FloatColumn, "values")
FIXED_COLUMNS = {
    np.dtype("<f4"): (_VALUES, _tag_of(pb.Column, "floats")),
    np.dtype("<f8"): (_VALUES, _tag_of(pb.Column, "doubles")),
    np.dtype(np.bool_): (_VALUES, _tag_of(pb.Column, "bools")),  # 0 or 1: its own varint
}
"""
Columns that are an array's bytes: the tags of their values in their kind, and of that in `Column`.
"""
