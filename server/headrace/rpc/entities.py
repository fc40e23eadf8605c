"""Entity columns of feature requests, as Feast's messages and Headrace's own hold them."""

from collections.abc import Iterable, Sequence
from typing import Any

from headrace.errors import InvalidRequest
from headrace.features.join import KEY_BYTES_MAX
from headrace.features.plan import RequestColumn
from headrace.features.values import ValueType

MESSAGE_BYTES_MAX = 4 << 20
"""Of a request for features: more would hold up the ingress thread for too long."""

_INT32_MIN, _INT32_MAX = -(1 << 31), (1 << 31) - 1


def refuse_large(message: bytes) -> None:
    """
    Refuse a request before it is parsed.

    Raises:
        InvalidRequest: it is larger than `MESSAGE_BYTES_MAX`.
    """
    if len(message) > MESSAGE_BYTES_MAX:
        raise InvalidRequest(
            f"request has {len(message)} bytes; at most {MESSAGE_BYTES_MAX} are accepted: "
            "send fewer entities in one request"
        )


def equal_length(lengths: Iterable[int]) -> int:
    """
    Return how many rows columns of these lengths are; without columns it is one.

    Raises:
        InvalidRequest: they differ.
    """
    distinct = set(lengths)
    if len(distinct) > 1:
        raise InvalidRequest(
            f"entity columns differ in length: {', '.join(map(str, sorted(distinct)))} rows"
        )
    return distinct.pop() if distinct else 1


def missing_column(column: RequestColumn, given: Iterable[str]) -> InvalidRequest:
    """Say that a column is not there. Feast would read another entity, and find nothing."""
    names = ", ".join(f"'{name}'" for name in sorted(given)[:16]) or "none"
    return InvalidRequest(f"{_what(column)} ({column.value_type.name}) is missing; given {names}")


def wrong_type(column: RequestColumn, row: int, found: str) -> InvalidRequest:
    """Say that a value is null or of another type."""
    return InvalidRequest(
        f"{_what(column)} is {found or 'null'} in row {row}; expected {column.value_type.name}"
    )


def check_values(column: RequestColumn, values: Sequence[Any]) -> None:
    """
    Check what types do not: integers of 32 bits, the length of text.

    Raises:
        InvalidRequest: a value is out of range.
    """
    if column.value_type is ValueType.INT32:
        if values and not _INT32_MIN <= min(values) <= max(values) <= _INT32_MAX:
            raise InvalidRequest(f"{_what(column)} has a value out of range for INT32")
    elif (
        column.is_key
        and column.datatype == "BYTES"
        and max(map(len, values), default=0) > KEY_BYTES_MAX
    ):
        raise InvalidRequest(f"{_what(column)} has a value of more than {KEY_BYTES_MAX} bytes")


def _what(column: RequestColumn) -> str:
    return f"{'join key' if column.is_key else 'request column'} '{column.name}'"
