"""Pack a batch's commands: a template per key group, filled in by numpy.

When every join key is an integer all commands have the same length, so they are one template,
repeated, into which each key column is copied through a strided view. Text keys make the length
vary: those commands are put together one by one.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headrace.features.layout import value_head
from headrace.features.plan import FeaturePlan, KeyGroup
from headrace.features.values import ValueType

MAX_PART_BYTES = 256 << 10
"""Commands sent before their replies are read: few enough that neither side waits for the other."""

WHOLE_ROW_BYTES = 32 << 10
WHOLE_REPLY_BYTES = 1 << 20
"""
What is read whole are small hashes: more than so much for each, and more than so much in all, is
another kind of hash, and no reason to wait for the end of it.
"""

_WHOLE_HEAD = b"*2\r\n$7\r\nHGETALL\r\n"

_KEY_DTYPES: dict[ValueType, np.dtype[Any]] = {
    ValueType.INT32: np.dtype("<i4"),
    ValueType.INT64: np.dtype("<i8"),
    ValueType.UNIX_TIMESTAMP: np.dtype("<i8"),
}


@dataclass(frozen=True, slots=True)
class PackedCommands:
    """
    The commands that read a batch's entities from one key group.

    Args:
        rows: How many there are: one per distinct entity.
        inverse: Which of them each row of the batch asked for; None when that is its own.
        parts: Their bytes, in parts of whole commands: several only if within `MAX_PART_BYTES`.
        byte_count: Of all parts.
        one_by_one: Each command's bytes, made when asked for.
        key_at: Where, in each, the length of its key begins.
        max_reply_bytes: More than this is not what was to be expected; None where that is unknown.
    """

    rows: int
    inverse: NDArray[np.intp] | None
    parts: list[Any]
    byte_count: int
    one_by_one: Callable[[], list[bytes]]
    key_at: int
    max_reply_bytes: int | None = None

    def key_of(self, command: bytes) -> bytes:
        """Return the key that one of the commands reads."""
        end = command.index(b"\r\n", self.key_at)
        start = end + 2
        return command[start : start + int(command[self.key_at : end])]


class CommandPacker:
    """
    Packs the commands of one key group.

    Args:
        plan: The plan.
        group: One of its groups.
        is_whole: Whether to read whole hashes (HGETALL) instead of the group's fields (HMGET).
    """

    def __init__(self, plan: FeaturePlan, group: KeyGroup, *, is_whole: bool = False) -> None:
        self._group = group
        self._is_whole = is_whole
        self._head = _WHOLE_HEAD if is_whole else group.command_head
        self._tail = b"\r\n" if is_whole else group.command_tail
        self._join_keys = [plan.join_keys[i] for i in group.join_keys]
        self._template = b""
        self._places: list[int] = []  # of each value in the template
        if all(key.value_type in _KEY_DTYPES for key in self._join_keys):
            self._make_template()

    def pack(self, entities: Mapping[str, NDArray[Any]], rows: int) -> PackedCommands:
        """Make the commands; `entities` as `OnlineStore.read` takes them."""
        columns = [_column(entities[key.name], key.value_type) for key in self._join_keys]
        rows, inverse, columns = _distinct(columns, rows)
        if not self._template:
            return self._pack_text(columns, rows, inverse)
        length = len(self._template)
        commands = bytearray(self._template) * rows
        for column, place in zip(columns, self._places, strict=True):
            np.ndarray(rows, column.dtype, commands, place, length)[:] = column
        return PackedCommands(
            rows,
            inverse,
            _parts(commands, length),
            len(commands),
            lambda: [bytes(commands[i : i + length]) for i in range(0, len(commands), length)],
            len(self._head) + 1,
            self._max_reply_bytes(rows),
        )

    def keys(self, entities: Mapping[str, NDArray[Any]], rows: int) -> list[Hashable]:
        """Return what names each row's entity; `entities` as `pack` takes them."""
        lists = [entities[key.name].tolist() for key in self._join_keys]
        if not lists:
            return [()] * rows
        return lists[0] if len(lists) == 1 else list(zip(*lists, strict=True))

    @property
    def key_form(self) -> Hashable:
        """Equal where `name_of` is the same."""
        group = self._group
        types = tuple(key.value_type for key in self._join_keys)
        return group.key_prefix, group.key_suffix, types

    def name_of(self, key: bytes) -> Hashable | None:
        """Return what `keys` calls the entity of a Redis key; None if it is none of the group's."""
        group = self._group
        if not (key.startswith(group.key_prefix) and key.endswith(group.key_suffix)):
            return None
        at, end = len(group.key_prefix), len(key) - len(group.key_suffix)
        values: list[Any] = []
        for join_key in self._join_keys:
            length = int.from_bytes(key[at + 4 : at + 8], "little")
            raw = key[at + 8 : at + 8 + length]
            is_text = join_key.value_type not in _KEY_DTYPES
            values.append(raw if is_text else int.from_bytes(raw, "little", signed=True))
            at += 8 + length
        if at != end:
            return None
        return values[0] if len(values) == 1 else tuple(values)

    def _pack_text(
        self, columns: list[NDArray[Any]], rows: int, inverse: NDArray[np.intp] | None
    ) -> PackedCommands:
        group = self._group
        texts: list[list[bytes]] = []
        for join_key, column in zip(self._join_keys, columns, strict=True):
            value_type = join_key.value_type
            if value_type in _KEY_DTYPES:
                raw, width = column.tobytes(), column.itemsize
                head = value_head(value_type, width)
                texts.append([head + raw[i : i + width] for i in range(0, len(raw), width)])
            else:
                texts.append([value_head(value_type, len(text)) + text for text in column.tolist()])
        commands = []
        for values in zip(*texts, strict=True):
            key = b"".join((group.key_prefix, *values, group.key_suffix))
            commands.append(b"%b$%d\r\n%b%b" % (self._head, len(key), key, self._tail))
        whole = b"".join(commands)
        parts = [whole] if len(whole) <= MAX_PART_BYTES else in_parts(commands)
        at = len(self._head) + 1
        limit = self._max_reply_bytes(rows)
        return PackedCommands(rows, inverse, parts, len(whole), lambda: commands, at, limit)

    def _max_reply_bytes(self, rows: int) -> int | None:
        return max(rows * WHOLE_ROW_BYTES, WHOLE_REPLY_BYTES) if self._is_whole else None

    def _make_template(self) -> None:
        group = self._group
        key = bytearray(group.key_prefix)
        places = []
        for join_key in self._join_keys:
            width = _KEY_DTYPES[join_key.value_type].itemsize
            key += value_head(join_key.value_type, width)
            places.append(len(key))
            key += bytes(width)
        key += group.key_suffix
        head = self._head + b"$%d\r\n" % len(key)
        self._template = head + bytes(key) + self._tail
        self._places = [len(head) + place for place in places]


def in_parts(commands: Sequence[bytes]) -> list[bytes]:
    """Join commands to parts of at most `MAX_PART_BYTES`, or of one command."""
    parts, size = [[commands[0]]], len(commands[0])
    for command in commands[1:]:
        size += len(command)
        if size > MAX_PART_BYTES:
            parts.append([])
            size = len(command)
        parts[-1].append(command)
    return [b"".join(part) for part in parts]


def _parts(commands: bytearray, length: int) -> list[Any]:
    """Cut commands of equal length into parts."""
    if len(commands) <= MAX_PART_BYTES:
        return [commands]
    step = MAX_PART_BYTES // length * length or length
    view = memoryview(commands)
    return [view[first : first + step] for first in range(0, len(view), step)]


def _column(values: NDArray[Any], value_type: ValueType) -> NDArray[Any]:
    dtype = _KEY_DTYPES.get(value_type)
    if dtype is None:
        return values
    return np.ascontiguousarray(values.astype(dtype, casting="safe", copy=False))


def _distinct(
    columns: list[NDArray[Any]], rows: int
) -> tuple[int, NDArray[np.intp] | None, list[NDArray[Any]]]:
    """Keep each entity once. Counting them costs less than reading a few of them twice."""
    if not columns:
        return 1, np.zeros(rows, np.intp) if rows > 1 else None, columns
    if rows == 1:
        return 1, None, columns
    lists = [column.tolist() for column in columns]
    keys = lists[0] if len(lists) == 1 else list(zip(*lists, strict=True))
    if len(set(keys)) == rows:
        return rows, None, columns
    places: dict[Any, int] = {}
    inverse = np.array([places.setdefault(key, len(places)) for key in keys], np.intp)
    first = np.unique(inverse, return_index=True)[1]
    return len(first), inverse, [column[first] for column in columns]
