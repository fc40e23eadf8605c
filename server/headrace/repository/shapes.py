"""The parameter `shape_buckets`: the sizes to which variable dimensions are padded."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from headrace.errors import ModelLoadError
from headrace.repository.parameters import shown, wrong
from headrace.tensors import NUMPY_DTYPES, TensorSpec

SIZES_MAX = 64
DIMENSIONS_MAX = 8

Padding = bool | int | float | str


@dataclass(frozen=True, slots=True)
class BucketRules:
    """
    How requests of different shapes share a batch.

    Args:
        sizes: By dimension, what it is padded to, ascending.
        inputs: By input, the dimension that each of its variable ones is, batch dimension left out;
            None for one that is not padded.
        outputs: By output, likewise: what a variable dimension of it is cut back to.
        pad: By input, what it is padded with, where that is not 0, false or the empty text.
    """

    sizes: Mapping[str, tuple[int, ...]]
    inputs: Mapping[str, tuple[str | None, ...]]
    outputs: Mapping[str, tuple[str | None, ...]]
    pad: Mapping[str, Padding]

    def shapes(self) -> list[dict[str, list[int]]]:
        """
        Return shapes in which every size occurs, ascending; see `warm_up`.

        The first sizes of all dimensions come together, then the second ones, and so on: not all
        combinations, which may be many.
        """
        count = max(map(len, self.sizes.values()))
        return [
            {
                name: [
                    1 if dim is None else self.sizes[dim][min(i, len(self.sizes[dim]) - 1)]
                    for dim in dims
                ]
                for name, dims in self.inputs.items()
            }
            for i in range(count)
        ]


def shape_buckets(text: str | None) -> BucketRules | None:
    """
    Read the parameter.

    Raises:
        ModelLoadError: it is not what `docs/operations.md` says.
    """
    if text is None:
        return None
    try:
        given = json.loads(text)
    except (ValueError, RecursionError):
        raise _wrong("is not JSON") from None
    if not isinstance(given, dict) or not {"sizes", "inputs"} <= given.keys():
        raise _wrong(f"is {shown(text)}; expected a JSON object with 'sizes' and 'inputs'")
    if unknown := given.keys() - {"sizes", "inputs", "outputs", "pad"}:
        raise _wrong(
            f"has {shown(min(unknown))}; expected 'sizes', 'inputs', 'outputs' and 'pad' alone"
        )
    for key, value in given.items():
        if not isinstance(value, dict):
            raise _wrong(f"has {shown(json.dumps(value))} as '{key}'; expected a JSON object")
    return BucketRules(
        sizes=_sizes(given["sizes"]),
        inputs={
            name: _dims("inputs", name, d, given["sizes"]) for name, d in given["inputs"].items()
        },
        outputs={
            name: _dims("outputs", name, d, given["sizes"])
            for name, d in given.get("outputs", {}).items()
        },
        pad=_pad(given.get("pad", {}), given["inputs"]),
    )


def check_shape_buckets(
    rules: BucketRules,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    max_batch_size: int,
) -> None:
    """
    Check the rules against what the model takes and returns.

    Raises:
        ModelLoadError: they do not fit.
    """
    if not max_batch_size:
        raise wrong("parameter 'shape_buckets' needs a max_batch_size above 0")
    for kind, named, specs in (
        ("input", rules.inputs, {spec.name: spec for spec in inputs}),
        ("output", rules.outputs, {spec.name: spec for spec in outputs}),
    ):
        for name, dims in named.items():
            if name not in specs:
                raise _wrong(f"has {kind} {shown(name)}; expected one of {sorted(specs)}")
            variable = specs[name].shape[1:].count(-1)
            if len(dims) != variable:
                raise _wrong(
                    f"names {len(dims)} dimensions of {kind} '{name}', which has {variable} "
                    "variable ones after the batch dimension; expected a name, or null, for each"
                )
    padded = {dim for dims in rules.inputs.values() for dim in dims}
    for name, dims in rules.outputs.items():
        for dim in dims:
            if dim is not None and dim not in padded:
                raise _wrong(f"cuts output '{name}' by '{dim}', which no input has")
    datatypes = {spec.name: spec.datatype for spec in inputs}
    for name, value in rules.pad.items():
        _check_padding(name, value, datatypes[name])


def _sizes(given: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    if not 0 < len(given) <= DIMENSIONS_MAX:
        raise _wrong(f"has {len(given)} dimensions in 'sizes'; expected 1 to {DIMENSIONS_MAX}")
    for name, sizes in given.items():
        if (
            not isinstance(sizes, list)
            or not 0 < len(sizes) <= SIZES_MAX
            or not all(type(size) is int and 0 < size < 1 << 31 for size in sizes)
            or sorted(set(sizes)) != sizes
        ):
            raise _wrong(
                f"has {shown(json.dumps(sizes))} as sizes of {shown(name)}; "
                f"expected 1 to {SIZES_MAX} whole numbers above 0, ascending"
            )
    return {name: tuple(sizes) for name, sizes in given.items()}


def _dims(kind: str, name: str, dims: Any, sizes: Mapping[str, Any]) -> tuple[str | None, ...]:
    if not isinstance(dims, list) or not all(
        dim is None or dim in sizes for dim in map(_key, dims)
    ):
        raise _wrong(
            f"has {shown(json.dumps(dims))} for {shown(name)} in '{kind}'; expected a list of "
            f"names from 'sizes', {sorted(sizes)}, or null"
        )
    if not any(dims):
        raise _wrong(f"names no dimension of {shown(name)} in '{kind}'; leave it out")
    return tuple(dims)


def _key(dim: Any) -> Any:
    """Return what can be looked up: a list or object is none of the names."""
    return dim if dim is None or isinstance(dim, str) else ""


def _pad(given: Mapping[str, Any], inputs: Mapping[str, Any]) -> dict[str, Padding]:
    for name, value in given.items():
        if name not in inputs:
            raise _wrong(f"has {shown(name)} in 'pad'; expected one of 'inputs', {sorted(inputs)}")
        if not isinstance(value, bool | int | float | str):
            raise _wrong(f"pads {shown(name)} with {shown(json.dumps(value))}; expected one value")
    return dict(given)


def _check_padding(name: str, value: Padding, datatype: str) -> None:
    dtype = NUMPY_DTYPES[datatype]
    is_kind = {
        "O": isinstance(value, str),
        "b": isinstance(value, bool),
        "f": isinstance(value, int | float) and not isinstance(value, bool),
    }.get(dtype.kind, type(value) is int)
    if not is_kind or not _can_be_stored(value, dtype):
        raise _wrong(f"pads input '{name}', which is {datatype}, with {shown(json.dumps(value))}")


def _can_be_stored(value: Padding, dtype: np.dtype[np.generic]) -> bool:
    """Say whether an array takes a value of its kind, so that no request finds out."""
    try:
        if isinstance(value, str):
            value.encode()  # half of a surrogate pair, which JSON can name, has no bytes
            return True
        with np.errstate(over="ignore"):
            stored = np.array(value, dtype)
    except (OverflowError, UnicodeEncodeError):
        return False
    return dtype.kind != "f" or bool(np.isfinite(stored)) or not math.isfinite(value)


def _wrong(fact: str) -> ModelLoadError:
    return wrong(f"parameter 'shape_buckets' {fact}")
