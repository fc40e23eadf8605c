"""Whether two values of a feature are the same, and how far apart numbers are."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date, datetime
from decimal import Decimal
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headrace.features.feast_import import import_feast
from headrace.features.values import ValueType


@dataclass(frozen=True, slots=True)
class Tolerance:
    """
    How far apart floating-point values may be and still be the same.

    Two are when |a − b| ≤ absolute + relative · |b|, b being the offline one. Everything else must
    be equal.

    Args:
        relative: Of the offline value. The default is that of numbers which went through FP32.
        absolute: For values near zero.
    """

    relative: float = 1e-6
    absolute: float = 0.0


def differences(
    value_type: ValueType, online: NDArray[Any], offline: NDArray[Any], tolerance: Tolerance
) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """
    Compare values, none of them missing.

    An offline store may hold another type than the registry declares (doubles for FLOAT, doubles
    or decimals for integers among which some are missing, datetimes for UNIX_TIMESTAMP). It is
    compared as what materialization would make of it; what it can make nothing of differs, alone.
    Sets are the same in any order, and maps are.

    Args:
        value_type: As declared.
        online: As logged, shape (n,); serialized `Value`s of opaque types.
        offline: As the offline store has them, shape (n,), of any dtype.
        tolerance: For floating point.

    Returns:
        Whether each pair differs, and the distance of each: NaN where there is none, since the
        values are no numbers, one is infinite, or two lists differ in length.
    """
    if value_type.name.endswith("_LIST") and not value_type.is_opaque:
        return _list_differences(value_type, online, offline, tolerance)
    if value_type.dtype.kind == "O":
        canonical = _CANONICAL.get(value_type, _as_text)
        if value_type.is_opaque:
            canonical = partial(_content, value_type)
        differs = [
            not _are_same(canonical, a, b)
            for a, b in zip(online.tolist(), offline.tolist(), strict=True)
        ]
        return np.array(differs, np.bool_), np.full(len(online), np.nan)
    exact = value_type.dtype.kind != "f"
    try:
        return _number_differences(online, _numbers(offline, value_type), tolerance, exact=exact)
    except (ArithmeticError, TypeError, ValueError):
        differ, distance = np.ones(len(online), np.bool_), np.full(len(online), np.nan)
        if len(online) > 1:  # somebody's value is to blame: only theirs shall differ
            for i in range(len(online)):
                at = slice(i, i + 1)
                differ[at], distance[at] = differences(
                    value_type, online[at], offline[at], tolerance
                )
        return differ, distance


def shown(value_type: ValueType, value: Any) -> Any:
    """
    Return a value of either store, not missing, as people can compare it with the other's.

    Timestamps are Unix seconds; sets are sorted; what cannot be converted is as it was.
    """
    try:
        if value_type is ValueType.UNIX_TIMESTAMP:
            return _seconds(value)
        if value_type is ValueType.UNIX_TIMESTAMP_LIST:
            return [_seconds(one) for one in value]
        if value_type.is_opaque:
            content = _content(value_type, value)
            return content if isinstance(content, list) else " ".join(str(content).split())
    except Exception:  # noqa: BLE001 Feast's converter raises what it likes, and this is to look at
        return value
    return value


def _number_differences(
    online: NDArray[Any], offline: NDArray[Any], tolerance: Tolerance, *, exact: bool
) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    differs: NDArray[np.bool_] = online != offline
    a, b = online.astype(np.float64), offline.astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        distance = np.abs(a - b)
        if not exact:
            limit = tolerance.absolute + tolerance.relative * np.abs(b)
            differs &= ~((distance <= limit) & np.isfinite(b)) & ~(np.isnan(a) & np.isnan(b))
    distance[~np.isfinite(distance)] = np.nan
    return differs, distance


def _numbers(values: NDArray[Any], value_type: ValueType) -> NDArray[Any]:
    """Return offline values as what they would be online, before any loss of fractions."""
    if values.dtype.kind == "M":
        return values.astype("datetime64[s]").astype(np.int64)
    if values.dtype.kind == "O":
        values = _without_decimals(values)
    if value_type is ValueType.UNIX_TIMESTAMP and values.dtype.kind == "O":
        return np.array([_seconds(value) for value in values.tolist()], np.int64)
    if value_type.dtype.kind == "f":
        with np.errstate(over="ignore"):  # what is too large for a narrower float is infinite
            return values.astype(value_type.dtype)
    if values.dtype.kind == "O":
        values = np.array(values.tolist())  # integers that need not be doubles
    if values.dtype.kind not in "biuf":
        raise ValueError(f"{values.dtype} is no number")
    return values


def _without_decimals(values: NDArray[Any]) -> NDArray[Any]:
    """Let decimals be integers where they are whole, else doubles."""
    plain = np.empty(len(values), np.object_)
    plain[:] = [
        (int(v) if v == v.to_integral_value() else float(v)) if isinstance(v, Decimal) else v
        for v in values.tolist()
    ]
    return plain


def _seconds(value: Any) -> int:
    if isinstance(value, np.datetime64):
        return int(value.astype("datetime64[s]").astype(np.int64))
    if isinstance(value, date) and not isinstance(value, datetime):
        return int(np.datetime64(value, "s").astype(np.int64))
    return int(value.timestamp() // 1) if hasattr(value, "timestamp") else int(value)


def _content(value_type: ValueType, value: Any) -> Any:
    """Return what a serialized `Value`, or what one is made of, holds; sets as sorted lists."""
    import_feast()
    from feast.protos.feast.types.Value_pb2 import Value  # noqa: PLC0415 seconds to import
    from feast.type_map import python_values_to_proto_values  # noqa: PLC0415 likewise
    from feast.value_type import ValueType as FeastType  # noqa: PLC0415 likewise

    if isinstance(value, bytes):
        message = Value.FromString(value)
    else:
        if value_type.name.endswith("MAP") and not isinstance(value, dict):
            value = dict(value)  # Arrow's maps are lists of pairs
        message = python_values_to_proto_values([value], FeastType(int(value_type)))[0]
    kind = str(message.WhichOneof("val"))
    inner = getattr(message, kind)
    if not kind.endswith("set_val"):
        return inner
    elements = list(inner.val)
    return sorted(elements, key=lambda one: getattr(one, "SerializeToString", lambda: one)())


def _list_differences(
    value_type: ValueType, online: NDArray[Any], offline: NDArray[Any], tolerance: Tolerance
) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    element = ValueType[value_type.name.removesuffix("_LIST")]
    differs = np.ones(len(online), np.bool_)
    distance = np.full(len(online), np.nan)
    for i, (a, b) in enumerate(zip(online.tolist(), offline.tolist(), strict=True)):
        if not hasattr(b, "__len__") or isinstance(b, str | bytes) or len(a) != len(b):
            continue
        own = _elements(list(a), element)
        apart, far = differences(element, own, _elements(list(b), element), tolerance)
        differs[i] = apart.any()
        if np.isfinite(far).any():
            distance[i] = np.nanmax(far)
        elif not len(a) and element.dtype.kind != "O":
            distance[i] = 0.0
    return differs, distance


def _elements(values: list[Any], element: ValueType) -> NDArray[Any]:
    if element.dtype.kind != "O" and all(isinstance(v, int | float | np.generic) for v in values):
        return np.array(values, element.dtype if element.dtype.kind == "f" else None)
    array = np.empty(len(values), np.object_)
    array[:] = values
    return array


def _are_same(canonical: Callable[[Any], Any], online: Any, offline: Any) -> bool:
    try:
        return bool(canonical(online) == canonical(offline))
    except (ArithmeticError, TypeError, ValueError):
        return bool(np.all(online == offline))
    except Exception:  # noqa: BLE001 Feast's converter raises what it likes
        return False


def _as_text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _as_bytes(value: Any) -> bytes:
    return value.encode() if isinstance(value, str) else bytes(value)


def _as_document(value: Any) -> Any:
    return json.loads(value) if isinstance(value, str | bytes) else value


_CANONICAL: dict[ValueType, Callable[[Any], Any]] = {
    ValueType.BYTES: _as_bytes,
    ValueType.JSON: _as_document,
    ValueType.UUID: lambda value: str(value).lower(),
    ValueType.TIME_UUID: lambda value: str(value).lower(),
    ValueType.DECIMAL: lambda value: Decimal(str(value)),
}
