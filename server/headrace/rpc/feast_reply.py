"""`feast.serving.GetOnlineFeaturesResponse`, written a batch at a time.

Feast's reply has a message per value and one per event time: for 100 entities and 50 features ten
thousand of them. Here a batch's values become bytes all at once, per dtype, and a reply is cut out
of them; one-row replies, of which a batch may have hundreds, are filled into a template.

Source: feast 0.67 `ServingService.proto` and `Value.proto`; Protocol Buffers, "Encoding".
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from headrace.feature_reads import FeatureRead
from headrace.features.plan import FeaturePlan, FeatureStatus
from headrace.features.store import FeatureRows
from headrace.features.values import MAX_VARINT_BYTES, TAGS, ValueType, encode_message
from headrace.wire import LENGTH_DELIMITED, delimited, varint

_METADATA, _RESULTS = b"\x0a", b"\x12"  # of the reply
_VALUES, _STATUSES, _EVENT_TIMES = b"\x0a", b"\x12", b"\x1a"  # of a FeatureVector
_FEATURE_NAMES, _VIEW_METADATA = b"\x0a", b"\x12"  # of the metadata
_NO_TIME = _EVENT_TIMES + b"\0"
_SECONDS_TAG, _NANOS_TAG = 0x08, 0x10
_SECONDS, _NANOS = bytes((_SECONDS_TAG,)), bytes((_NANOS_TAG,))
_U64_MASK = (1 << 64) - 1
_SECONDS_BYTES_MAX, _NANOS_BYTES_MAX = 10, 5
_TIME_WIDTH = 2 + 1 + _SECONDS_BYTES_MAX + 1 + _NANOS_BYTES_MAX
_PRESENT = b"\x01"
FEW_TIMES = 32
"""
Different event times up to which encoding them one by one costs less than numpy does. Rows that
were written together have the same.
"""

TEMPLATES_MAX = 8
"""Per plan: event times differ in length where some have fractions of a second."""


class _Cells(NamedTuple):
    """Encoded messages of k columns and n rows: that of column j, row r is at offset j n + r."""

    data: bytes
    offsets: list[int]


class FeastReplyPlan:
    """
    What replies with one plan have in common. It does not keep the plan alive.

    Args:
        plan: The plan.
        as_feast: Whether to say what Feast itself would: every status is PRESENT, and a value that
            is too old is a value.
    """

    def __init__(self, plan: FeaturePlan, *, as_feast: bool) -> None:
        self.as_feast = as_feast
        self.value_types = [feature.value_type for feature in plan.features]
        names = [key.name for key in plan.join_keys] + [feature.name for feature in plan.features]
        listed = b"".join(delimited(b"\x0a", name.encode()) for name in names)
        self.metadata = delimited(_FEATURE_NAMES, listed)
        self.view_metadata = b"".join(
            delimited(
                _VIEW_METADATA,
                delimited(b"\x0a", name.encode()) + (b"\x10" + varint(number) if number else b""),
            )
            for name, number in _versions(plan).items()
        )
        self.dtypes = list(plan.block_widths)
        places = {dtype: i for i, dtype in enumerate(self.dtypes)}
        self.places = [
            (places[dtype], column, plan.features[i].view_index)
            for i, (dtype, column) in enumerate(plan.block_columns)
        ]
        self.of_dtype = [
            [i for i, (own, _) in enumerate(plan.block_columns) if own == dtype]
            for dtype in self.dtypes
        ]
        self.templates: dict[tuple[int, ...], _Template] = {}
        self.has_template = all(one in _FIXED for one in self.value_types)


class FeastReplies:
    """
    The replies to one batch.

    Args:
        reply_plan: Of the batch's plan.
        read: What was read.
    """

    def __init__(self, reply_plan: FeastReplyPlan, read: FeatureRead) -> None:
        self._plan = reply_plan
        self._rows = read.rows
        self._count = read.rows.statuses.shape[1]
        present = np.uint8(FeatureStatus.PRESENT)
        if reply_plan.as_feast:
            self._empty = (read.rows.statuses != present) & (
                read.rows.statuses != FeatureStatus.OUTSIDE_MAX_AGE
            )
            self._statuses = np.full_like(read.rows.statuses, present).tobytes()
        else:
            # One that is too old has no value: clients that look at no status would use it.
            self._empty = read.rows.statuses != present
            self._statuses = read.rows.statuses.tobytes()
        self._times, self._time_sizes = _encode_times(read.rows.event_times_s)
        self._cells: list[_Cells] | None = None
        self._time_cells: _Cells | None = None
        has_template = reply_plan.has_template and bool(read.singles)
        self._filled = self._fill(read.singles) if has_template else {}

    def message(
        self, start: int, stop: int, entities: Sequence[bytes], *, with_versions: bool
    ) -> bytes:
        """
        Return one caller's reply.

        Args:
            start: Its first row.
            stop: After its last row.
            entities: The values of each join key as a serialized `RepeatedValue`.
            with_versions: Whether to name the views' versions.
        """
        plan, rows = self._plan, stop - start
        names = plan.metadata + plan.view_metadata if with_versions else plan.metadata
        tail = delimited(_STATUSES, _PRESENT * rows) + _NO_TIME * rows
        parts = [delimited(_METADATA, names)]
        parts += [delimited(_RESULTS, values + tail) for values in entities]
        if rows == 1 and (filled := self._filled.get(start)) is not None:
            parts.append(filled)
        else:
            self._append_vectors(parts, start, stop)
        return b"".join(parts)

    def _append_vectors(self, parts: list[bytes], start: int, stop: int) -> None:
        if self._cells is None or self._time_cells is None:
            self._cells = self._encode_cells()
            self._time_cells = _cut(self._times, self._time_sizes)
        count, head = self._count, _STATUSES + varint(stop - start)
        times, time_offsets = self._time_cells
        for i, (group, column, view) in enumerate(self._plan.places):
            data, offsets = self._cells[group]
            at = column * count
            values = data[offsets[at + start] : offsets[at + stop]]
            at = view * count
            own_times = times[time_offsets[at + start] : time_offsets[at + stop]]
            at = i * count
            statuses = self._statuses[at + start : at + stop]
            size = len(values) + len(head) + len(statuses) + len(own_times)
            parts += (_RESULTS, varint(size), values, head, statuses, own_times)

    def _encode_cells(self) -> list[_Cells]:
        plan = self._plan
        cells = []
        for dtype, features in zip(plan.dtypes, plan.of_dtype, strict=True):
            block = self._rows.blocks[dtype].T
            empty = self._empty[features]
            types = [plan.value_types[i] for i in features]
            if dtype == np.object_:
                cells.append(_encode_objects(block, types, empty))
            elif dtype.kind == "f":
                cells.append(_cut(*_encode_fixed(block, types[0], empty)))
            elif dtype.kind == "b":
                cells.append(_cut(*_encode_fixed(block.astype(np.uint8), types[0], empty)))
            else:
                cells.append(_cut(*_encode_integers(block, types, empty)))
        return cells

    def _fill(self, singles: list[int]) -> Mapping[int, bytes]:
        """Return the feature vectors of those rows that fit a template."""
        plan = self._plan
        is_full = ~self._empty[:, singles].any(0)
        sizes = zip(*self._time_sizes[:, singles].tolist(), strict=True)
        by_sizes: dict[tuple[int, ...], list[int]] = {}
        for row, is_row_full, own in zip(singles, is_full.tolist(), sizes, strict=True):
            if is_row_full:
                by_sizes.setdefault(own, []).append(row)
        filled: dict[int, bytes] = {}
        for own, rows in by_sizes.items():
            template = plan.templates.get(own)
            if template is None:
                if len(plan.templates) >= TEMPLATES_MAX:
                    continue
                template = plan.templates[own] = _Template(plan, own)
            filled.update(zip(rows, template.fill(self._rows, self._times, rows), strict=True))
        return filled


class _Template:
    """
    The feature vectors of one row: everything is there, each event time has its usual length.

    Args:
        plan: Of fixed-width values only.
        time_sizes: Bytes of each view's event time, its tag and length included.
    """

    def __init__(self, plan: FeastReplyPlan, time_sizes: tuple[int, ...]) -> None:
        template = bytearray()
        # Of neighbours alike: (view, first event time's place, from one to the next, how many).
        self._runs: list[tuple[int, int, int, int]] = []
        self._time_sizes = time_sizes
        columns: list[list[tuple[int, int]]] = [[] for _ in plan.dtypes]
        for value_type, (group, column, view) in zip(plan.value_types, plan.places, strict=True):
            tag, width = TAGS[value_type], _FIXED[value_type]
            values = _VALUES + bytes((1 + width, tag)) + bytes(width)
            vector = values + _STATUSES + b"\x01" + _PRESENT
            start = len(template)
            template += _RESULTS + varint(len(vector) + time_sizes[view])
            columns[group].append((column, len(template) + len(values) - width))
            template += vector
            at = len(template)
            template += bytes(time_sizes[view])
            self._add_to_runs(view, at, len(template) - start)
        self._template = np.frombuffer(bytes(template), np.uint8)
        self._targets = [
            (
                dtype,
                np.array([at + i for _, at in sorted(own) for i in range(dtype.itemsize)], np.intp),
            )
            for dtype, own in zip(plan.dtypes, columns, strict=True)
        ]

    def _add_to_runs(self, view: int, at: int, stride: int) -> None:
        if self._runs:
            last, first, own_stride, count = self._runs[-1]
            if last == view and own_stride == stride and at == first + stride * count:
                self._runs[-1] = last, first, own_stride, count + 1
                return
        self._runs.append((view, at, stride, 1))

    def fill(self, rows: FeatureRows, times: NDArray[np.uint8], chosen: list[int]) -> list[bytes]:
        count, length = len(chosen), len(self._template)
        out = np.empty((count, length), np.uint8)
        out[:] = self._template
        for dtype, targets in self._targets:
            block = rows.blocks[dtype][chosen]
            out[:, targets] = block.astype(dtype.newbyteorder("<"), copy=False).view(np.uint8)
        own_times = times[:, chosen]
        for view, start, stride, run in self._runs:
            size = self._time_sizes[view]
            target = np.ndarray((count, run, size), np.uint8, out, start, (length, stride, 1))
            target[:] = own_times[view, :, None, :size]
        data = out.tobytes()
        return [data[at : at + length] for at in range(0, len(data), length)]


def _versions(plan: FeaturePlan) -> dict[str, int]:
    """
    Return versions by the views' names, those of the first where several have one name.

    Source: feast 0.67 `utils._populate_response_from_feature_data`; on-demand views are not told.
    """
    computed = {plan.features[i].view_index for one in plan.computed for i in one.features}
    versions: dict[str, int] = {}
    for i, view in enumerate(plan.views):
        if i not in computed:
            versions.setdefault(view.label.rpartition("@")[0] or view.label, view.version)
    return versions


def _cut(frames: NDArray[np.uint8], sizes: NDArray[np.intp]) -> _Cells:
    """Keep the first `sizes` bytes of each frame, all in a row."""
    width = frames.shape[-1]
    offsets = np.zeros(sizes.size + 1, np.intp)
    np.cumsum(sizes, out=offsets[1:])
    if offsets[-1] == frames.size:
        return _Cells(frames.tobytes(), offsets.tolist())
    kept = frames[np.arange(width) < sizes[..., None]]
    return _Cells(kept.tobytes(), offsets.tolist())


def _encode_fixed(
    block: NDArray[Any], value_type: ValueType, empty: NDArray[np.bool_]
) -> tuple[NDArray[np.uint8], NDArray[np.intp]]:
    width = block.dtype.itemsize
    frames = np.empty((*block.shape, 3 + width), np.uint8)
    frames[..., 0] = _VALUES[0]
    frames[..., 1] = 1 + width
    frames[..., 2] = TAGS[value_type]
    little = np.ascontiguousarray(block, block.dtype.newbyteorder("<"))
    frames[..., 3:] = little.view(np.uint8).reshape(*block.shape, width)
    sizes = np.full(block.shape, 3 + width, np.intp)
    if empty.any():
        frames[empty, 1] = 0
        sizes[empty] = 2
    return frames, sizes


def _encode_integers(
    block: NDArray[Any], types: Sequence[ValueType], empty: NDArray[np.bool_]
) -> tuple[NDArray[np.uint8], NDArray[np.intp]]:
    digits, lengths = _varints(block.astype(np.int64))
    frames = np.empty((*block.shape, 3 + MAX_VARINT_BYTES), np.uint8)
    frames[..., 0] = _VALUES[0]
    frames[..., 1] = 1 + lengths
    frames[..., 2] = np.array([TAGS[one] for one in types], np.uint8)[:, None]
    frames[..., 3:] = digits
    sizes = 3 + lengths
    if empty.any():
        frames[empty, 1] = 0
        sizes[empty] = 2
    return frames, sizes


def _encode_objects(
    block: NDArray[Any], types: Sequence[ValueType], empty: NDArray[np.bool_]
) -> _Cells:
    cells: list[bytes] = []
    for column, value_type, missing in zip(block.tolist(), types, empty.tolist(), strict=True):
        encode = _encode_text if value_type in TAGS else encode_message
        cells += [
            b"\x0a\0" if is_missing else delimited(_VALUES, encode(value, value_type))
            for value, is_missing in zip(column, missing, strict=True)
        ]
    offsets = [0]
    for cell in cells:
        offsets.append(offsets[-1] + len(cell))
    return _Cells(b"".join(cells), offsets)


def _encode_text(value: Any, value_type: ValueType) -> bytes:
    return delimited(
        bytes((TAGS[value_type],)), value if isinstance(value, bytes) else value.encode()
    )


def _encode_times(
    times_s: NDArray[np.float64],
) -> tuple[NDArray[np.uint8], NDArray[np.intp]]:
    """
    Encode event times as elements of `event_timestamps`: to the microsecond, empty where unknown.

    Returns:
        Frames of shape (views, n, `_TIME_WIDTH`) and the bytes used of each.
    """
    listed = times_s.ravel().tolist()
    distinct = set(listed)
    if len(distinct) <= FEW_TIMES:
        return _encode_few_times(listed, distinct, times_s.shape)
    known = np.isfinite(times_s)
    micros = np.where(known, np.rint(times_s * 1e6), 0).astype(np.int64)
    seconds, fractions = np.divmod(micros, 1_000_000)
    frames = np.zeros((*times_s.shape, _TIME_WIDTH), np.uint8)
    frames[..., 0] = _EVENT_TIMES[0]
    digits, lengths = _varints(seconds)
    lengths[seconds == 0] = 0
    frames[..., 2] = _SECONDS_TAG
    frames[..., 3 : 3 + MAX_VARINT_BYTES] = digits
    sizes = 2 + lengths + (lengths > 0)
    if fractions.any():
        digits, lengths = _varints(fractions * 1000)
        lengths[fractions == 0] = 0
        digits = digits[..., :_NANOS_BYTES_MAX]
        where = np.argwhere(fractions)
        at = sizes[fractions != 0]
        frames[where[:, 0], where[:, 1], at] = _NANOS_TAG
        for i in range(_NANOS_BYTES_MAX):
            frames[where[:, 0], where[:, 1], at + 1 + i] = digits[where[:, 0], where[:, 1], i]
        sizes = sizes + lengths + (lengths > 0)
    frames[..., 1] = sizes - 2
    return frames, sizes


def _encode_few_times(
    listed: list[float], distinct: set[float], shape: tuple[int, ...]
) -> tuple[NDArray[np.uint8], NDArray[np.intp]]:
    """As `_encode_times`, of times of which few differ."""
    places = {time_s: place for place, time_s in enumerate(distinct)}
    cells = [_encode_time(time_s) for time_s in distinct]
    frames = np.array(cells, f"S{_TIME_WIDTH}").view(np.uint8).reshape(-1, _TIME_WIDTH)
    sizes = np.array([len(cell) for cell in cells], np.intp)
    which = np.array([places[time_s] for time_s in listed], np.intp).reshape(shape)
    return frames[which], sizes[which]


def _encode_time(time_s: float) -> bytes:
    parts = b""
    if math.isfinite(time_s):
        seconds, micros = divmod(round(time_s * 1e6), 1_000_000)
        if seconds:
            parts += _SECONDS + varint(seconds & _U64_MASK)
        if micros:
            parts += _NANOS + varint(micros * 1000)
    return delimited(_EVENT_TIMES, parts)


def _varints(values: NDArray[np.int64]) -> tuple[NDArray[np.uint8], NDArray[np.intp]]:
    """Encode varints: shape (…, 10), and how many of the ten bytes each has."""
    unsigned = np.ascontiguousarray(values).view(np.uint64)
    groups = unsigned[..., None] >> _SHIFTS
    lengths = np.maximum((groups != 0).sum(-1), 1)
    digits = (groups & np.uint64(0x7F)).astype(np.uint8)
    digits |= np.where(lengths[..., None] - 1 > _PLACES, np.uint8(0x80), np.uint8(0))
    return digits, lengths


_SHIFTS = np.arange(MAX_VARINT_BYTES, dtype=np.uint64) * np.uint64(7)
_PLACES = np.arange(MAX_VARINT_BYTES)
_FIXED = {ValueType.FLOAT: 4, ValueType.DOUBLE: 8, ValueType.BOOL: 1}
assert all(tag & 7 == LENGTH_DELIMITED for tag in (_RESULTS[0], _VALUES[0], _EVENT_TIMES[0]))
