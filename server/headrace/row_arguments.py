"""Rows as somebody types them, `column=value …`, read as a model takes them. Pure."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from headrace.errors import StartupError
from headrace.tensors import NUMPY_DTYPES
from headrace.terminal import printable

_TRUTH = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


@dataclass(frozen=True, slots=True)
class Input:
    """
    What a model takes under one name.

    Args:
        name: Of the column.
        datatype: Open Inference Protocol's.
        shape: Of one row; of everything for a model that has no batch dimension.
        is_batched: Whether the model has a batch dimension.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]
    is_batched: bool = True

    @property
    def has_one_value(self) -> bool:
        """Whether a row has exactly one value."""
        return self.is_batched and self.shape in ((), (1,))

    def __str__(self) -> str:
        return self.datatype if self.has_one_value else f"{self.datatype} {list(self.shape)}"


def read_rows(model: str, inputs: Sequence[Input], pairs: Sequence[str]) -> dict[str, list[Any]]:
    """
    Read what was typed.

    Args:
        model: Its name, for messages.
        inputs: What it takes.
        pairs: `column=a` or `column=a,b,…`, a row each; where a row has several values, a JSON
            list of them, or a list of such lists. One-value columns take a JSON list of rows
            too, for text with a comma in it. A single row stands for as many as the others have.

    Returns:
        By input, in the model's order: one entry per row, nested as the row is. For a model
        without a batch dimension, one entry: the tensor.

    Raises:
        StartupError: a pair is none or is there twice; a column is missing, unknown, of another
            shape or number of rows, or a value is not of its type.
    """
    takes = printable(", ".join(f"{of.name} ({of})" for of in inputs))
    by_name = {of.name: of for of in inputs}
    columns: dict[str, list[Any]] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or not name:
            raise StartupError(f"expected column=value, got {shown(pair)}")
        if name not in by_name:
            raise StartupError(f"{model} has no column {shown(name)}; it takes {takes}")
        if name in columns:
            raise StartupError(f"column {shown(name)} is there twice; give rows as a,b,c")
        columns[name] = _read_column(by_name[name], text)
    if missing := sorted(set(by_name) - set(columns)):
        raise StartupError(f"{model} also needs {printable(', '.join(missing))}; it takes {takes}")
    counts = {len(rows) for rows in columns.values() if len(rows) != 1}
    if len(counts) > 1:
        found = ", ".join(f"{name} {len(rows)}" for name, rows in columns.items())
        raise StartupError(f"columns differ in their number of rows: {printable(found)}")
    most = max(counts, default=1)
    return {of.name: columns[of.name] * (most // len(columns[of.name])) for of in inputs}


def shown(text: str) -> str:
    """Quote for a message, cut to 60 characters."""
    return repr(text if len(text) <= 60 else text[:57] + "...")


def _read_column(of: Input, text: str) -> list[Any]:
    if of.has_one_value and not text.startswith("["):
        return [_typed(of, value) for value in text.split(",")]
    try:
        value = json.loads(text) if text.startswith("[") else text
        depth = len(_dimensions(value))
    except (ValueError, RecursionError) as error:
        raise StartupError(f"column {shown(of.name)}: not a JSON list: {error}") from None
    row_depth = 0 if of.has_one_value else len(of.shape)
    if depth == row_depth and not of.has_one_value:
        return [_typed(of, value)]
    if depth == row_depth + 1 and of.is_batched and value:
        return [_typed(of, row) for row in value]
    raise StartupError(f"column {shown(of.name)}: expected {_expected(of)}, got {shown(text)}")


def _dimensions(value: Any) -> tuple[int, ...]:
    """Return how lists nest, as a shape; those beside each other must be alike."""
    if isinstance(value, dict):
        raise ValueError("an object in it")  # noqa: TRY004 as the JSON parser's own complaints
    if not isinstance(value, list):
        return ()
    inner = {_dimensions(one) for one in value}
    if len(inner) > 1:
        raise ValueError("rows of different lengths")
    return (len(value), *next(iter(inner), ()))


def _expected(of: Input) -> str:
    if of.has_one_value:
        return "one value a row, as a,b or a JSON list"
    lists = "a JSON list" + " of lists" * (len(of.shape) - 1)
    what = f"{lists} of shape {list(of.shape)}"
    return f"{what} for a row, or a list of rows" if of.is_batched else what


def _typed(of: Input, value: Any) -> Any:
    if isinstance(value, list):
        return [_typed(of, one) for one in value]
    try:
        if of.datatype == "BYTES":
            value.encode()
            return value
        text = value if isinstance(value, str) else json.dumps(value)
        if of.datatype == "BOOL":
            return _TRUTH[text.strip().lower()]
        if of.datatype.startswith("FP"):
            return _finite_as_typed(float(text), of.datatype)
        return int(np.array(int(text), NUMPY_DTYPES[of.datatype]))
    except (ValueError, KeyError, OverflowError, AttributeError):
        text = value if isinstance(value, str) else json.dumps(value)
        raise StartupError(f"column {shown(of.name)}: {shown(text)} is no {of.datatype}") from None


def _finite_as_typed(value: float, datatype: str) -> float:
    """Refuse a number that would become infinite on its way."""
    with np.errstate(over="ignore"):
        narrowed = NUMPY_DTYPES[datatype].type(value)
    if np.isinf(narrowed) and not np.isinf(value):
        raise OverflowError
    return value
