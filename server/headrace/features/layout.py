"""Feast's Redis layout: the bytes of an entity's key and of its hash fields.

One hash per entity and project holds every view of that entity. Its key is the serialized entity
key (version 3) followed by the project's name; a feature's field name is the hash of
`view:feature`, an event time's is `_ts:view`.

Source: feast 0.67 `infra/key_encoding_utils.py`, `infra/online_stores/redis.py`, and bytes that it
wrote (the golden vectors in the tests). Feast's own page on the format describes an older one.
"""

import struct
from collections.abc import Sequence
from functools import lru_cache

from headrace.features.values import ValueType

DUMMY_JOIN_KEY = "__dummy_id"
"""The join key, of value `""`, under which Feast stores a view that has no entity."""

_U32 = struct.Struct("<I")
_U32_MASK = 0xFFFFFFFF


def key_prefix(join_keys: Sequence[str]) -> bytes:
    """
    Return the part of an entity key that comes before the values.

    Args:
        join_keys: Base names, sorted; none for a view without entities, whose only value is
            included.
    """
    names = list(join_keys) or [DUMMY_JOIN_KEY]
    parts = [_U32.pack(len(names))]
    for name in names:
        encoded = name.encode()
        parts += [_U32.pack(ValueType.STRING), _U32.pack(len(encoded)), encoded]
    if not join_keys:
        parts.append(value_head(ValueType.STRING, 0))
    return b"".join(parts)


def value_head(value_type: ValueType, length: int) -> bytes:
    """Return what precedes a value in an entity key: its type and its length in bytes."""
    return _U32.pack(value_type) + _U32.pack(length)


@lru_cache(maxsize=1 << 16)
def feature_field(view: str, feature: str) -> bytes:
    """Return the hash field of a feature: 4 bytes. Every plan asks it of the whole registry."""
    return _U32.pack(murmur3_x86_32(f"{view}:{feature}".encode()))


def time_field(view: str) -> bytes:
    """Return the hash field of a view's event time."""
    return b"_ts:" + view.encode()


def murmur3_x86_32(data: bytes) -> int:
    """
    Hash with MurmurHash3 x86_32 and seed 0.

    Source: Austin Appleby, `MurmurHash3.cpp` (public domain).
    """
    h = 0
    tail = len(data) & ~3
    for (k,) in _U32.iter_unpack(data[:tail]):
        h ^= _murmur_mix(k)
        h = (h << 13 | h >> 19) & _U32_MASK
        h = (h * 5 + 0xE6546B64) & _U32_MASK
    h ^= _murmur_mix(int.from_bytes(data[tail:], "little"))
    h ^= len(data)
    h ^= h >> 16
    h = h * 0x85EBCA6B & _U32_MASK
    h ^= h >> 13
    h = h * 0xC2B2AE35 & _U32_MASK
    return h ^ h >> 16


def _murmur_mix(k: int) -> int:
    k = k * 0xCC9E2D51 & _U32_MASK
    k = (k << 15 | k >> 17) & _U32_MASK
    return k * 0x1B873593 & _U32_MASK
