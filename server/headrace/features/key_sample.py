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
# Arrays without dimensions, because numpy takes them half the time of as numbers.
_SPREAD = np.array(0x9FB21C651E98DF25, np.uint64)
_GOLDEN = np.array(0x9E3779B97F4A7C15, np.uint64)
_HIGH, _MIDDLE = np.array(32, np.uint64), np.array(28, np.uint64)


def threshold_of(share: float) -> NDArray[np.uint64]:
    """
    Turn a share of keys into what `sampled_rows` takes.

    Args:
        share: Over 0 and at most 1, which is every key.
    """
    return np.array(max(int(share * _HASH_VALUES), 1) - 1, np.uint64)


def sampled_rows(
    columns: Sequence[NDArray[Any]], threshold: NDArray[np.uint64]
) -> NDArray[np.intp]:
    """
    Return the places of the rows that are kept, ascending.

    A row that is kept at one threshold is kept at every higher one.

    Args:
        columns: One per join key, in an order that does not change, each of shape (n,): integers of
            any width, which hash by value, or an object array of `bytes`.
        threshold: Highest hash that is kept, of `threshold_of`.
    """
    return (key_hashes(columns) <= threshold).nonzero()[0]


def key_hashes(columns: Sequence[NDArray[Any]]) -> NDArray[np.uint64]:
    """Return 64 evenly spread bits per row, which depend on its keys and their order only."""
    hashes = _words(columns[0]) + _GOLDEN
    for column in columns[1:]:
        hashes = _mixed(hashes) * _GOLDEN + _words(column)
    return _mixed(hashes)


def _words(column: NDArray[Any]) -> NDArray[np.uint64]:
    if column.dtype.kind == "O":
        return np.fromiter(map(zlib.crc32, column.tolist()), np.uint64, len(column))
    return column.astype(np.int64).view(np.uint64)


def _mixed(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Let every bit of each word move the high ones."""
    words = (words ^ (words >> _HIGH)) * _SPREAD  # not in place: slower, for one row
    return (words ^ (words >> _MIDDLE)) * _SPREAD
