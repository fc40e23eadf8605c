"""`headrace.v1.GetOnlineFeaturesResponse`, written a batch at a time.

Values of fixed width go out as the little-endian bytes that numpy has; what comes before them is
the same for every reply of so many rows.
"""

import weakref
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headrace.feature_reads import FeatureRead
from headrace.features.plan import FeaturePlan, FeatureStatus, PlannedFeature
from headrace.features.values import ValueType, encode_message
from headrace.rpc.columns import encode_column
from headrace.v1 import feature_service_pb2 as pb
from headrace.v1 import prediction_service_pb2 as column_pb
from headrace.wire import delimited, tag, varint

PREFIXES_MAX = 64
"""Per plan: as many numbers of rows."""


class PackedReplies:
    """
    The replies to one batch.

    Args:
        read: What was read.
    """

    def __init__(self, read: FeatureRead) -> None:
        self._read = read
        self._shape = _shape_of(read.plan)
        is_present = read.rows.statuses == FeatureStatus.PRESENT
        self._is_present = None if is_present.all() else is_present

    def message(self, start: int, stop: int, *, with_times: bool) -> bytes:
        """
        Return one caller's reply.

        Args:
            start: Its first row.
            stop: After its last row.
            with_times: Whether to say when values were observed.
        """
        plan, rows, shape = self._read.plan, self._read.rows, self._shape
        count = stop - start
        prefixes = shape.prefixes(count)
        is_full = None
        if self._is_present is not None:
            is_full = self._is_present[:, start:stop].all(1).tolist()
            if all(is_full):
                is_full = None
        data = [_by_column(rows.blocks[dtype][start:stop]) for dtype in shape.dtypes]
        parts: list[bytes] = []
        for i, (group, at, width) in enumerate(shape.places):
            if width and (is_full is None or is_full[i]):
                size = width * count
                parts += (prefixes[i], data[group][at * size : (at + 1) * size])
                continue
            part = shape.heads[i] + _encode(plan.features[i].value_type, rows.values[i][start:stop])
            if is_full is not None and not is_full[i]:
                # A status is one byte, and so is its varint.
                part += delimited(_STATUSES, rows.statuses[i, start:stop].tobytes())
            parts.append(delimited(_FEATURES, part))
        if with_times:
            parts += self._times(start, stop)
        return b"".join(parts)

    def _times(self, start: int, stop: int) -> list[bytes]:
        times_s = self._read.rows.event_times_s[:, start:stop].astype("<f8")
        return [
            delimited(
                _EVENT_TIMES,
                pb.ViewEventTimes(view=view.label).SerializeToString()
                + delimited(_TIMES, times_s[i].tobytes()),
            )
            for i, view in enumerate(self._read.plan.views)
        ]


class _Shape:
    """What replies with one plan have in common."""

    def __init__(self, plan: FeaturePlan) -> None:
        self.dtypes = [dtype for dtype in plan.block_widths if dtype in _WIDE]
        groups = {dtype: i for i, dtype in enumerate(self.dtypes)}
        self.heads = [_head(feature) for feature in plan.features]
        self.places = [
            (groups[dtype], column, dtype.itemsize) if dtype in groups else (0, 0, 0)
            for dtype, column in plan.block_columns
        ]
        self._dtypes = [dtype for dtype, _ in plan.block_columns]
        self._prefixes: dict[int, list[bytes]] = {}

    def prefixes(self, rows: int) -> list[bytes]:
        """Return what comes before the values of each feature, in a reply of so many rows."""
        known = self._prefixes.get(rows)
        if known is None:
            known = [
                self._prefix(head, dtype, rows)
                for head, dtype in zip(self.heads, self._dtypes, strict=True)
            ]
            if len(self._prefixes) < PREFIXES_MAX:
                self._prefixes[rows] = known
        return known

    def _prefix(self, head: bytes, dtype: np.dtype[Any], rows: int) -> bytes:
        kind = _WIDE.get(dtype)
        if kind is None:
            return b""
        prefix, size = b"", rows * dtype.itemsize
        for field in (_PACKED, kind, _VALUES):  # from the inside
            prefix = field + varint(len(prefix) + size) + prefix
        return _FEATURES + varint(len(head) + len(prefix) + size) + head + prefix


def _shape_of(plan: FeaturePlan) -> _Shape:
    shape = _SHAPES.get(plan)
    if shape is None:
        shape = _SHAPES[plan] = _Shape(plan)
    return shape


def _by_column(block: NDArray[Any]) -> bytes:
    little = block.dtype.newbyteorder("<")
    return block.T.astype(little, copy=False).tobytes()


def _head(feature: PlannedFeature) -> bytes:
    return bytes(
        pb.FeatureValues(name=feature.name, view_index=feature.view_index).SerializeToString()
    )


def _encode(value_type: ValueType, values: NDArray[Any]) -> bytes:
    if values.dtype != np.object_ or value_type.is_text:
        is_bytes = value_type is ValueType.BYTES  # whatever is missing of it
        return delimited(_VALUES, encode_column(values, as_bytes=is_bytes))
    cells = [b"" if one is None else encode_message(one, value_type) for one in values.tolist()]
    return delimited(_SERIALIZED, b"".join(delimited(_SERIALIZED_VALUES, cell) for cell in cells))


def _tag_of(message: Any, name: str) -> bytes:
    return tag(message.DESCRIPTOR.fields_by_name[name].number)


_FEATURES = _tag_of(pb.GetOnlineFeaturesResponse, "features")
_EVENT_TIMES = _tag_of(pb.GetOnlineFeaturesResponse, "event_times")
_VALUES = _tag_of(pb.FeatureValues, "values")
_SERIALIZED = _tag_of(pb.FeatureValues, "serialized_values")
_STATUSES = _tag_of(pb.FeatureValues, "statuses")
_SERIALIZED_VALUES = _tag_of(pb.SerializedValues, "values")
_TIMES = _tag_of(pb.ViewEventTimes, "event_times_s")
_PACKED = _tag_of(column_pb.FloatColumn, "values")
_WIDE: dict[np.dtype[Any], bytes] = {
    np.dtype(np.float32): _tag_of(column_pb.Column, "floats"),
    np.dtype(np.float64): _tag_of(column_pb.Column, "doubles"),
    np.dtype(np.bool_): _tag_of(column_pb.Column, "bools"),
}
"""Values that are as many bytes in a message as in an array; a truth value is its own varint."""

_SHAPES: weakref.WeakKeyDictionary[FeaturePlan, _Shape] = weakref.WeakKeyDictionary()
