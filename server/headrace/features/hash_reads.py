"""Whether to read an entity's whole hash, or the fields that are wanted. Pure.

A small hash is one block of memory (a listpack), through which HMGET searches once per field, from
the start, after parsing each of its words: 18 fields of 18 cost the server 3.4 us, all of it with
HGETALL 2.6 us; of 96 fields 43 and 11 us. In a larger hash (a table) a field costs little, and what
is not wanted costs as much as what is.

Source: `schedstat` of Valkey 9.1 answering pipelines of 200 commands on hashes of 4 to 96 fields of
Feast's, from which `_fields_us` and `_whole_us` were fitted by hand (within 11 %); redis.conf,
`hash-max-listpack-entries` (128 or 512 by default) and `hash-max-listpack-value` (64).
"""

from typing import NamedTuple

PROBE_PERIOD_S = 60.0
"""How often to look again: views come and go."""

PROBE_ROWS = 4
"""Entities looked at."""

WANTED_MIN = 15
"""Fields below which HMGET's search is short, however small the hash."""

WANTED_SHARE_MIN = 0.5
"""What is not wanted is sent all the same, with its name."""

GAIN_MIN = 1.1
"""How much dearer HMGET must be: names come along with HGETALL."""

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
    return (
        is_listpack
        and wanted >= max(WANTED_MIN, WANTED_SHARE_MIN * sample.fields)
        and _fields_us(wanted, sample.fields) >= GAIN_MIN * _whole_us(sample.fields)
    )


def _fields_us(wanted: int, fields: int) -> float:
    """Return the server's time for an HMGET of a listpack: words parsed, and entries passed."""
    return 0.5 + wanted * (0.09 + 0.0037 * fields)


def _whole_us(fields: int) -> float:
    """Return the server's time for an HGETALL of a listpack."""
    return 0.7 + 0.11 * fields
