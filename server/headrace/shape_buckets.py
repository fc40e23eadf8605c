"""Requests whose variable dimensions differ share a batch: they are padded, and their answers cut.

Pure. Whether a model gives the same answers for padded rows, only its owner knows: nothing is
padded unless its `config.pbtxt` says so.
"""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from headrace.errors import BackendError, InvalidTensor
from headrace.repository.shapes import BucketRules
from headrace.request import AnsweredBatch, OutputBlock, Request
from headrace.tensors import Signature, TensorSpec, join

KNOWN_SHAPES_MAX = 1_024

_Shapes = tuple[tuple[int, ...], ...]
"""Of each input, a shape after the row."""


class ShapeBuckets:
    """
    Pads the requests of one model, and cuts its answers back.

    Args:
        rules: Which dimensions, and to what.
        signature: Of the model.
    """

    def __init__(self, rules: BucketRules, signature: Signature) -> None:
        self._model = signature.model
        self._rules = rules
        self._names = tuple(spec.name for spec in signature.inputs)
        self._inputs = [_named_axes(spec, rules.inputs) for spec in signature.inputs]
        self._outputs = [_named_axes(spec, rules.outputs) for spec in signature.outputs]
        self._fillers = [_filler(spec, rules) for spec in signature.inputs]
        self._known: dict[_Shapes, _Shapes] = {}

    def place(self, own_shapes: _Shapes) -> _Shapes:
        """
        Return the shapes that a request is padded to.

        Raises:
            InvalidTensor: a dimension is larger than its largest size; or inputs differ in one that
                they share.
        """
        shapes = self._known.get(own_shapes)
        if shapes is None:
            shapes = self._place(own_shapes)
            if len(self._known) >= KNOWN_SHAPES_MAX:
                self._known.clear()
            self._known[own_shapes] = shapes
        return shapes

    def join(self, i: int, spec: TensorSpec, batch: Sequence[Request]) -> NDArray[np.generic]:
        """Make one array of input `i` of several requests of one place, padded where needed."""
        rows = sum([request.rows for request in batch])
        bucket = batch[0].batch_key[i]
        if all(request.own_shapes[i] == bucket for request in batch):
            return join(spec, [request.raws[i] for request in batch], (rows, *bucket))
        whole: NDArray[np.generic] = np.full((rows, *bucket), self._fillers[i], spec.dtype)
        start = 0
        for request in batch:
            own = request.own_shapes[i]
            place = (slice(start, start + request.rows), *map(slice, own))
            whole[place] = join(spec, [request.raws[i]], (request.rows, *own))
            start += request.rows
        return whole

    def check(self, outputs: Sequence[OutputBlock], shapes: _Shapes) -> None:
        """
        Check that the dimensions that are to be cut are as large as the padded ones of the inputs.

        Raises:
            BackendError: the model does not do what its configuration says.
        """
        sizes = self._sizes(shapes)
        for block, axes in zip(outputs, self._outputs, strict=True):
            for axis, dim in axes:
                if block.trailing[axis : axis + 1] != (sizes[dim],):
                    raise BackendError(
                        f"output '{block.spec.name}' of model '{self._model}' does not follow "
                        f"'{dim}', as its configuration says"
                    )

    def cut(self, batch: AnsweredBatch, request: Request) -> AnsweredBatch:
        """Return a batch as a request of its own shapes shall see it."""
        if request.own_shapes == request.batch_key or not self._rules.outputs:
            return batch
        sizes = self._sizes(request.own_shapes)
        outputs = tuple(
            block.cut({axis: sizes[dim] for axis, dim in axes}) if axes else block
            for block, axes in zip(batch.outputs, self._outputs, strict=True)
        )
        return replace(
            batch, outputs=outputs, output_shapes=tuple([block.trailing for block in outputs])
        )

    def _place(self, own_shapes: _Shapes) -> _Shapes:
        sizes = self._sizes(own_shapes)
        padded = []
        for name, shape, axes in zip(self._names, own_shapes, self._inputs, strict=True):
            bucket = list(shape)
            for axis, dim in axes:
                allowed = self._rules.sizes[dim]
                at = bisect_left(allowed, sizes[dim])
                if at == len(allowed):
                    raise InvalidTensor(
                        f"input '{name}' for model '{self._model}' has {sizes[dim]} in dimension "
                        f"{axis + 1}; at most {allowed[-1]} are accepted"
                    )
                bucket[axis] = allowed[at]
            padded.append(tuple(bucket))
        return tuple(padded)

    def _sizes(self, shapes: _Shapes) -> dict[str, int]:
        sizes: dict[str, int] = {}
        firsts: dict[str, str] = {}
        for name, shape, axes in zip(self._names, shapes, self._inputs, strict=True):
            for axis, dim in axes:
                first = firsts.setdefault(dim, name)
                size = sizes.setdefault(dim, shape[axis])
                if shape[axis] != size:
                    raise InvalidTensor(
                        f"input '{name}' for model '{self._model}' has {shape[axis]} in dimension "
                        f"{axis + 1}, and input '{first}' has {size} there; expected as many"
                    )
        return sizes


def _named_axes(
    spec: TensorSpec, named: Mapping[str, tuple[str | None, ...]]
) -> tuple[tuple[int, str], ...]:
    """Return which axes after the row have which name."""
    variable = [axis for axis, size in enumerate(spec.shape[1:]) if size == -1]
    dims = named.get(spec.name, ())
    return tuple((axis, dim) for axis, dim in zip(variable, dims, strict=False) if dim is not None)


def _filler(spec: TensorSpec, rules: BucketRules) -> bool | int | float | bytes:
    value = rules.pad.get(spec.name, "" if spec.datatype == "BYTES" else 0)
    return value.encode() if isinstance(value, str) else value
