"""Decode a batch of Redis replies into columns: all of a kind at once, one by one only what is odd.

A batch is one HMGET reply per entity, each of the same fields, or one HGETALL reply, of every field
and its name. Two ways lead from its bytes to columns, and they agree:

- *Known layout.* Replies in which every field is there and has a length seen before differ from one
  another only in known places. When a batch fits a layout learned from an earlier one, byte for
  byte under a mask, the columns are strided views of the received bytes and nothing is parsed.
- *Any replies.* hiredis cuts them into cells; those of one kind are joined and looked at as one
  array, where tags, widths and varints are checked and decoded. Text and lists, and the rare cell
  that does not look as expected, go through `values.decode_value`.

Source: RESP2 (https://valkey.io/topics/protocol/), `features.values` and `features.plan`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from operator import itemgetter
from typing import Any

import hiredis
import numpy as np
from numpy.typing import NDArray

from headrace.features.hash_reads import HashSample
from headrace.features.plan import FeaturePlan, FeatureStatus, KeyGroup, PlannedFeature
from headrace.features.redis_errors import error_word
from headrace.features.values import (
    MAX_VARINT_BYTES,
    TAGS,
    ValueMismatchError,
    ValueType,
    decode_time,
    decode_value,
)

MAX_LAYOUTS = 16
"""Layouts remembered per key group: integers and fractions of seconds vary in length."""

_FED_BYTES = 16 << 10
"""
Given to the parser at once. Whenever it hands a reply over it moves what it has not read yet to the
front, so that its time grows with the square of this.
"""

_Cell = bytes | None
_Reply = Sequence[_Cell]

_WIDTHS = {ValueType.FLOAT: 5, ValueType.DOUBLE: 9, ValueType.BOOL: 2}  # bytes of a whole cell
_WEIGHTS = np.uint64(1) << (np.arange(MAX_VARINT_BYTES, dtype=np.uint64) * np.uint64(7))
_EXACT_WEIGHTS = _WEIGHTS[:7].astype(np.float64)  # 49 bits: sums are exact, and BLAS is fast
_VARINT_RANGE = np.arange(MAX_VARINT_BYTES)

# An event time between 1978 and 3058: five bytes of seconds, then perhaps nanoseconds.
_SECONDS_TAG, _SECONDS_BYTES, _NANOS_TAG, _NANOS_AT = 0x08, 5, 0x10, 7
_TIME_WIDTH = _NANOS_AT + _SECONDS_BYTES


class UnexpectedReplyError(Exception):
    """The store answered with something that is not one reply per entity."""


@dataclass(frozen=True, slots=True)
class DecodedGroup:
    """
    What one key group's replies held, a row per entity read.

    Args:
        columns: (which of `KeyGroup.features`, their values of shape (rows, features)) per kind.
        statuses: Shape (rows, features of the group); None when all are PRESENT.
        event_times_s: Shape (rows, views of the group); NaN where unknown.
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
        is_whole: Whether the replies are to HGETALL.

    Attributes:
        slices: Those that `DecodedGroup.columns` have, in order.
    """

    def __init__(
        self,
        plan: FeaturePlan,
        group: KeyGroup,
        on_mismatch: Callable[[PlannedFeature, str], None],
        *,
        is_whole: bool = False,
    ) -> None:
        self._fields = group.fields
        self._is_whole = is_whole
        # Where each field is in replies to HGETALL, by the names in the order of the reply.
        self._orders: dict[tuple[bytes, ...], tuple[int | None, ...]] = {}
        self._features = [plan.features[i] for i in group.features]
        self._on_mismatch = on_mismatch
        self._width = len(group.fields)
        scalars = len(group.features) - group.object_count
        self._kinds = _kinds(self._features[:scalars])
        self._times = slice(scalars, scalars + len(group.views))
        self._objects = slice(scalars, len(self._features))
        # A cell's place in a reply, per feature: the event times come before the objects.
        self._cells = [*range(scalars), *range(self._times.stop, self._width)]
        self._layouts: dict[int, _Layout] = {}
        self.slices = [kind.at for kind in self._kinds]
        if group.object_count:
            self.slices.append(self._objects)

    def decode(self, data: bytes, rows: int) -> DecodedGroup:
        """
        Decode `rows` replies.

        Raises:
            UnexpectedReplyError: `data` is not exactly that many arrays of the right width.
        """
        row_length, remainder = divmod(len(data), rows)
        known = None if remainder else self._layouts.get(row_length)
        if known is not None and (decoded := known.decode(data, rows)) is not None:
            return decoded
        replies = whole = self._parse(data, rows)
        if self._is_whole:
            replies = [self._pick(reply) for reply in whole]
        try:
            decoded = self._decode_replies(replies)
        except TypeError:  # a nil among the cells has no length and cannot be joined
            return self._decode_with_gaps(replies)
        if decoded.statuses is None and row_length not in self._layouts:
            self._learn(whole)
        return decoded

    def sample(self, data: bytes, rows: int) -> HashSample | None:
        """
        Say what the hashes in `rows` replies to HGETALL are like; None when there are none.

        Raises:
            UnexpectedReplyError: as `decode`.
        """
        found = [reply for reply in self._parse(data, rows) if reply]
        if not found:
            return None
        return HashSample(
            max(len(reply) // 2 for reply in found),
            max(len(value) for reply in found for value in reply[1::2] if value is not None),
        )

    def _parse(self, data: bytes, rows: int) -> list[_Reply]:
        reader = hiredis.Reader(notEnoughData=_NOT_ENOUGH)
        replies: list[_Reply] = []
        try:
            for first in range(0, len(data), _FED_BYTES):
                reader.feed(data[first : first + _FED_BYTES])
                while (reply := reader.gets()) is not _NOT_ENOUGH:
                    replies.append(self._checked(reply))
        except hiredis.ProtocolError as error:
            raise UnexpectedReplyError(str(error)) from None
        if len(replies) != rows or reader.has_data():
            raise UnexpectedReplyError(f"{len(replies)} whole replies to {rows} commands")
        return replies

    def _checked(self, reply: Any) -> _Reply:
        if type(reply) is list and self._has_right_length(reply):
            return reply
        if isinstance(reply, hiredis.ReplyError) and str(reply).startswith("WRONGTYPE"):
            # One key that somebody uses for something else is no reason to fail the rest.
            self._on_mismatch(self._features[0], "its key is not a hash")
            return [] if self._is_whole else [None] * self._width
        raise UnexpectedReplyError(_shown(reply))

    def _has_right_length(self, reply: _Reply) -> bool:
        return len(reply) % 2 == 0 if self._is_whole else len(reply) == self._width

    def _pick(self, reply: _Reply) -> _Reply:
        """Pick the group's fields out of a whole hash."""
        return [None if at is None else reply[at] for at in self._places_in(reply)]

    def _places_in(self, reply: _Reply) -> tuple[int | None, ...]:
        names = tuple(reply[::2])
        places = self._orders.get(names)  # type: ignore[arg-type]  # never nil, or not found
        if places is None:
            of_name = {name: 2 * i + 1 for i, name in enumerate(names)}
            places = tuple([of_name.get(name) for name in self._fields])
            if len(self._orders) < MAX_LAYOUTS:
                self._orders[names] = places  # type: ignore[index]
        return places

    def _decode_replies(self, replies: Sequence[_Reply]) -> DecodedGroup:
        """Decode cells of which none is nil."""
        ok = np.ones((len(replies), len(self._features)), np.bool_)
        columns: list[tuple[slice, NDArray[Any]]] = []
        for kind in self._kinds:
            values, ok[:, kind.at] = kind.decode(replies)
            columns.append((kind.at, values))
        times_s = _decode_times(replies, self._times)
        if self._objects.start < self._objects.stop:
            shape = (len(replies), self._objects.stop - self._objects.start)
            columns.append((self._objects, np.full(shape, None, np.object_)))
            ok[:, self._objects] = False
        if ok.all():
            return DecodedGroup(columns, None, times_s)
        statuses = np.full(ok.shape, FeatureStatus.PRESENT, np.uint8)
        for row, feature in np.argwhere(~ok).tolist():
            raw = replies[row][self._cells[feature]]
            value = self._decode_one(feature, raw) if raw else None
            if raw is None:  # text and lists are not joined: this is the first to see that
                statuses[row, feature] = FeatureStatus.NOT_FOUND
            elif value is None:
                statuses[row, feature] = FeatureStatus.NULL_VALUE
            else:
                at, values = next(entry for entry in columns if entry[0].stop > feature)
                values[row, feature - at.start] = value
        return DecodedGroup(columns, statuses, times_s)

    def _decode_with_gaps(self, replies: Sequence[_Reply]) -> DecodedGroup:
        for reply in replies:
            for cell in reply:
                if cell is not None and type(cell) is not bytes:
                    raise UnexpectedReplyError(_shown(cell))
        absent = np.array([[cell is None for cell in reply] for reply in replies])
        decoded = self._decode_replies([[cell or b"" for cell in reply] for reply in replies])
        assert decoded.statuses is not None or not absent[:, self._cells].any()
        if decoded.statuses is not None:
            decoded.statuses[absent[:, self._cells]] = FeatureStatus.NOT_FOUND
        decoded.event_times_s[absent[:, self._times]] = np.nan
        return decoded

    def _decode_one(self, feature: int, raw: bytes) -> Any:
        try:
            return decode_value(raw, self._features[feature].value_type)
        except ValueMismatchError as error:
            self._on_mismatch(self._features[feature], str(error))
            return None

    def _learn(self, replies: Sequence[_Reply]) -> None:
        """Remember the replies' layout, if they share one."""
        if len(self._layouts) >= MAX_LAYOUTS or self._objects.start < self._objects.stop:
            return
        parts, *others = [[part for part in reply if part is not None] for reply in replies]
        lengths = list(map(len, parts))
        if not all(list(map(len, other)) == lengths for other in others):
            return
        places = list(range(self._width))
        if self._is_whole:
            if any(other[::2] != parts[::2] for other in others):
                return
            # None of them is None: every cell was found.
            places = [at for at in self._places_in(parts) if at is not None]
        if all(_is_usual_time(parts[at]) for at in places[self._times]):
            names = range(0, len(parts), 2) if self._is_whole else ()
            layout = _Layout(self._kinds, parts, places, names)
            self._layouts[layout.length] = layout


@dataclass(frozen=True, slots=True)
class _Kind:
    """Neighbouring features of one scalar type: `at` are their places in the group."""

    value_type: ValueType
    at: slice

    @property
    def count(self) -> int:
        return int(self.at.stop - self.at.start)

    def decode(self, replies: Sequence[_Reply]) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        """
        Decode this kind's cells of every reply.

        Returns:
            Values and whether each was as expected; where it was not the value is a filler.

        Raises:
            TypeError: a cell is nil.
        """
        cells: Any = chain.from_iterable(map(itemgetter(self.at), replies))
        shape = (len(replies), self.count)
        width = _WIDTHS.get(self.value_type)
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


def _kinds(features: Sequence[PlannedFeature]) -> list[_Kind]:
    kinds = []
    for value_type in dict.fromkeys(feature.value_type for feature in features):
        own = [i for i, feature in enumerate(features) if feature.value_type is value_type]
        kinds.append(_Kind(value_type, slice(own[0], own[-1] + 1)))
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
    return _sum(block[..., 1:]), ok


def _ends_at(block: NDArray[np.uint8], sizes: Any) -> NDArray[np.bool_]:
    """Say of which varints exactly the first `sizes` bytes are theirs, and within 64 bits."""
    width = block.shape[-1]
    continued = _VARINT_RANGE[:width] < np.asarray(sizes)[..., None] - 1
    ok: NDArray[np.bool_] = ((block >= 0x80) == continued).all(-1) & (sizes <= width)
    return ok & (block[..., -1] <= 1) if width == MAX_VARINT_BYTES else ok


def _sum(block: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Add up varints padded with zeros; the last axis is one varint's bytes."""
    width = block.shape[-1]
    if width <= len(_EXACT_WEIGHTS):
        exact: NDArray[np.float64] = (block & 0x7F) @ _EXACT_WEIGHTS[:width]
        return exact.astype(np.int64)
    digits = (block & 0x7F).astype(np.uint64)
    total: NDArray[np.uint64] = digits @ _WEIGHTS[:width]
    return total.view(np.int64)


def _decode_times(replies: Sequence[_Reply], at: slice) -> NDArray[np.float64]:
    """
    Decode the event times of every reply; NaN where one is damaged.

    Raises:
        TypeError: a cell is nil.
    """
    cells: list[Any] = list(chain.from_iterable(map(itemgetter(at), replies)))
    shape = (len(replies), at.stop - at.start)
    sizes = np.fromiter(map(len, cells), np.intp, len(cells)).reshape(shape)
    block = np.array(cells, f"S{_TIME_WIDTH}").view(np.uint8).reshape(*shape, _TIME_WIDTH)
    usual = (block[..., 0] == _SECONDS_TAG) & _ends_at(block[..., 1:6], _SECONDS_BYTES)
    nanos = block[..., _NANOS_AT:]
    has_nanos = (block[..., 6] == _NANOS_TAG) & _ends_at(nanos, sizes - _NANOS_AT)
    usual &= (sizes == 6) | ((sizes > _NANOS_AT) & has_nanos)
    times_s = _sum(block[..., 1:6]) + _sum(nanos) * 1e-9
    if not usual.all():
        for row, i in np.argwhere(~usual).tolist():
            try:
                times_s[row, i] = decode_time(cells[row * shape[1] + i])
            except ValueMismatchError:
                times_s[row, i] = np.nan
    return times_s


def _is_usual_time(cell: bytes) -> bool:
    """Say whether a time is as `_decode_times` has them; what is odd has no layout to learn."""
    return (
        len(cell) >= 6
        and cell[0] == _SECONDS_TAG
        and _is_varint(cell[1:6])
        and (
            len(cell) == 6
            or (
                _NANOS_AT < len(cell) <= _TIME_WIDTH
                and cell[6] == _NANOS_TAG
                and _is_varint(cell[_NANOS_AT:])
            )
        )
    )


def _is_varint(cell: bytes) -> bool:
    return all(byte >= 0x80 for byte in cell[:-1]) and cell[-1] < 0x80


class _Layout:
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
        kinds: Sequence[_Kind],
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
        self._mask = np.frombuffer(bytes(mask), np.uint8)
        self._row = np.frombuffer(bytes(row), np.uint8) & self._mask
        self._kinds = kinds
        self._sizes = [len(parts[place]) for place in places]
        # Where a kind's cells lie evenly they are a strided view, elsewhere they are gathered.
        self._gathered = {
            kind.at.start: _places(
                [start + 1 for start in self._starts[kind.at]], _WIDTHS[kind.value_type] - 1
            )
            for kind in kinds
            if kind.value_type in _WIDTHS and not _is_even(self._starts[kind.at])
        }
        first_time = kinds[-1].at.stop if kinds else 0
        starts, sizes = self._starts[first_time:], self._sizes[first_time:]
        self._seconds_at = _places([start + 1 for start in starts], _SECONDS_BYTES)
        nanos_sizes = [max(0, size - _NANOS_AT) for size in sizes]
        width = max(nanos_sizes, default=0)
        self._nanos_at = _places([start + _NANOS_AT for start in starts], width)
        self._nanos_at = np.minimum(self._nanos_at, self.length - 1)
        self._nanos_weights = np.zeros((len(starts), width))
        for weights, size in zip(self._nanos_weights, nanos_sizes, strict=True):
            weights[:size] = _EXACT_WEIGHTS[:size]

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
        times_s = (block[:, self._seconds_at] & 0x7F) @ _EXACT_WEIGHTS[:_SECONDS_BYTES]
        if self._nanos_at.size:
            # Those of every view at once; where one has fewer bytes, their weight is nothing.
            digits = block[:, self._nanos_at] & 0x7F
            times_s += np.einsum("rvd,vd->rv", digits, self._nanos_weights) * 1e-9
        return DecodedGroup(columns, None, times_s)

    def _values(self, kind: _Kind, data: bytes, block: NDArray[np.uint8]) -> NDArray[Any] | None:
        first, shape = self._starts[kind.at.start] + 1, (len(block), kind.count)
        dtype = kind.value_type.dtype
        gathered = self._gathered.get(kind.at.start)
        if gathered is not None:
            little = dtype.newbyteorder("<")
            cells: NDArray[Any] = np.take(block, gathered.ravel(), 1).view(little).reshape(shape)
            return cells
        if kind.value_type in _WIDTHS:
            following = kind.at.start + (kind.count > 1)
            stride = self._starts[following] - self._starts[kind.at.start]
            strides = (self.length, stride)
            return np.ndarray(shape, dtype.newbyteorder("<"), data, first, strides)
        values = np.empty(shape, np.int64)
        for i in range(kind.count):
            start, size = self._starts[kind.at.start + i], self._sizes[kind.at.start + i]
            values[:, i] = _sum(block[:, start + 1 : start + size])
        narrow = values.astype(dtype, copy=False)
        return narrow if (narrow == values).all() else None


def _is_even(starts: Sequence[int]) -> bool:
    return len({after - before for before, after in pairwise(starts)}) <= 1


def _places(starts: Sequence[int], width: int) -> NDArray[np.intp]:
    """Return the places of `width` bytes from each start, shape (starts, width)."""
    return np.array(starts, np.intp)[:, None] + np.arange(width)


def _fixed_bits(kind: _Kind | None, cell: bytes) -> bytes:
    """Return the bits of a cell that its layout fixes: tags, and where varints end."""
    if kind is None:
        nanos = b"\xff" + _varint_bits(len(cell) - _NANOS_AT) if len(cell) > _NANOS_AT else b""
        return b"\xff" + _varint_bits(_SECONDS_BYTES) + nanos
    if kind.value_type is ValueType.BOOL:
        return b"\xff\xfe"
    if kind.value_type in _WIDTHS:
        return b"\xff" + bytes(len(cell) - 1)
    return b"\xff" + _varint_bits(len(cell) - 1)


def _varint_bits(size: int) -> bytes:
    # Of the tenth byte only the lowest bit is within 64.
    return b"\x80" * size if size < MAX_VARINT_BYTES else b"\x80" * (size - 1) + b"\xfe"


def _shown(reply: Any) -> str:
    if isinstance(reply, hiredis.ReplyError):
        return error_word(reply)
    return f"a {type(reply).__name__} where an array is due"


_NOT_ENOUGH = object()
