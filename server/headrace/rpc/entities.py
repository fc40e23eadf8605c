"""Entity columns of feature requests, as Feast's messages and Headrace's own hold them."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from headrace.errors import InvalidRequest
from headrace.features.join import KEY_BYTES_MAX
from headrace.features.plan import RequestColumn
from headrace.features.plans import refuse_many_references
from headrace.features.values import ValueType
from headrace.wire import has_more_fields

MESSAGE_BYTES_MAX = 4 << 20
"""Of a request for features: more would hold up the ingress thread for too long."""

COLUMNS_MAX = 256
"""Of one request, request-time data included."""

NAME_BYTES_MAX = 1_024
"""Of a feature service: names are kept while requests wait."""

_FIELDS_MAX = COLUMNS_MAX + 16
"""At the top of a request: a column each, and the few others."""

_FEW_FIELDS_BYTES = 2_048
"""A message that has not more cannot have many fields."""

_FLOAT_MAX = float(np.finfo(np.float32).max)
_INT32_MIN, _INT32_MAX = -(1 << 31), (1 << 31) - 1
_MANY_COLUMNS = f"request has more than {COLUMNS_MAX} columns of entities"


def refuse_large(message: bytes) -> None:
    """
    Refuse a request before it is parsed.

    Raises:
        InvalidRequest: it is larger than `MESSAGE_BYTES_MAX`, or has many more than `COLUMNS_MAX`
            columns: each costs the parser microseconds.
    """
    if len(message) > MESSAGE_BYTES_MAX:
        raise InvalidRequest(
            f"request has {len(message)} bytes; at most {MESSAGE_BYTES_MAX} are accepted: "
            "send fewer entities in one request"
        )
    if len(message) > _FEW_FIELDS_BYTES and has_more_fields(message, _FIELDS_MAX):
        raise InvalidRequest(_MANY_COLUMNS)


def refuse_many(service: str, references: int, columns: int) -> None:
    """
    Refuse a request once it is parsed, before anything is made of it.

    Args:
        service: The feature service's name.
        references: How many features it names.
        columns: How many it has.

    Raises:
        InvalidRequest: something is above its limit.
    """
    if columns > COLUMNS_MAX:
        raise InvalidRequest(_MANY_COLUMNS)
    if len(service) > NAME_BYTES_MAX:
        raise InvalidRequest(
            f"feature_service has {len(service)} characters; at most {NAME_BYTES_MAX} are accepted"
        )
    refuse_many_references(references)


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
    Check what types do not: numbers of 32 bits, the length of text.

    Raises:
        InvalidRequest: a value is out of range.
    """
    if column.value_type is ValueType.INT32:
        if values and not _INT32_MIN <= min(values) <= max(values) <= _INT32_MAX:
            raise InvalidRequest(f"{_what(column)} has a value out of range for INT32")
    elif column.value_type is ValueType.FLOAT:
        if any(_FLOAT_MAX < abs(value) < math.inf for value in values):
            raise InvalidRequest(f"{_what(column)} has a value out of range for FLOAT")
    elif (
        column.is_key
        and column.datatype == "BYTES"
        and max(map(len, values), default=0) > KEY_BYTES_MAX
    ):
        raise InvalidRequest(f"{_what(column)} has a value of more than {KEY_BYTES_MAX} bytes")


def _what(column: RequestColumn) -> str:
    return f"{'join key' if column.is_key else 'request column'} '{column.name}'"
