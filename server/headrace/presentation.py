"""Values as people read them in a table, and as JSON can hold them."""

import math
from typing import Any

from headrace.terminal import printable

VALUES_SHOWN = 8
"""Of a list."""


def strict_json(value: Any) -> Any:
    """
    Write what JSON has no number for as text.

    Source: ProtoJSON, "NaN", "Infinity" and "-Infinity".
    """
    if isinstance(value, dict):
        return {name: strict_json(one) for name, one in value.items()}
    if isinstance(value, list):
        return [strict_json(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else f"{'-' * (value < 0)}Infinity"
    return value


def cell(value: Any) -> str:
    """Write one value, short and safe to print."""
    if isinstance(value, list):
        shown_values = ", ".join(cell(one) for one in value[:VALUES_SHOWN])
        return f"[{shown_values}{', …' if len(value) > VALUES_SHOWN else ''}]"
    if isinstance(value, float):
        return f"{value:,.2f}" if 1_000 <= abs(value) < 1e12 else f"{value:.6g}"
    return printable(str(value))


def duration(seconds: float) -> str:
    """Write a span of time in its largest fitting unit."""
    for size, unit in ((86_400, "d"), (3_600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:,.0f} {unit}"
    return f"{seconds:.0f} s"
