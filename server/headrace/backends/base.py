"""The contract of a backend: one loaded model version that can run a batch."""

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from headrace.tensors import TensorSpec


class Backend(Protocol):
    """
    One model version, loaded and able to run.

    `infer` may be called from several threads at once. `close` is called once, when no `infer`
    runs any more. A batch of n rows gives the same rows as n batches of one.
    """

    @property
    def inputs(self) -> Sequence[TensorSpec]:
        """The tensors the model itself takes; −1 for a variable dimension, batch included."""

    @property
    def outputs(self) -> Sequence[TensorSpec]:
        """The tensors the model itself returns, in the order of `infer`'s result."""

    @property
    def is_remote(self) -> bool:
        """Whether the model runs on another server, so that time limits can be kept."""

    def infer(
        self,
        inputs: Mapping[str, NDArray[np.generic]],
        timeout_s: float | None = None,
        traceparent: str | None = None,
    ) -> Sequence[NDArray[np.generic]]:
        """
        Run the model once.

        Args:
            inputs: One array per input, by name, of the spec's dtype; BYTES as object arrays of
                `bytes`. Not kept and not written to.
            timeout_s: How long anybody waits for the answer; kept by a remote model only.
            traceparent: The span that this call is a part of, for a remote model; see W3C Trace
                Context.

        Returns:
            One array per output, in `outputs` order; BYTES as object arrays of `bytes` or `str`.

        Raises:
            InvalidTensor: an element of a BYTES input is not what the model takes.
            BackendError: the model failed on these inputs; the message names no internals.
            BackendUnavailable: the model runs elsewhere and does not answer, or not within its own
                limit.
            DeadlineExceeded: likewise, not within `timeout_s`.
            Overloaded: it has too much to do there.
        """

    def close(self) -> None:
        """Free the model."""
