"""Whether to read an entity's whole hash, or the fields that are wanted. Pure.

A small hash is one block of memory (a listpack), through which HMGET searches once per field, from
the start: 55 fields of 55 cost the server 14 us, all of it with HGETALL 4 us. In a larger hash (a
table) a field costs little, and what is not wanted costs as much as what is.

Source: `commandstats` of Redis 7.0 with Feast's hashes (HMGET 11 of 55: 1.2 us in a listpack, 0.6
in a table); redis.conf, `hash-max-listpack-entries` (128 or 512 by default) and
`hash-max-listpack-value` (64).
"""

from typing import NamedTuple

PROBE_PERIOD_S = 60.0
"""How often to look again: views come and go."""

PROBE_ROWS = 4
"""Entities looked at."""

WANTED_MIN = 24
"""Fields below which HMGET's search is short."""

WANTED_SHARE_MIN = 0.5
LISTPACK_FIELDS_MAX = 128
LISTPACK_VALUE_BYTES_MAX = 64


class HashSample(NamedTuple):
    """
    What the hashes of some entities are like.

    Args:
        fields: Of the largest.
        value_bytes: Of the longest value.
    """

    fields: int
    value_bytes: int


def prefers_whole(wanted: int, sample: HashSample) -> bool:
    """
    Say whether HGETALL costs less than HMGET.

    Args:
        wanted: Fields that HMGET would name.
        sample: Of hashes that exist.
    """
    is_listpack = (
        sample.fields <= LISTPACK_FIELDS_MAX and sample.value_bytes <= LISTPACK_VALUE_BYTES_MAX
    )
    return is_listpack and wanted >= max(WANTED_MIN, WANTED_SHARE_MIN * sample.fields)
