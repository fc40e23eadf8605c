"""Feast's Redis layout, against bytes that Feast 0.67 and MurmurHash3's author wrote."""

import struct

import numpy as np
import pytest

from headrace.features.layout import feature_field, key_prefix, murmur3_x86_32, time_field
from headrace.features.plan import FeatureSource, ViewSource, compile_plan
from headrace.features.redis_commands import CommandPacker
from headrace.features.values import ValueType


def packed_key(project, **columns):
    """The Redis key that a one-row batch packs."""
    keys = tuple((name, name, value_type) for name, (value_type, _) in columns.items())
    source = ViewSource("view", keys, (FeatureSource("feature", ValueType.FLOAT),))
    plan = compile_plan("service", project, "1", [source])
    entities = {}
    for name, (value_type, value) in columns.items():
        dtype = {ValueType.INT32: np.int32, ValueType.INT64: np.int64}.get(value_type, np.object_)
        entities[name] = np.array([value], dtype)
    packer = CommandPacker(plan, plan.groups[0])
    command = b"".join(packer.pack(entities, 1).parts)
    length, rest = command.split(b"HMGET\r\n$", 1)[1].split(b"\r\n", 1)
    assert rest[int(length) :].startswith(b"\r\n$4\r\n")
    return rest[: int(length)].hex()


@pytest.mark.parametrize(
    ("project", "columns", "expected"),
    [
        (
            "demo",
            {"driver_id": (ValueType.INT64, 1001)},
            (
                "01000000 02000000 09000000 6472697665725f6964 04000000 08000000 e903000000000000"
                "64656d6f"
            ),
        ),
        (
            "demo",
            {"driver_id": (ValueType.INT64, 1001), "customer_id": (ValueType.STRING, b"abc")},
            (
                "02000000 02000000 0b000000 637573746f6d65725f6964 02000000 09000000"
                "6472697665725f6964 02000000 03000000 616263 04000000 08000000 e903000000000000"
                "64656d6f"
            ),
        ),
        (
            "",
            {"b": (ValueType.STRING, "é".encode()), "a": (ValueType.INT64, 2)},
            (
                "02000000 02000000 01000000 61 02000000 01000000 62 04000000 08000000"
                "0200000000000000 02000000 02000000 c3a9"
            ),
        ),
        (
            "",
            {"a": (ValueType.INT32, -1)},
            "01000000 02000000 01000000 61 03000000 04000000 ffffffff",
        ),
        (
            "demo",
            {},
            "01000000 02000000 0a000000 5f5f64756d6d795f6964 02000000 00000000 64656d6f",
        ),
    ],
    ids=["one integer", "integer and text", "sorted by name", "negative", "no entity"],
)
def test_entity_keys_are_those_that_feast_writes(project, columns, expected):
    assert packed_key(project, **columns) == expected.replace(" ", "")


@pytest.mark.parametrize(
    ("view", "feature", "expected"),
    [
        ("driver_stats", "conv_rate", "fa731014"),
        ("driver_stats", "trips", "426aa434"),
        ("pair_stats", "n", "4556a295"),
        ("pair_stats", "s", "56c984c9"),
        ("glob", "g", "09b1e9ae"),
        ("driver_stats_v2", "conv_rate", "bd6f1854"),
    ],
)
def test_feature_fields_are_those_that_feast_writes(view, feature, expected):
    assert feature_field(view, feature).hex() == expected


def test_event_time_fields_are_the_views_name_in_clear():
    assert time_field("driver_stats") == b"_ts:driver_stats"


def test_the_prefix_of_a_key_names_its_join_keys():
    assert key_prefix(["a"]) == struct.pack("<III", 1, 2, 1) + b"a"


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", 0),
        (b"\x00\x00\x00\x00", 0x2362F9DE),
        (b"\xff\xff\xff\xff", 0x76293B50),
        (b"\x21\x43\x65\x87", 0xF55B516B),
        (b"\x21\x43\x65", 0x7E4A8634),
        (b"\x21\x43", 0xA0F7B07A),
        (b"\x21", 0x72661CF4),
    ],
)
def test_murmur3_agrees_with_its_published_vectors(data, expected):
    assert murmur3_x86_32(data) == expected
