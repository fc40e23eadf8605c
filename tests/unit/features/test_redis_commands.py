"""Packing a batch's commands: what redis-py would send, each entity once, in bounded parts."""

import hiredis
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from headrace.features import layout
from headrace.features.plan import FeatureSource, ViewSource, compile_plan
from headrace.features.redis_commands import MAX_PART_BYTES, CommandPacker
from headrace.features.values import ValueType

NUMBERS = ("id", "id", ValueType.INT64)
SMALL = ("part", "part", ValueType.INT32)
TEXT = ("name", "name", ValueType.STRING)


def packer_of(*keys):
    source = ViewSource("view", keys, (FeatureSource("feature", ValueType.FLOAT),))
    plan = compile_plan("service", "demo", "1", [source])
    return CommandPacker(plan, plan.groups[0])


def keys_of(packed):
    """The keys of the commands, as any Redis server would read them."""
    reader = hiredis.Reader()
    for part in packed.parts:
        reader.feed(bytes(part))
    keys = []
    while (command := reader.gets()) is not False:
        fields = [layout.feature_field("view", "feature"), b"_ts:view"]
        assert [command[0], *command[2:]] == [b"HMGET", *fields]
        keys.append(command[1])
    return keys


def key(*values):
    """An entity key by the book: names in order, then values in order, then the project."""
    names = layout.key_prefix(sorted(name for name, _, _ in values))
    parts = [
        layout.value_head(value_type, len(raw)) + raw
        for _, value_type, raw in sorted(values, key=lambda value: value[0])
    ]
    return names + b"".join(parts) + b"demo"


def int_key(number):
    return key(("id", ValueType.INT64, int(number).to_bytes(8, "little", signed=True)))


@given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=30))
def test_integer_keys_are_packed_as_they_would_be_one_by_one(numbers):
    packed = packer_of(NUMBERS).pack({"id": np.array(numbers, np.int64)}, len(numbers))
    assert keys_of(packed) == [int_key(number) for number in dict.fromkeys(numbers)]


@given(
    st.lists(
        st.tuples(st.binary(max_size=20), st.integers(0, 3), st.integers(0, 3)),
        min_size=1,
        max_size=20,
    )
)
def test_mixed_keys_are_packed_and_each_row_finds_its_own(rows):
    names, numbers, parts = zip(*rows, strict=True)
    entities = {
        "name": np.array([*names, None], np.object_)[:-1],
        "id": np.array(numbers, np.int64),
        "part": np.array(parts, np.int32),
    }
    packer = packer_of(NUMBERS, TEXT, SMALL)
    packed = packer.pack(entities, len(rows))
    found = keys_of(packed)
    inverse = range(len(rows)) if packed.inverse is None else packed.inverse
    assert len(found) == len(set(rows)) == packed.rows
    assert [found[i] for i in inverse] == [
        key(
            ("name", ValueType.STRING, name),
            ("id", ValueType.INT64, number.to_bytes(8, "little")),
            ("part", ValueType.INT32, part.to_bytes(4, "little")),
        )
        for name, number, part in rows
    ]
    assert [packer.name_of(found[i]) for i in inverse] == packer.keys(entities, len(rows))


@given(st.one_of(st.binary(max_size=60), st.binary(max_size=30).map(lambda end: int_key(5) + end)))
def test_other_keys_are_nobodys(other):
    other = other[:-1] if other == int_key(5) else other
    assert packer_of(NUMBERS).name_of(other) is None


def test_a_negative_id_and_an_entity_less_view_are_named_as_rows_are():
    numbers = packer_of(NUMBERS)
    assert numbers.name_of(int_key(-7)) == -7 == numbers.keys({"id": np.array([-7])}, 1)[0]
    whole = layout.key_prefix([]) + b"demo"
    assert packer_of().name_of(whole) == () == packer_of().keys({}, 1)[0]


def test_one_entity_for_a_whole_batch_is_read_once():
    packed = packer_of(NUMBERS).pack({"id": np.full(200, 7)}, 200)
    assert keys_of(packed) == [int_key(7)]
    assert packed.inverse.tolist() == [0] * 200


def test_a_view_without_entities_is_read_once():
    packed = packer_of().pack({}, 5)
    assert packed.rows == 1
    assert packed.inverse.tolist() == [0] * 5


def test_large_batches_are_cut_into_bounded_parts_of_whole_commands():
    numbers = np.arange(10_000)
    texts = np.array([b"x" * (i % 300) + b"%d" % i for i in range(10_000)], np.object_)
    for keys, entities in (
        ([NUMBERS], {"id": numbers}),
        ([NUMBERS, TEXT], {"id": numbers, "name": texts}),
    ):
        packed = packer_of(*keys).pack(entities, 10_000)
        assert len(packed.parts) > 3
        assert all(len(part) <= MAX_PART_BYTES for part in packed.parts)
        assert sum(map(len, packed.parts)) == packed.byte_count
        assert len(keys_of(packed)) == 10_000
        assert all(bytes(part[:4]) == b"*4\r\n" for part in packed.parts)
