"""Which rows are kept for the skew log: decided by the entity key alone.

Every read of a sampled key is kept, by every process and after every restart, so that what happened
to one entity can be followed (Chronon's consistency log does the same).
"""

import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

_HASH_VALUES = 1 << 64

# Multiplier and last shift are those of P. Evensen's mixing function "rrmxmx"; the other constant,
# without which a key of 0 would hash to 0, is the golden ratio of 64 bits.
_SPREAD = np.uint64(0x9FB21C651E98DF25)
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_HIGH, _MIDDLE = np.uint64(32), np.uint64(28)


def threshold_of(share: float) -> np.uint64:
    """
    Turn a share of keys into what `sampled_rows` takes.

    Args:
        share: Over 0 and at most 1, which is every key.
    """
    return np.uint64(max(int(share * _HASH_VALUES), 1) - 1)


def sampled_rows(columns: Sequence[NDArray[Any]], threshold: np.uint64) -> NDArray[np.intp]:
    """
    Return the places of the rows that are kept, ascending.

    A row that is kept at one threshold is kept at every higher one.

    Args:
        columns: One per join key, in an order that does not change, each of shape (n,): integers of
            any width, which hash by value, or an object array of `bytes`.
        threshold: Highest hash that is kept.
    """
    return np.flatnonzero(key_hashes(columns) <= threshold)


def key_hashes(columns: Sequence[NDArray[Any]]) -> NDArray[np.uint64]:
    """Return 64 evenly spread bits per row, which depend on its keys and their order only."""
    hashes = _words(columns[0])
    hashes += _GOLDEN
    for column in columns[1:]:
        _mix(hashes)
        hashes *= _GOLDEN
        hashes += _words(column)
    _mix(hashes)
    return hashes


def _words(column: NDArray[Any]) -> NDArray[np.uint64]:
    if column.dtype.kind == "O":
        return np.fromiter(map(zlib.crc32, column.tolist()), np.uint64, len(column))
    return column.astype(np.int64).view(np.uint64)


def _mix(words: NDArray[np.uint64]) -> None:
    """Let every bit of each word move the high ones, in place."""
    words ^= words >> _HIGH
    words *= _SPREAD
    words ^= words >> _MIDDLE
    words *= _SPREAD
