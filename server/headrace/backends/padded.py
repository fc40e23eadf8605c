"""Runs a model on batches of a few sizes only, for backends that want static shapes.

A batch of another size is filled up with rows of its own, which any model can run that can run the
batch, and what comes back for them is cut off.

Source: TensorFlow Serving, `allowed_batch_sizes` and its padding (`batching/README.md`).
"""

import threading
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from headrace.backends.base import Backend
from headrace.errors import BackendError
from headrace.tensors import TensorSpec


class PaddedBackend:
    """
    A backend that sees batches of the allowed sizes alone. See `backends.base.Backend`.

    Args:
        model: The name used in messages.
        backend: Runs the model; closed with this one.
        sizes: Allowed rows of a batch, ascending. A batch of more rows than the last is run in
            several.
    """

    def __init__(self, model: str, backend: Backend, sizes: Sequence[int]) -> None:
        self.backend = backend
        self.rows_added = 0
        """Rows that batches were filled up with."""
        self._model = model
        self._sizes = tuple(sizes)
        self._counting = threading.Lock()

    @property
    def inputs(self) -> Sequence[TensorSpec]:
        return [self._with_any_rows(spec) for spec in self.backend.inputs]

    @property
    def outputs(self) -> Sequence[TensorSpec]:
        return [self._with_any_rows(spec) for spec in self.backend.outputs]

    @property
    def is_remote(self) -> bool:
        return self.backend.is_remote

    def infer(
        self,
        inputs: Mapping[str, NDArray[np.generic]],
        timeout_s: float | None = None,
        traceparent: str | None = None,
    ) -> Sequence[NDArray[np.generic]]:
        """
        Run the model on a batch filled up to an allowed size.

        Raises:
            BackendError: it did not return a row for each row; or as the backend does.
        """
        rows = len(next(iter(inputs.values())))
        most = self._sizes[-1]
        if rows <= most:
            return self._run(inputs, rows, timeout_s, traceparent)
        parts = [
            self._run(
                {name: array[start : start + most] for name, array in inputs.items()},
                min(most, rows - start),
                timeout_s,
                traceparent,
            )
            for start in range(0, rows, most)
        ]
        return [np.concatenate(arrays) for arrays in zip(*parts, strict=True)]

    def close(self) -> None:
        """Free the model."""
        self.backend.close()

    def _run(
        self,
        inputs: Mapping[str, NDArray[np.generic]],
        rows: int,
        timeout_s: float | None,
        traceparent: str | None,
    ) -> Sequence[NDArray[np.generic]]:
        size = self._sizes[bisect_left(self._sizes, rows)]
        if size > rows:
            places = np.arange(size) % rows
            inputs = {name: array[places] for name, array in inputs.items()}
            with self._counting:
                self.rows_added += size - rows
        if self.backend.is_remote:
            arrays = self.backend.infer(inputs, timeout_s, traceparent)
        else:
            arrays = self.backend.infer(inputs)
        if size == rows:
            return arrays
        if any(array.shape[:1] != (size,) for array in arrays):
            raise BackendError(f"model '{self._model}' did not return a row for each row")
        return [array[:rows] for array in arrays]

    def _with_any_rows(self, spec: TensorSpec) -> TensorSpec:
        """Return the spec as callers may see it; a model of one size may have it in its file."""
        if len(self._sizes) == 1 and spec.shape[:1] == self._sizes:
            return replace(spec, shape=(-1, *spec.shape[1:]))
        return spec
