"""What the keys in a Redis database say of who wrote them. Pure.

Source: Feast's layouts: since 0.44 (`layout`); 0.38 to 0.43, the same without the count of join
keys (Feast's pull request 4967); before, entity key serialization version 2, whose names have no
length.
"""

import re
import struct
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from headrace.features.layout import key_prefix
from headrace.features.values import KEY_DATATYPES, ValueType

KeyLayout = Literal["current", "0.38 to 0.43", "version 2", "not Feast's"]

_U32 = struct.Struct("<I")
_NAMES_MAX = 64
_FIXED_WIDTHS = {ValueType.INT32: 4, ValueType.INT64: 8, ValueType.UNIX_TIMESTAMP: 8}
_KEY_TYPES = {int(value_type) for value_type in KEY_DATATYPES}
_NAME = re.compile(rb"[^\x00-\x1f\x7f]+")
_GLOB_SPECIAL = re.compile(rb"[\\*?\[\]^-]")


@dataclass(frozen=True, slots=True)
class EntityKey:
    """
    A key, as far as it can be read.

    Args:
        layout: Who wrote it.
        join_keys: Names, in the key's order; only of the current layout. None at all in keys that
            nobody reads: a view without entities is stored under a name of Feast's.
        project: What follows the entity key; likewise.
        value_types: Of its values, `ValueType`'s numbers; likewise.
    """

    layout: KeyLayout
    join_keys: tuple[str, ...] = ()
    project: str = ""
    value_types: tuple[int, ...] = ()


class _DamagedError(ValueError):
    """It is not what it was taken for."""


def read_key(key: bytes) -> EntityKey:
    """Read a key of a Redis database that may be Feast's."""
    try:
        return _read_current(key)
    except (_DamagedError, UnicodeDecodeError, struct.error):
        pass
    try:
        (kind,) = _U32.unpack_from(key)
        (length,) = _U32.unpack_from(key, 4)
    except struct.error:
        return EntityKey("not Feast's")
    if kind == ValueType.STRING and 0 < length <= len(key) - 8 and _is_name(key[8 : 8 + length]):
        return EntityKey("0.38 to 0.43")
    return EntityKey("version 2" if _is_version_2(key) else "not Feast's")


def group_pattern(join_keys: Collection[str], project: str) -> bytes:
    """Return a glob-style pattern, as SCAN takes it, of a project's keys of some join keys."""
    ends = key_prefix(sorted(join_keys)), project.encode()
    return b"*".join([_GLOB_SPECIAL.sub(rb"\\\g<0>", end) for end in ends])


def clashing_projects(projects: Collection[str]) -> list[tuple[str, str]]:
    """
    Return pairs of projects of which the second ends like the first.

    A project's name is the bare end of its keys, so that deleting a view of `prod` deletes what
    `nonprod` has of it, too.
    """
    return sorted(
        (short, long)
        for short in set(projects)
        for long in set(projects)
        if short != long and long.endswith(short)
    )


def _read_current(key: bytes) -> EntityKey:
    (count,) = _U32.unpack_from(key)
    if count > _NAMES_MAX:
        raise _DamagedError
    position, names = 4, []
    for _ in range(count):
        kind, name, position = _read_part(key, position)
        if kind != ValueType.STRING or not name:
            raise _DamagedError
        names.append(name.decode())
    types, position = _read_values(key, position, count)
    project = key[position:].decode()
    if not project.isprintable() or not (project or count):
        raise _DamagedError
    return EntityKey("current", tuple(names), project, types)


def _read_values(key: bytes, position: int, count: int) -> tuple[tuple[int, ...], int]:
    types = []
    for _ in range(count):
        kind, value, position = _read_part(key, position)
        if kind not in _KEY_TYPES:
            raise _DamagedError
        width = _FIXED_WIDTHS.get(ValueType(kind))
        if width is not None and len(value) != width:
            raise _DamagedError
        types.append(kind)
    return tuple(types), position


def _read_part(key: bytes, position: int) -> tuple[int, bytes, int]:
    (kind,) = _U32.unpack_from(key, position)
    (length,) = _U32.unpack_from(key, position + 4)
    end = position + 8 + length
    if end > len(key):
        raise _DamagedError
    return kind, key[position + 8 : end], end


def _is_version_2(key: bytes) -> bool:
    """
    Say whether a key is names, each after its type and without a length, then as many values.

    A name ends where the next number begins, since a type's first byte is no text. How many names
    there are nothing says: it is tried.
    """
    position, count = 0, 0
    while count < _NAMES_MAX and key[position : position + 4] == _U32.pack(ValueType.STRING):
        name = _NAME.match(key, position + 4)
        if name is None:
            return False
        position, count = name.end(), count + 1
        try:
            _, end = _read_values(key, position, count)
        except (_DamagedError, struct.error):
            continue
        if end < len(key) and _is_name(key[end:]):
            return True
    return False


def _is_name(text: bytes) -> bool:
    return text.isascii() and text.decode().isprintable()


def type_names(value_types: Sequence[int]) -> str:
    """Write value types for people."""
    return ", ".join(ValueType(value_type).name for value_type in value_types)
