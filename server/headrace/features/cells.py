"""Decode a batch of Redis replies into columns: everything numpy can do at once, it does at once.

A batch is one HMGET reply per entity, each of the same fields. Two ways lead from its bytes to
columns, and they agree:

- *Known layout.* Replies in which every field is there and has a length seen before differ from one
  another only in known places. When a batch fits a layout learned from an earlier one, byte for
  byte under a mask, the columns are strided views of the received bytes and nothing is parsed.
- *Any replies.* hiredis cuts them into cells; one gather brings the first bytes of every scalar
  cell into an array, where tags, lengths, fixed widths and varints are checked and decoded for all
  cells of a kind. Text and lists, and the rare cell that does not look as expected, go one by one
  through `values.decode_value`.

Source: RESP2 (https://valkey.io/topics/protocol/) and `features.values`, `features.layout`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import hiredis
import numpy as np
from numpy.typing import NDArray

from headrace.features.plan import FeaturePlan, FeatureStatus, KeyGroup, PlannedFeature
from headrace.features.values import (
    MAX_VARINT_BYTES,
    TAGS,
    ValueMismatchError,
    ValueType,
    decode_value,
)

MAX_LAYOUTS = 16
"""Layouts remembered per key group. Integers and fractions of seconds vary in length."""

_HEAD = 1 + MAX_VARINT_BYTES  # of a scalar cell: its tag and the longest payload
_TIME_HEAD = 2 * _HEAD  # of an event time: two tagged varints
_SHIFTS = np.arange(MAX_VARINT_BYTES, dtype=np.uint64) * np.uint64(7)
_WEIGHTS = np.uint64(1) << _SHIFTS
_WIDTHS = {ValueType.FLOAT: 5, ValueType.DOUBLE: 9, ValueType.BOOL: 2}  # of a whole cell


class UnexpectedReplyError(Exception):
    """The store answered with something that is not one reply per entity."""


@dataclass(slots=True)
class DecodedGroup:
    """
    What one key group's replies held, a row per entity read.

    Args:
        columns: (features of the group, their values of shape (rows, features)) per kind, where the
            first are places in `KeyGroup.features`.
        statuses: Shape (rows, features of the group).
        event_times_s: Shape (rows, views of the group).
    """

    columns: list[tuple[slice, NDArray[Any]]]
    statuses: NDArray[np.uint8] | None
    event_times_s: NDArray[np.float64]


class GroupDecoder:
    """
    Decodes the replies of one key group, and remembers the layouts it has met.

    Args:
        plan: The plan.
        group: One of its groups.
        on_mismatch: Called with a feature whose stored value is not of its type, and why.
    """

    def __init__(
        self,
        plan: FeaturePlan,
        group: KeyGroup,
        on_mismatch: Callable[[PlannedFeature, str], None],
    ) -> None:
        self._features = [plan.features[i] for i in group.features]
        self._on_mismatch = on_mismatch
        self._width = len(group.fields)
        self._time_count = len(group.views)
        self._scalar_count = len(group.features) - group.object_count
        self._kinds = _kinds(self._features[: self._scalar_count])
        self._layouts: dict[int, _Layout] = {}
        self.slices = [kind.at for kind in self._kinds]
        """The places that `DecodedGroup.columns` can have, in order."""
        if group.object_count:
            self.slices.append(slice(self._scalar_count, len(self._features)))

    def decode(self, data: bytes, rows: int) -> DecodedGroup:
        """
        Decode `rows` replies.

        Raises:
            UnexpectedReplyError: `data` is not exactly that many arrays of the right width.
        """
        row_length, remainder = divmod(len(data), rows)
        if not remainder:
            known = self._layouts.get(row_length)
            if known is not None:
                decoded = known.decode(data, rows)
                if decoded is not None:
                    return decoded
        return self._decode_replies(self._parse(data, rows), row_length)

    def _parse(self, data: bytes, rows: int) -> list[list[bytes | None]]:
        reader = hiredis.Reader(notEnoughData=_NOT_ENOUGH)
        reader.feed(data)
        replies = []
        try:
            while (reply := reader.gets()) is not _NOT_ENOUGH:
                if type(reply) is not list or len(reply) != self._width:
                    raise UnexpectedReplyError(_shown(reply))
                replies.append(reply)
        except hiredis.ProtocolError as error:
            raise UnexpectedReplyError(str(error)) from None
        if len(replies) != rows or reader.has_data():
            raise UnexpectedReplyError(f"{len(replies)} whole replies to {rows} commands")
        return replies

    def _decode_replies(
        self, replies: Sequence[Sequence[bytes | None]], row_length: int
    ) -> DecodedGroup:
        rows, scalars, times = len(replies), self._scalar_count, self._time_count
        cells: list[Any] = list(chain.from_iterable(replies))
        try:
            lengths = np.fromiter(map(len, cells), np.intp, len(cells)).reshape(rows, -1)
            absent = None
        except TypeError:  # a nil among them
            absent = np.array([cell is None for cell in cells]).reshape(rows, -1)
            cells = [b"" if cell is None else cell for cell in cells]
            lengths = np.fromiter(map(len, cells), np.intp, len(cells)).reshape(rows, -1)
        block = np.frombuffer(b"".join([*cells, bytes(_TIME_HEAD)]), np.uint8)
        starts = lengths.ravel().cumsum().reshape(rows, -1) - lengths
        heads = block[starts[:, :scalars, None] + _HEAD_RANGE]

        decoded = np.zeros((rows, len(self._features)), np.bool_)
        columns: list[tuple[slice, NDArray[Any]]] = []
        for kind in self._kinds:
            at = kind.at
            values, decoded[:, at] = kind.decode(heads[:, at], lengths[:, at])
            columns.append((at, values))
        time_cells = slice(scalars, scalars + times)
        times_s, times_decoded = _decode_times(
            block[starts[:, time_cells, None] + _TIME_RANGE], lengths[:, time_cells]
        )
        if absent is not None:
            times_s[absent[:, time_cells]] = np.nan

        statuses = np.where(decoded, np.uint8(FeatureStatus.PRESENT), FeatureStatus.NULL_VALUE)
        statuses = statuses.astype(np.uint8, copy=False)
        if scalars < len(self._features):
            columns.append(self._decode_objects(replies, statuses))
        of_features = np.r_[0:scalars, scalars + times : self._width]
        if absent is not None:
            statuses[absent[:, of_features]] = FeatureStatus.NOT_FOUND
        # Whatever is there and did not decode: nulls in another spelling, older types, damage.
        odd = ~decoded[:, :scalars] & (lengths[:, :scalars] > 0)
        if odd.any():
            self._decode_odd(odd, replies, columns, statuses)
        elif scalars == len(self._features) and decoded.all() and times_decoded.all():
            # A nil event time is the one thing left that a layout cannot hold.
            if absent is None:
                self._learn(replies, lengths, row_length)
        return DecodedGroup(columns, statuses, times_s)

    def _decode_objects(
        self, replies: Sequence[Sequence[bytes | None]], statuses: NDArray[np.uint8]
    ) -> tuple[slice, NDArray[Any]]:
        first = self._scalar_count
        values = np.full((len(replies), len(self._features) - first), None, np.object_)
        for row, reply in enumerate(replies):
            for i, raw in enumerate(reply[first + self._time_count :]):
                if raw and (value := self._decode_one(first + i, raw)) is not None:
                    values[row, i] = value
                    statuses[row, first + i] = FeatureStatus.PRESENT
        return slice(first, len(self._features)), values

    def _decode_odd(
        self,
        odd: NDArray[np.bool_],
        replies: Sequence[Sequence[bytes | None]],
        columns: Sequence[tuple[slice, NDArray[Any]]],
        statuses: NDArray[np.uint8],
    ) -> None:
        for row, cell in np.argwhere(odd).tolist():
            value = self._decode_one(cell, replies[row][cell] or b"")
            if value is not None:
                at, values = next(entry for entry in columns if entry[0].stop > cell)
                values[row, cell - at.start] = value
                statuses[row, cell] = FeatureStatus.PRESENT

    def _decode_one(self, cell: int, raw: bytes) -> Any:
        feature = self._features[cell]
        try:
            return decode_value(raw, feature.value_type)
        except ValueMismatchError as error:
            self._on_mismatch(feature, str(error))
            return None

    def _learn(
        self,
        replies: Sequence[Sequence[bytes | None]],
        lengths: NDArray[np.intp],
        row_length: int,
    ) -> None:
        if len(self._layouts) < MAX_LAYOUTS and (lengths == lengths[0]).all():
            self._layouts.setdefault(row_length, _Layout(self._kinds, replies[0]))


@dataclass(frozen=True, slots=True)
class _Kind:
    """Neighbouring features of one scalar type: `at` are their places in the group."""

    value_type: ValueType
    at: slice

    @property
    def count(self) -> int:
        return int(self.at.stop - self.at.start)

    def decode(
        self, heads: NDArray[np.uint8], lengths: NDArray[np.intp]
    ) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        """Decode cells from their first `_HEAD` bytes; where that fails the value is a filler."""
        dtype = self.value_type.dtype
        ok = heads[..., 0] == TAGS[self.value_type]
        width = _WIDTHS.get(self.value_type)
        if width is None:
            values, sizes = _varints(heads[..., 1:])
            ok &= (sizes > 0) & (lengths == sizes + 1)
            if dtype == np.int32:
                ok &= values == values.astype(np.int32)
            return np.where(ok, values, 0).astype(dtype), ok
        ok &= lengths == width
        if self.value_type is ValueType.BOOL:
            ok &= heads[..., 1] <= 1
            return ok & (heads[..., 1] == 1), ok
        payload = np.ascontiguousarray(heads[..., 1:width])
        values = payload.view(dtype.newbyteorder("<"))[..., 0].astype(dtype, copy=False)
        return np.where(ok, values, dtype.type(np.nan)), ok


def _kinds(features: Sequence[PlannedFeature]) -> list[_Kind]:
    kinds = []
    for value_type in dict.fromkeys(feature.value_type for feature in features):
        own = [i for i, feature in enumerate(features) if feature.value_type is value_type]
        kinds.append(_Kind(value_type, slice(own[0], own[-1] + 1)))
    return kinds


class _Layout:
    """
    Where everything is in a reply all of whose cells are present and of known length.

    Args:
        kinds: Of the reply's first cells; the rest are event times.
        cells: A reply of that layout.
    """

    def __init__(self, kinds: Sequence[_Kind], cells: Sequence[bytes | None]) -> None:
        whole = [cell for cell in cells if cell is not None]
        assert len(whole) == len(cells)
        row = bytearray(b"*%d\r\n" % len(whole))
        mask = bytearray(b"\xff" * len(row))
        at = []
        for i, cell in enumerate(whole):
            head = b"$%d\r\n" % len(cell)
            at.append(len(row) + len(head))
            row += head + cell + b"\r\n"
            kind = next((kind for kind in kinds if kind.at.stop > i), None)
            mask += b"\xff" * len(head) + _mask(kind, cell) + b"\xff\xff"
        self._mask = np.frombuffer(bytes(mask), np.uint8)
        self._row = np.frombuffer(bytes(row), np.uint8) & self._mask
        self._kinds = kinds
        self._at = at
        self._lengths = [len(cell) for cell in whole]
        self._times = [
            (position, _time_sizes(cell))
            for position, cell in zip(at[_stop(kinds) :], whole[_stop(kinds) :], strict=True)
        ]

    def decode(self, data: bytes, rows: int) -> DecodedGroup | None:
        """Decode replies, or return None when they are not all of this layout."""
        block = np.frombuffer(data, np.uint8).reshape(rows, -1)
        if ((block & self._mask) != self._row).any():
            return None
        columns: list[tuple[slice, NDArray[Any]]] = []
        for kind in self._kinds:
            values = self._values(kind, data, block)
            if values is None:
                return None
            columns.append((kind.at, values))
        times_s = np.empty((rows, len(self._times)))
        for i, (position, (seconds, nanos)) in enumerate(self._times):
            total = np.zeros(rows)
            if seconds:
                total = _known_varint(block, position + 1, seconds).astype(np.float64)
                position += 1 + seconds
            if nanos:
                total += _known_varint(block, position + 1, nanos) * 1e-9
            times_s[:, i] = total
        return DecodedGroup(columns, None, times_s)

    def _values(self, kind: _Kind, data: bytes, block: NDArray[np.uint8]) -> NDArray[Any] | None:
        first, shape = self._at[kind.at.start] + 1, (len(block), kind.count)
        dtype = kind.value_type.dtype
        if kind.value_type in _WIDTHS:
            stride = self._at[kind.at.start + 1] - self._at[kind.at.start]
            return np.ndarray(shape, dtype.newbyteorder("<"), data, first, (block.shape[1], stride))
        values = np.empty(shape, np.int64)
        for i in range(kind.count):
            cell = kind.at.start + i
            values[:, i] = _known_varint(block, self._at[cell] + 1, self._lengths[cell] - 1)
        if dtype == np.int64:
            return values
        narrow = values.astype(dtype)
        return narrow if (narrow == values).all() else None


def _stop(kinds: Sequence[_Kind]) -> int:
    return int(kinds[-1].at.stop) if kinds else 0


def _mask(kind: _Kind | None, cell: bytes) -> bytes:
    """Return the bits of a cell that its layout fixes: tags, and where varints end."""
    if kind is None:
        seconds, nanos = _time_sizes(cell)
        return b"".join(b"\xff" + _varint_mask(size) for size in (seconds, nanos) if size)
    if kind.value_type is ValueType.BOOL:
        return b"\xff\xfe"
    if kind.value_type in _WIDTHS:
        return b"\xff" + bytes(len(cell) - 1)
    return b"\xff" + _varint_mask(len(cell) - 1)


def _varint_mask(size: int) -> bytes:
    # Of the tenth byte only the lowest bit is within 64.
    return b"\x80" * size if size < MAX_VARINT_BYTES else b"\x80" * (size - 1) + b"\xfe"


def _time_sizes(cell: bytes) -> tuple[int, int]:
    """Return the bytes that the seconds' and the nanos' varints take; 0 for what is left out."""
    if not cell:
        return 0, 0
    first = next(i for i, byte in enumerate(cell[1:], 1) if byte < 0x80)
    if cell[0] == _NANOS_TAG:
        return 0, first
    return first, max(len(cell) - first - 2, 0)


def _known_varint(block: NDArray[np.uint8], position: int, size: int) -> NDArray[np.int64]:
    digits = (block[:, position : position + size] & 0x7F).astype(np.uint64)
    return (digits @ _WEIGHTS[:size]).view(np.int64)


def _varints(heads: NDArray[np.uint8]) -> tuple[NDArray[np.int64], NDArray[np.intp]]:
    """
    Decode the varint at the start of each last axis of at most 10 bytes.

    Returns:
        The numbers as signed, and the bytes each took; 0 where it is damaged.
    """
    more = heads >= 0x80
    sizes = more.argmin(-1) + 1
    used = np.arange(heads.shape[-1]) < sizes[..., None]
    digits = np.where(used, heads & 0x7F, 0).astype(np.uint64)
    damaged = more.all(-1)
    if heads.shape[-1] == MAX_VARINT_BYTES:
        damaged |= (sizes == MAX_VARINT_BYTES) & (heads[..., -1] > 1)
    values = (digits << _SHIFTS[: heads.shape[-1]]).sum(-1, dtype=np.uint64).view(np.int64)
    return values, np.where(damaged, 0, sizes)


def _decode_times(
    heads: NDArray[np.uint8], lengths: NDArray[np.intp]
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Decode serialized `google.protobuf.Timestamp`s; NaN where one is damaged."""
    seconds, taken = _varints(heads[..., 1:_HEAD])
    has_seconds = (heads[..., 0] == _SECONDS_TAG) & (lengths > 0)
    ok = ~has_seconds | (taken > 0)
    position = np.where(has_seconds, taken + 1, 0)
    has_nanos = lengths > position
    rest = np.take_along_axis(heads, position[..., None] + _HEAD_RANGE, -1)
    nanos, taken = _varints(rest[..., 1:])
    ok &= ~has_nanos | ((rest[..., 0] == _NANOS_TAG) & (taken > 0))
    ok &= lengths == position + np.where(has_nanos, taken + 1, 0)
    times_s = np.where(has_seconds, seconds, 0) + np.where(has_nanos, nanos, 0) * 1e-9
    return np.where(ok, times_s, np.nan), ok


def _shown(reply: Any) -> str:
    if isinstance(reply, hiredis.ReplyError):
        return str(reply)
    return f"a {type(reply).__name__} where an array is due"


_HEAD_RANGE = np.arange(_HEAD)
_TIME_RANGE = np.arange(_TIME_HEAD)
_NOT_ENOUGH = object()
_SECONDS_TAG = 0x08
_NANOS_TAG = 0x10
