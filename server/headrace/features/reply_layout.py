"""Where everything is in a reply that looks like an earlier one: nothing is parsed.

Replies in which every field is there and has a length seen before differ from one another only in
known places. Where a batch's bytes equal such a layout under a mask, its columns are views of them.

Source: RESP2 (https://valkey.io/topics/protocol/), `features.cell_kinds`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headrace.features.cell_kinds import (
    EXACT_WEIGHTS,
    NANOS_AT,
    SECONDS_BYTES,
    WIDTHS,
    CellKind,
    sum_varints,
)
from headrace.features.values import MAX_VARINT_BYTES, ValueType

_COMPARED_BYTES = 32 << 10
"""Of a batch, compared with a layout at once: they stay in a processor's first cache."""

_TILED_MAX = 64
"""Layouts that are kept repeated as often as that, of all there are: 4 MiB of memory."""

_RUNS_MAX = 4
"""Evenly spaced cells copied as one. Of more runs than this the cells are gathered one by one."""

_Columns = list[tuple[slice, NDArray[Any]]]


class ReplyLayout:
    """
    Where everything is in a reply none of whose cells is nil or null.

    Args:
        kinds: Of the first cells; the rest are usual event times.
        parts: A reply of that layout.
        places: Which part each cell is.
        names: Which parts are names of fields. What is neither a cell nor a name may be anything
            of that length.
    """

    def __init__(
        self,
        kinds: Sequence[CellKind],
        parts: Sequence[bytes],
        places: Sequence[int],
        names: Sequence[int],
    ) -> None:
        row = bytearray(b"*%d\r\n" % len(parts))
        mask = bytearray(b"\xff" * len(row))
        starts = []
        cell_of = {place: i for i, place in enumerate(places)}
        for place, part in enumerate(parts):
            head = b"$%d\r\n" % len(part)
            starts.append(len(row) + len(head))
            row += head + part + b"\r\n"
            if place in cell_of:
                cell = cell_of[place]
                kind = next((kind for kind in kinds if kind.at.stop > cell), None)
                bits = _fixed_bits(kind, part)
            else:
                bits = (b"\xff" if place in names else b"\0") * len(part)
            mask += b"\xff" * len(head) + bits + b"\xff\xff"
        self._starts = [starts[place] for place in places]
        self.length = len(row)
        self._mask_bytes = bytes(mask)
        self._mask = np.frombuffer(self._mask_bytes, np.uint8)
        self._row = (np.frombuffer(bytes(row), np.uint8) & self._mask).tobytes()
        self._kinds = kinds
        self._sizes = [len(parts[place]) for place in places]
        # Cells that lie evenly are strided views, others are gathered.
        self._runs: dict[int, list[_Run]] = {}
        self._gathered: dict[int, NDArray[np.intp]] = {}
        for kind in kinds:
            if kind.value_type in WIDTHS:
                starts = [start + 1 for start in self._starts[kind.at]]
                runs = _runs(starts)
                if len(runs) <= _RUNS_MAX:
                    self._runs[kind.at.start] = runs
                else:
                    width = WIDTHS[kind.value_type] - 1
                    self._gathered[kind.at.start] = _places(starts, width).ravel()
        first_time = kinds[-1].at.stop if kinds else 0
        self._view_count = len(places) - first_time
        self._time_bytes, self._time_weights = _time_sums(
            self._starts[first_time:], self._sizes[first_time:]
        )

    def decode(self, data: bytes, rows: int) -> tuple[_Columns, NDArray[np.float64]] | None:
        """
        Decode replies.

        Returns:
            Each kind's place in the group and its values, shape (rows, features of the kind), and
            the event times, shape (rows, times); None when not all are of this layout.
        """
        received = np.frombuffer(data, np.uint8)
        if not self._fits(received):
            return None
        block = received.reshape(rows, -1)
        columns: _Columns = []
        for kind in self._kinds:
            values = self._values(kind, data, block)
            if values is None:
                return None
            columns.append((kind.at, values))
        # Seconds of every view, then nanoseconds, as one product of exact numbers.
        digits = np.take(block, self._time_bytes, 1) & 0x7F
        sums = digits.astype(np.float64) @ self._time_weights
        times_s = sums[:, self._view_count :] * 1e-9
        times_s += sums[:, : self._view_count]
        return columns, times_s

    def _fits(self, received: NDArray[np.uint8]) -> bool:
        if len(received) == self.length:
            return self._row == (received & self._mask).data
        rows, mask = _tiled(self._row, self._mask_bytes)
        step = len(mask)
        for first in range(0, len(received), step):
            part = received[first : first + step]
            if not rows.startswith((part & mask[: len(part)]).data):
                return False
        return True

    def _values(self, kind: CellKind, data: bytes, block: NDArray[np.uint8]) -> NDArray[Any] | None:
        shape = len(block), kind.count
        dtype = kind.value_type.dtype
        little = dtype.newbyteorder("<")
        gathered = self._gathered.get(kind.at.start)
        if gathered is not None:
            cells: NDArray[Any] = np.take(block, gathered, 1).view(little).reshape(shape)
            return cells
        runs = self._runs.get(kind.at.start)
        if runs is not None:
            views = [
                np.ndarray(
                    (shape[0], run.at.stop - run.at.start),
                    *(little, data, run.first, (self.length, run.stride)),
                )
                for run in runs
            ]
            if len(views) == 1:
                return views[0]
            cells = np.empty(shape, dtype)
            for run, view in zip(runs, views, strict=True):
                cells[:, run.at] = view
            return cells
        values = np.empty(shape, np.int64)
        for i in range(kind.count):
            start, size = self._starts[kind.at.start + i], self._sizes[kind.at.start + i]
            values[:, i] = sum_varints(block[:, start + 1 : start + size])
        narrow = values.astype(dtype, copy=False)
        return narrow if (narrow == values).all() else None


@dataclass(frozen=True, slots=True)
class _Run:
    """Columns `at` whose cells begin at `first` and `stride` bytes apart."""

    at: slice
    first: int
    stride: int


@lru_cache(maxsize=_TILED_MAX)
def _tiled(row: bytes, mask: bytes) -> tuple[bytes, NDArray[np.uint8]]:
    """Repeat a masked row, and its mask, for comparing many rows at once."""
    count = max(1, _COMPARED_BYTES // len(row))
    return row * count, np.frombuffer(mask * count, np.uint8)


def _runs(starts: Sequence[int]) -> list[_Run]:
    """Cut cells into runs of evenly spaced ones."""
    gaps = [after - before for before, after in pairwise(starts)]
    runs, first = [], 0
    while first < len(starts):
        stop = first + 1
        while stop < len(starts) and gaps[stop - 1] == gaps[first]:
            stop += 1
        stride = gaps[first] if stop > first + 1 else 0
        runs.append(_Run(slice(first, stop), starts[first], stride))
        first = stop
    return runs


def _time_sums(
    starts: Sequence[int], sizes: Sequence[int]
) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
    """
    Say how event times are summed up.

    Returns:
        The places of their varints' bytes, shape (bytes,); what seven bits there are worth, shape
        (bytes, 2 x times): as seconds of each time, then as nanoseconds.
    """
    places: list[NDArray[np.intp]] = []
    worth: list[tuple[int, NDArray[np.float64]]] = []
    for i, (start, size) in enumerate(zip(starts, sizes, strict=True)):
        for column, at, count in (
            (i, start + 1, SECONDS_BYTES),
            (len(starts) + i, start + NANOS_AT, max(0, size - NANOS_AT)),
        ):
            places.append(np.arange(at, at + count))
            worth.append((column, EXACT_WEIGHTS[:count]))
    weights = np.zeros((sum(map(len, places)), 2 * len(starts)))
    row = 0
    for column, own in worth:
        weights[row : row + len(own), column] = own
        row += len(own)
    return np.concatenate(places) if places else np.empty(0, np.intp), weights


def _places(starts: Sequence[int], width: int) -> NDArray[np.intp]:
    """Return the places of `width` bytes from each start, shape (starts, width)."""
    return np.array(starts, np.intp)[:, None] + np.arange(width)


def _fixed_bits(kind: CellKind | None, cell: bytes) -> bytes:
    """Return the bits of a cell that its layout fixes: tags, and where varints end."""
    if kind is None:
        nanos = b"\xff" + _varint_bits(len(cell) - NANOS_AT) if len(cell) > NANOS_AT else b""
        return b"\xff" + _varint_bits(SECONDS_BYTES) + nanos
    if kind.value_type is ValueType.BOOL:
        return b"\xff\xfe"
    if kind.value_type in WIDTHS:
        return b"\xff" + bytes(len(cell) - 1)
    return b"\xff" + _varint_bits(len(cell) - 1)


def _varint_bits(size: int) -> bytes:
    # Of the tenth byte only the lowest bit is within 64.
    return b"\x80" * size if size < MAX_VARINT_BYTES else b"\x80" * (size - 1) + b"\xfe"
