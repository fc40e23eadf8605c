"""Decode cells of one kind as one array, and event times likewise.

Cells are the values of a hash's fields in the replies to a batch. Those of one scalar type are
joined, and tags, widths and varints are checked and decoded for all of them at once. The rare one
that is odd is left to `features.values`.

Source: Protocol Buffers documentation, "Encoding", and `features.values`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from operator import itemgetter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headrace.features.plan import PlannedFeature
from headrace.features.values import (
    MAX_VARINT_BYTES,
    TAGS,
    ValueMismatchError,
    ValueType,
    decode_time,
)

_Cell = bytes | None
Reply = Sequence[_Cell]

WIDTHS = {ValueType.FLOAT: 5, ValueType.DOUBLE: 9, ValueType.BOOL: 2}  # bytes of a whole cell
_WEIGHTS = np.uint64(1) << (np.arange(MAX_VARINT_BYTES, dtype=np.uint64) * np.uint64(7))
EXACT_WEIGHTS = _WEIGHTS[:7].astype(np.float64)  # 49 bits: sums are exact, and BLAS is fast
_VARINT_RANGE = np.arange(MAX_VARINT_BYTES)

# An event time between 1978 and 3058: five bytes of seconds, then perhaps nanoseconds.
_SECONDS_TAG, SECONDS_BYTES, _NANOS_TAG, NANOS_AT = 0x08, 5, 0x10, 7
_TIME_WIDTH = NANOS_AT + SECONDS_BYTES


@dataclass(frozen=True, slots=True)
class CellKind:
    """Neighbouring features of one scalar type: `at` are their places in the group."""

    value_type: ValueType
    at: slice

    @property
    def count(self) -> int:
        return int(self.at.stop - self.at.start)

    def decode(self, replies: Sequence[Reply]) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        """
        Decode this kind's cells of every reply.

        Returns:
            Values and whether each was as expected; where it was not the value is a filler.

        Raises:
            TypeError: a cell is nil.
        """
        cells: Any = chain.from_iterable(map(itemgetter(self.at), replies))
        shape = (len(replies), self.count)
        width = WIDTHS.get(self.value_type)
        if width is None:
            values, ok = _varints(list(cells), TAGS[self.value_type], shape)
            narrow = values.astype(self.value_type.dtype)
            ok &= narrow == values
            return np.where(ok, narrow, narrow.dtype.type(0)), ok
        joined = b"".join(cells)
        ok = np.zeros(shape, np.bool_)
        if len(joined) == width * ok.size:
            ok = _tags(joined, shape, width) == TAGS[self.value_type]
        if not ok.all():
            # Only when length and tags are all right do the cells lie where they are looked for:
            # the first that is too short or too long begins where a tag is due, and has another.
            own: Any = chain.from_iterable(map(itemgetter(self.at), replies))
            joined = b"".join([cell if len(cell) == width else bytes(width) for cell in own])
            ok = _tags(joined, shape, width) == TAGS[self.value_type]
        if self.value_type is ValueType.BOOL:
            digits = np.frombuffer(joined, np.uint8)[1::2].reshape(shape)
            ok &= digits <= 1
            return ok & (digits == 1), ok
        dtype = self.value_type.dtype
        strides = (shape[1] * width, width)
        payload: NDArray[Any] = np.ndarray(shape, dtype.newbyteorder("<"), joined, 1, strides)
        return (payload if ok.all() else np.where(ok, payload, dtype.type(np.nan))), ok


def cell_kinds(features: Sequence[PlannedFeature]) -> list[CellKind]:
    """Group features, which come sorted by type, into kinds."""
    kinds = []
    for value_type in dict.fromkeys(feature.value_type for feature in features):
        own = [i for i, feature in enumerate(features) if feature.value_type is value_type]
        kinds.append(CellKind(value_type, slice(own[0], own[-1] + 1)))
    return kinds


def _tags(joined: bytes, shape: tuple[int, int], width: int) -> NDArray[np.uint8]:
    return np.frombuffer(joined, np.uint8)[::width].reshape(shape)


def _varints(
    cells: list[bytes], tag: int, shape: tuple[int, int]
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Decode cells that are a tag and one varint; where one is not, the number means nothing."""
    sizes = np.fromiter(map(len, cells), np.intp, len(cells)).reshape(shape) - 1
    width = min(max(int(sizes.max()), 1), MAX_VARINT_BYTES)
    # Cells are cut or padded with zeros to the same width. A zero adds nothing to a varint.
    block = np.array(cells, f"S{width + 1}").view(np.uint8).reshape(*shape, width + 1)
    ok = (block[..., 0] == tag) & (sizes > 0) & _ends_at(block[..., 1:], sizes)
    return sum_varints(block[..., 1:]), ok


def _ends_at(block: NDArray[np.uint8], sizes: Any) -> NDArray[np.bool_]:
    """Say of which varints exactly the first `sizes` bytes are theirs, and within 64 bits."""
    width = block.shape[-1]
    continued = _VARINT_RANGE[:width] < np.asarray(sizes)[..., None] - 1
    ok: NDArray[np.bool_] = ((block >= 0x80) == continued).all(-1) & (sizes <= width)
    return ok & (block[..., -1] <= 1) if width == MAX_VARINT_BYTES else ok


def sum_varints(block: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Add up varints padded with zeros; the last axis is one varint's bytes."""
    width = block.shape[-1]
    if width <= len(EXACT_WEIGHTS):
        exact: NDArray[np.float64] = (block & 0x7F) @ EXACT_WEIGHTS[:width]
        return exact.astype(np.int64)
    digits = (block & 0x7F).astype(np.uint64)
    total: NDArray[np.uint64] = digits @ _WEIGHTS[:width]
    return total.view(np.int64)


def decode_times(replies: Sequence[Reply], at: slice) -> NDArray[np.float64]:
    """
    Decode the event times of every reply; NaN where one is damaged.

    Raises:
        TypeError: a cell is nil.
    """
    cells: list[Any] = list(chain.from_iterable(map(itemgetter(at), replies)))
    shape = (len(replies), at.stop - at.start)
    sizes = np.fromiter(map(len, cells), np.intp, len(cells)).reshape(shape)
    block = np.array(cells, f"S{_TIME_WIDTH}").view(np.uint8).reshape(*shape, _TIME_WIDTH)
    usual = (block[..., 0] == _SECONDS_TAG) & _ends_at(block[..., 1:6], SECONDS_BYTES)
    nanos = block[..., NANOS_AT:]
    has_nanos = (block[..., 6] == _NANOS_TAG) & _ends_at(nanos, sizes - NANOS_AT)
    usual &= (sizes == 6) | ((sizes > NANOS_AT) & has_nanos)
    times_s = sum_varints(block[..., 1:6]) + sum_varints(nanos) * 1e-9
    if not usual.all():
        for row, i in np.argwhere(~usual).tolist():
            try:
                times_s[row, i] = decode_time(cells[row * shape[1] + i])
            except ValueMismatchError:
                times_s[row, i] = np.nan
    return times_s


def is_usual_time(cell: bytes) -> bool:
    """Say whether a time is as `decode_times` has them; what is odd has no layout to learn."""
    return (
        len(cell) >= 6
        and cell[0] == _SECONDS_TAG
        and _is_varint(cell[1:6])
        and (
            len(cell) == 6
            or (
                NANOS_AT < len(cell) <= _TIME_WIDTH
                and cell[6] == _NANOS_TAG
                and _is_varint(cell[NANOS_AT:])
            )
        )
    )


def _is_varint(cell: bytes) -> bool:
    return all(byte >= 0x80 for byte in cell[:-1]) and cell[-1] < 0x80
