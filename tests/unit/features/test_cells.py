"""Decoding replies: both ways agree with decoding cell by cell, whatever the store holds."""

import struct
from time import process_time

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headrace.features.cells import MAX_LAYOUTS, GroupDecoder, UnexpectedReplyError
from headrace.features.plan import FeatureSource, FeatureStatus, ViewSource, compile_plan
from headrace.features.values import TAGS, ValueType, decode_time

PRESENT, NULL, NOT_FOUND, _ = FeatureStatus
KEY = (("key", "key", ValueType.INT64),)
NULL_VAL = b"\x98\x01\x00"


def varint(number):
    number &= 2**64 - 1
    parts = bytearray()
    while number >= 0x80:
        parts.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*parts, number])


def stored(value, value_type):
    """Encode a value as Feast does."""
    if value is None:
        return b""
    tag = bytes([TAGS[value_type]])
    if value_type is ValueType.FLOAT:
        return tag + struct.pack("<f", value)
    if value_type is ValueType.DOUBLE:
        return tag + struct.pack("<d", value)
    if value_type in {ValueType.STRING, ValueType.BYTES}:
        text = value.encode() if isinstance(value, str) else value
        return tag + varint(len(text)) + text
    return tag + varint(int(value))


def stored_time(seconds, nanos=0):
    return (b"\x08" + varint(seconds) if seconds else b"") + (
        b"\x10" + varint(nanos) if nanos else b""
    )


def resp(replies):
    parts = []
    for reply in replies:
        parts.append(b"*%d\r\n" % len(reply))
        parts += [b"$-1\r\n" if c is None else b"$%d\r\n%b\r\n" % (len(c), c) for c in reply]
    return b"".join(parts)


def whole_hash(decoder_fields, reply, extra, order):
    """The reply to HGETALL where `reply` is that to HMGET; `order` shuffles the fields."""
    pairs = [*zip(decoder_fields, reply, strict=True), *extra]
    pairs = [pair for pair in pairs if pair[1] is not None]
    order.shuffle(pairs)
    return [part for pair in pairs for part in pair]


def decoder_of(*types, on_mismatch=None, is_whole=False):
    """A decoder of one view with features f0, f1, … given in the group's own order of kinds."""
    features = tuple(FeatureSource(f"f{i}", value_type) for i, value_type in enumerate(types))
    plan = compile_plan("service", "demo", "1", [ViewSource("v", KEY, features)])
    assert [plan.features[i].value_type for i in plan.groups[0].features] == list(types)

    def refuse(feature, reason):
        raise AssertionError((feature, reason))

    return GroupDecoder(plan, plan.groups[0], on_mismatch or refuse, is_whole=is_whole)


def decoded_rows(decoded, rows, count):
    values = [[None] * count for _ in range(rows)]
    for at, column in decoded.columns:
        for row in range(rows):
            values[row][at] = column[row].tolist()
    if decoded.statuses is None:
        return values, [[PRESENT] * count] * rows
    return values, decoded.statuses.tolist()


VALUES = {
    ValueType.FLOAT: st.floats(width=32, allow_nan=False),
    ValueType.DOUBLE: st.floats(allow_nan=False),
    ValueType.BOOL: st.booleans(),
    ValueType.INT32: st.integers(-(2**31), 2**31 - 1) | st.integers(0, 300),
    ValueType.INT64: st.integers(-(2**63), 2**63 - 1) | st.integers(0, 300),
    ValueType.UNIX_TIMESTAMP: st.integers(0, 2**40),
    ValueType.STRING: st.text(max_size=12),
    ValueType.BYTES: st.binary(max_size=12),
}
ORDER = list(VALUES)
TIMES = st.tuples(
    st.integers(2**28, 2**34) | st.integers(-(2**40), 2**40),
    st.just(0) | st.integers(0, 999_999_999),
)


@st.composite
def batches(draw):
    types = sorted(draw(st.lists(st.sampled_from(ORDER), min_size=1, max_size=6)), key=ORDER.index)
    row = st.tuples(*(st.none() | st.just(NULL_VAL) | VALUES[t] for t in types))
    full = st.tuples(*(VALUES[t] for t in types))
    rows = draw(st.lists(full, min_size=1, max_size=5) | st.lists(row, min_size=1, max_size=5))
    times = draw(st.lists(st.none() | TIMES, min_size=len(rows), max_size=len(rows)))
    absent = draw(st.sets(st.integers(0, len(rows) - 1)) | st.just(set()))
    return types, rows, times, absent


@settings(suppress_health_check=[HealthCheck.too_slow])  # a busy machine is no fault of it
@given(batches(), st.integers(1, 3))
def test_what_was_stored_is_what_is_decoded_at_first_and_again(batch, repeats):
    types, rows, times, absent = batch
    scalars = sum(t not in {ValueType.STRING, ValueType.BYTES} for t in types)
    fillers = {"f": np.nan, "i": 0, "b": False, "O": None}
    replies, expected, statuses, times_s = [], [], [], []
    for i, (row, time) in enumerate(zip(rows, times, strict=True)):
        if i in absent:
            replies.append([None] * (len(types) + 1))
            statuses.append([NOT_FOUND] * len(types))
            expected.append([fillers[t.dtype.kind] for t in types])
            times_s.append(np.nan)
            continue
        cells = [c if c == NULL_VAL else stored(c, t) for c, t in zip(row, types, strict=True)]
        at = None if time is None else stored_time(*time)
        replies.append([*cells[:scalars], at, *cells[scalars:]])
        is_null = [value is None or value == NULL_VAL for value in row]
        statuses.append([NULL if null else PRESENT for null in is_null])
        expected.append(
            [
                fillers[t.dtype.kind] if null else value
                for value, null, t in zip(row, is_null, types, strict=True)
            ]
        )
        times_s.append(np.nan if at is None else decode_time(at))
    decoder, data = decoder_of(*types), resp(replies)
    for _ in range(repeats):
        decoded = decoder.decode(data, len(rows))
        got, got_statuses = decoded_rows(decoded, len(rows), len(types))
        assert got_statuses == statuses
        np.testing.assert_equal(got, expected)  # NaN equals NaN here
        np.testing.assert_array_equal(decoded.event_times_s[:, 0], times_s)


def reply(rating, trips=7, seconds=1_700_000_000, nanos=0):
    return [
        stored(rating, ValueType.FLOAT),
        stored(trips, ValueType.INT64),
        stored_time(seconds, nanos),
    ]


@given(
    batches(),
    st.randoms(use_true_random=False),
    st.dictionaries(st.binary(min_size=5, max_size=7), st.binary(max_size=9), max_size=3),
)
def test_whole_hashes_say_what_their_fields_do(batch, order, extra):
    types, rows, times, absent = batch
    scalars = sum(t not in {ValueType.STRING, ValueType.BYTES} for t in types)
    replies = []
    for i, (row, time) in enumerate(zip(rows, times, strict=True)):
        cells = [c if c == NULL_VAL else stored(c, t) for c, t in zip(row, types, strict=True)]
        at = None if time is None else stored_time(*time)
        reply = [*cells[:scalars], at, *cells[scalars:]]
        replies.append([None] * len(reply) if i in absent else reply)
    by_fields, by_hashes = decoder_of(*types), decoder_of(*types, is_whole=True)
    (group,) = compile_plan(
        "service",
        "demo",
        "1",
        [ViewSource("v", KEY, tuple(FeatureSource(f"f{i}", t) for i, t in enumerate(types)))],
    ).groups
    wholes = [
        [] if i in absent else whole_hash(group.fields, reply, extra.items(), order)
        for i, reply in enumerate(replies)
    ]
    expected = by_fields.decode(resp(replies), len(rows))
    for _ in range(2):  # once parsed, once by the layout that was learned
        decoded = by_hashes.decode(resp(wholes), len(rows))
        got, wanted = (decoded_rows(one, len(rows), len(types)) for one in (decoded, expected))
        np.testing.assert_equal(got, wanted)
        np.testing.assert_array_equal(decoded.event_times_s, expected.event_times_s)


def test_a_whole_hash_of_a_known_layout_is_decoded_without_parsing(monkeypatch):
    decoder = decoder_of(*[ValueType.FLOAT] * 3, is_whole=True)
    fields = (
        compile_plan(
            "service",
            "demo",
            "1",
            [
                ViewSource(
                    "v", KEY, tuple(FeatureSource(f"f{i}", ValueType.FLOAT) for i in range(3))
                )
            ],
        )
        .groups[0]
        .fields
    )

    def row(values):
        cells = dict(zip(fields[:3], [stored(v, ValueType.FLOAT) for v in values], strict=True))
        at = stored_time(1_700_000_000)
        # Another view's time is between them, and a value of its own that varies.
        other = struct.pack("<d", values[0])
        pairs = [
            (fields[2], cells[fields[2]]),
            (fields[3], at),
            (fields[0], cells[fields[0]]),
            (b"other", other),
            (fields[1], cells[fields[1]]),
        ]
        return [part for pair in pairs for part in pair]

    decoder.decode(resp([row([1, 2, 3])]), 1)
    monkeypatch.setattr(decoder, "_parse", None)
    decoded = decoder.decode(resp([row([4, 5, 6]), row([7, 8, 9])]), 2)

    ((_, values),) = decoded.columns
    assert values.tolist() == [[4, 5, 6], [7, 8, 9]]
    assert decoded.event_times_s.tolist() == [[1.7e9], [1.7e9]]


def test_a_reply_of_an_odd_number_of_parts_is_no_hash():
    with pytest.raises(UnexpectedReplyError):
        decoder_of(ValueType.FLOAT, is_whole=True).decode(resp([[b"name"]]), 1)


def test_a_layout_once_met_is_decoded_without_parsing(monkeypatch):
    decoder = decoder_of(ValueType.FLOAT, ValueType.INT64)
    decoder.decode(resp([reply(0.5)]), 1)
    monkeypatch.setattr(decoder, "_parse", None)
    decoded = decoder.decode(resp([reply(1.5, 100), reply(-2.0, 0)]), 2)
    assert decoded_rows(decoded, 2, 2)[0] == [[1.5, 100], [-2.0, 0]]


@pytest.mark.parametrize(
    "other",
    [
        pytest.param(reply(None, 2**40), id="a null and a longer integer"),
        pytest.param([stored(3, ValueType.INT64), *reply(0.5)[1:]], id="another type"),
        pytest.param([*reply(0.5)[:2], stored_time(0, 2**28)], id="a time of nanoseconds only"),
    ],
)
def test_replies_of_the_same_length_but_another_layout_are_not_taken_for_it(other):
    mismatches = []
    decoder = decoder_of(
        ValueType.FLOAT, ValueType.INT64, on_mismatch=lambda *args: mismatches.append(args)
    )
    decoder.decode(resp([reply(0.5)]), 1)
    fresh = decoder_of(ValueType.FLOAT, ValueType.INT64, on_mismatch=lambda *args: None)
    data = resp([other])
    first, second = decoder.decode(data, 1), fresh.decode(data, 1)
    np.testing.assert_equal(decoded_rows(first, 1, 2), decoded_rows(second, 1, 2))
    np.testing.assert_array_equal(first.event_times_s, second.event_times_s)


def test_layouts_are_remembered_up_to_a_limit_and_the_rest_still_decodes():
    decoder = decoder_of(ValueType.INT64, ValueType.INT64, ValueType.INT64)
    for size in range(64):
        number = 2**size - 1
        for pair in ((number, 0, 0), (number, number, 0), (number, number, number)):
            cells = [stored(n, ValueType.INT64) for n in pair]
            got = decoder.decode(resp([[*cells, stored_time(1_700_000_000)]]), 1)
            assert decoded_rows(got, 1, 3)[0] == [list(pair)]
    assert len(decoder._layouts) == MAX_LAYOUTS


def test_a_value_of_another_type_is_null_and_reported_with_its_feature():
    seen = []
    decoder = decoder_of(
        ValueType.FLOAT,
        ValueType.INT64,
        on_mismatch=lambda feature, reason: seen.append((feature.name, reason)),
    )
    text = stored("many", ValueType.STRING)
    decoded = decoder.decode(resp([[*reply(0.5)[:1], text, stored_time(1_700_000_000)]]), 1)
    assert decoded_rows(decoded, 1, 2) == ([[0.5, 0]], [[PRESENT, NULL]])
    assert seen == [("f1", "a STRING where INT64 is declared")]


@pytest.mark.parametrize(
    ("raw", "value_type"),
    [
        ("188080808010", ValueType.INT32),
        ("20ffffffffffffffffff02", ValueType.INT64),
        ("20ff", ValueType.INT64),
        ("200700", ValueType.INT64),
        ("3802", ValueType.BOOL),
        ("350000", ValueType.FLOAT),
        ("290000000000000000ff", ValueType.DOUBLE),
    ],
)
def test_a_damaged_value_is_null_and_leaves_its_filler(raw, value_type):
    decoder = decoder_of(value_type, on_mismatch=lambda *_: None)
    data = resp([[bytes.fromhex(raw), stored_time(1_700_000_000)]])
    values, statuses = decoded_rows(decoder.decode(data, 1), 1, 1)
    assert statuses == [[NULL]]
    np.testing.assert_equal(values, [[{"f": np.nan}.get(value_type.dtype.kind, 0)]])


def test_cells_whose_wrong_lengths_add_up_are_not_taken_for_right_ones():
    decoder = decoder_of(ValueType.FLOAT, ValueType.FLOAT, on_mismatch=lambda *_: None)
    four, six = b"\x20\xff\xff\x01", stored("ab55", ValueType.STRING)
    for cells in ([four, six], [six, four], [b"", b"\x12\x08" + b"5" * 8]):
        decoded = decoder.decode(resp([[*cells, stored_time(1_700_000_000)]]), 1)
        assert decoded.statuses.tolist() == [[NULL, NULL]]


def test_an_older_narrower_value_is_read():
    decoder = decoder_of(ValueType.DOUBLE, ValueType.INT64)
    cells = [stored(0.5, ValueType.FLOAT), stored(-3, ValueType.INT32), stored_time(1_700_000_000)]
    assert decoded_rows(decoder.decode(resp([cells]), 1), 1, 2) == (
        [[0.5, -3]],
        [[PRESENT, PRESENT]],
    )


@pytest.mark.parametrize(
    "data",
    [
        b"-ERR no\r\n",
        b"+OK\r\n",
        resp([reply(0.5)[:2]]),
        resp([reply(0.5)]) * 2,
        resp([reply(0.5)])[:-3],
        resp([reply(0.5)]) + b"x",
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        b"",
    ],
    ids=["error", "status", "too narrow", "too many", "cut", "trailing", "HTTP", "nothing"],
)
def test_anything_but_one_reply_per_entity_is_an_error(data):
    with pytest.raises(UnexpectedReplyError):
        decoder_of(ValueType.FLOAT, ValueType.INT64).decode(data, 1)


USUAL = b"\x08" + varint(1_700_000_000)
DAMAGED_TIMES = st.one_of(
    st.sampled_from(
        [
            USUAL + b"\x10",
            USUAL + b"\x18\x05",
            USUAL + b"\x10" + b"\x80" * 8 + b"\x01",
            USUAL + b"\x10\x80",
            USUAL[:-1],
            b"",
        ]
    ),
    st.binary(max_size=14),
    st.builds(lambda cut: USUAL + b"\x10" + varint(5_000_000)[:cut], st.integers(0, 4)),
)


@given(st.lists(DAMAGED_TIMES | st.just(USUAL), min_size=1, max_size=4), st.integers(2, 3))
def test_a_damaged_time_is_read_the_same_way_each_time_and_stops_nobody(times, repeats):
    data = resp([[stored(1.5, ValueType.FLOAT), time] for time in times])
    decoder = decoder_of(ValueType.FLOAT)

    first, *later = [decoder.decode(data, len(times)) for _ in range(repeats)]

    for decoded in later:
        np.testing.assert_array_equal(decoded.event_times_s, first.event_times_s)
    values, statuses = decoded_rows(first, len(times), 1)
    assert values == [[1.5]] * len(times)
    assert statuses == [[PRESENT]] * len(times)
    for time, found in zip(times, first.event_times_s[:, 0], strict=True):
        if time == USUAL:
            assert found == 1_700_000_000


def test_a_key_that_is_not_a_hash_costs_only_its_own_row():
    seen = []
    decoder = decoder_of(ValueType.FLOAT, on_mismatch=lambda feature, reason: seen.append(reason))
    row = resp([[stored(1.5, ValueType.FLOAT), USUAL]])
    data = row + b"-WRONGTYPE Operation against a key holding the wrong kind of value\r\n" + row

    values, statuses = decoded_rows(decoder.decode(data, 3), 3, 1)

    assert [values[0], values[2]] == [[1.5]] * 2
    assert statuses == [[PRESENT], [NOT_FOUND], [PRESENT]]
    assert seen == ["its key is not a hash"]


def test_a_batch_twenty_times_as_large_takes_no_longer_per_row():
    """What is read is parsed: no row is of a known layout, and none is moved again and again."""

    def time_per_row_s(rows):
        decoder = decoder_of(ValueType.BYTES)
        missing = [stored_time(1), None]  # the event time comes before text
        row = [stored_time(1), stored(b"x" * 500, ValueType.BYTES)]
        data = resp([missing]) + resp([row]) * (rows - 1)
        began_s = process_time()
        decoded = decoder.decode(data, rows)
        took_s = process_time() - began_s
        assert decoded.statuses[:, 0].tolist() == [NOT_FOUND] + [PRESENT] * (rows - 1)
        return took_s / rows

    few = min(time_per_row_s(500) for _ in range(5))
    many = min(time_per_row_s(10_000) for _ in range(3))
    assert many < 4 * few


@pytest.mark.parametrize("value_type", [ValueType.BYTES, ValueType.INT64])
def test_a_field_that_was_never_written_is_not_found_beside_an_event_time(value_type):
    decoder = decoder_of(value_type)
    cells = [stored_time(1), None] if value_type is ValueType.BYTES else [None, stored_time(1)]
    assert decoder.decode(resp([cells]), 1).statuses.tolist() == [[NOT_FOUND]]
