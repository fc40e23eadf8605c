"""A layout says what decoding cell by cell says, wherever the cells are, and takes nothing else."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.features.cell_kinds import CellKind
from headrace.features.reply_layout import ReplyLayout
from headrace.features.values import TAGS, ValueType, decode_time, decode_value

SCALARS = [ValueType.FLOAT, ValueType.DOUBLE, ValueType.BOOL, ValueType.INT64]
PAYLOAD_BYTES = {ValueType.FLOAT: 4, ValueType.DOUBLE: 8}


def varint(rng, size):
    """A varint of exactly `size` bytes."""
    parts = rng.integers(0, 128, size, np.uint8)
    parts[:-1] |= 0x80
    parts[-1] |= size > 1  # a last byte of nothing is one too many
    return parts.tobytes()


def cell(rng, value_type, size):
    tag = bytes([TAGS[value_type]])
    if value_type is ValueType.BOOL:
        return tag + bytes([rng.integers(0, 2)])
    if value_type in PAYLOAD_BYTES:
        return tag + np.array(rng.standard_normal(), value_type.dtype).tobytes()
    return tag + varint(rng, size)


def time_cell(rng, nanos_size):
    nanos = b"\x10" + varint(rng, nanos_size) if nanos_size else b""
    return b"\x08" + varint(rng, 5) + nanos


def resp(parts):
    return b"*%d\r\n" % len(parts) + b"".join([b"$%d\r\n%b\r\n" % (len(p), p) for p in parts])


@st.composite
def shapes(draw):
    """Sorted scalar types with their varints' sizes, sizes of nanoseconds, and where they go."""
    counts = [draw(st.integers(0, 7)) for _ in SCALARS]
    types = [t for t, count in zip(SCALARS, counts, strict=True) for _ in range(count)]
    sizes = [draw(st.integers(1, 9)) for _ in types]
    nanos = draw(st.lists(st.integers(0, 5), min_size=1, max_size=3))
    cells = len(types) + len(nanos)
    order = draw(st.permutations(range(cells)) | st.just(list(range(cells))))
    return types, sizes, nanos, order


def kinds_of(types):
    kinds = []
    for value_type in dict.fromkeys(types):
        first = types.index(value_type)
        kinds.append(CellKind(value_type, slice(first, first + types.count(value_type))))
    return kinds


def made(shape, rows, seed):
    """Random replies to HGETALL of that shape: their layout, their bytes and their cells."""
    types, sizes, nanos, order = shape
    rng = np.random.default_rng(seed)
    cells = [
        [cell(rng, t, size) for t, size in zip(types, sizes, strict=True)]
        + [time_cell(rng, size) for size in nanos]
        for _ in range(rows)
    ]
    replies = [[p for i in order for p in (b"%04d" % i, row[i])] for row in cells]
    places = [2 * order.index(i) + 1 for i in range(len(order))]
    names = range(0, 2 * len(order), 2)
    layout = ReplyLayout(kinds_of(types), replies[0], places, names)
    return layout, b"".join(map(resp, replies)), cells


@settings(deadline=None)
@given(shapes(), st.integers(1, 5), st.integers(0, 2**32))
def test_a_layout_finds_what_decoding_cell_by_cell_finds(shape, rows, seed):
    types, _, nanos, _ = shape
    layout, data, cells = made(shape, rows, seed)

    found = layout.decode(data, rows)

    assert found is not None
    columns, times_s = found
    expected = [[decode_value(c, t) for c, t in zip(row, types, strict=False)] for row in cells]
    got = [
        [value for _, values in columns for value in values[row].tolist()] for row in range(rows)
    ]
    assert got == expected
    assert [values.dtype for _, values in columns] == [t.dtype for t in dict.fromkeys(types)]
    at = [[decode_time(c) for c in row[len(row) - len(nanos) :]] for row in cells]
    np.testing.assert_array_equal(times_s, at)


SIXTEEN = ([ValueType.FLOAT] * 16, [4] * 16, [5, 5], [*range(8), 16, *range(8, 16), 17])


@pytest.mark.parametrize("row", [0, 41, 120, 199])
@pytest.mark.parametrize("what", [b"*36", b"$4\r\n0008", b"0016", b"\x35", b"\r\n"])
def test_one_wrong_byte_in_any_row_of_many_is_noticed(row, what):
    rows = 200
    layout, data, _ = made(SIXTEEN, rows, seed=7)
    assert len(data) == rows * layout.length > 2 * 32_768  # compared in several pieces
    assert layout.decode(data, rows) is not None
    wrong = bytearray(data)
    wrong[data.index(what, row * layout.length)] ^= 0x01

    assert layout.decode(bytes(wrong), rows) is None


def test_many_layouts_hold_little_more_than_a_row_each():
    count = 500
    shapes = [
        ([ValueType.INT64] * 8, [1 + i // 9**n % 9 for n in range(8)], [5], [*range(9)])
        for i in range(count)
    ]
    made(shapes[0], 2, seed=1)
    tracemalloc.start()
    try:
        layouts = []
        for seed, shape in enumerate(shapes):
            layout, data, _ = made(shape, 2, seed)
            assert layout.decode(data, 2) is not None
            layouts.append(layout)
        held_bytes, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    # Of all of them together 4 MiB are kept for comparing; 64 KiB of each would be 31 MiB.
    assert held_bytes < (5 << 20) + count * 8_000


@pytest.mark.parametrize("rows", [1, 2])
def test_one_wrong_byte_in_the_only_row_or_two_is_noticed(rows):
    layout, data, _ = made(SIXTEEN, rows, seed=7)
    wrong = bytearray(data)
    wrong[-1] ^= 0x01

    assert layout.decode(data, rows) is not None
    assert layout.decode(bytes(wrong), rows) is None
