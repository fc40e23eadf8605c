"""A backend that is one Python function: for tests, and for a first run without a model file."""

import threading
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import structlog
from numpy.typing import NDArray

from headrace.errors import BackendError
from headrace.tensors import TensorSpec

_LOG = structlog.get_logger(__name__)

StubFunction = Callable[[Mapping[str, NDArray[np.generic]]], Sequence[NDArray[np.generic]]]


class StubBackend:
    """
    Runs a pure numpy function as a model. See `backends.base.Backend`.

    Args:
        model: The name used in messages.
        inputs: What the function takes.
        outputs: What it returns, in this order.
        function: From arrays by input name to one array per output, row for row. It keeps
            nothing and changes nothing, so that threads may call it side by side.
        gate: When given, each `infer` waits until it is set: a test holds a batch that way.
        gate_timeout_s: Longest such wait; then the batch fails, so that nothing hangs for ever.
    """

    is_remote = False

    def __init__(
        self,
        model: str,
        inputs: Sequence[TensorSpec],
        outputs: Sequence[TensorSpec],
        function: StubFunction,
        *,
        gate: threading.Event | None = None,
        gate_timeout_s: float = 60.0,
    ) -> None:
        self.inputs = tuple(inputs)
        self.outputs = tuple(outputs)
        self.entered = threading.Semaphore(0)
        """Released once per `infer`, before it waits at the gate: acquire it to know of a batch."""
        self._model = model
        self._function = function
        self._gate = gate
        self._gate_timeout_s = gate_timeout_s

    def infer(
        self,
        inputs: Mapping[str, NDArray[np.generic]],
        timeout_s: float | None = None,  # noqa: ARG002 a run cannot be ended
        traceparent: str | None = None,  # noqa: ARG002 nothing is called
    ) -> Sequence[NDArray[np.generic]]:
        """
        Apply the function.

        Raises:
            BackendError: the function raised, or returned something else than its outputs; or the
                gate stayed closed.
        """
        self.entered.release()
        if self._gate is not None and not self._gate.wait(self._gate_timeout_s):
            raise BackendError(f"model '{self._model}' was held for too long")
        try:
            results = self._function(inputs)
        except Exception as error:
            _LOG.debug("stub_failed", model=self._model, error=str(error))
            raise BackendError(f"model '{self._model}' failed on this batch") from error
        if [array.dtype for array in results] != [spec.dtype for spec in self.outputs]:
            raise BackendError(f"model '{self._model}' failed on this batch")
        # Not `ascontiguousarray`, which turns a scalar into an array of one.
        return [np.asarray(array, order="C") for array in results]

    def close(self) -> None:
        """Forget the function."""
        del self._function
