"""Runs a loaded model on made-up rows, so that its first caller does not pay for first times."""

import itertools
from collections.abc import Sequence

import numpy as np
import structlog
from numpy.typing import NDArray

from headrace.backends.base import Backend
from headrace.errors import BackendError, InvalidTensor
from headrace.tensors import TensorSpec

_LOG = structlog.get_logger(__name__)

MAX_WARM_UP_ROWS = 256
MAX_WARM_UP_BYTES = 16 << 20
"""Larger batches are as warm: what is allocated and chosen first depends little on the rest."""


def warm_up(
    backend: Backend,
    max_batch_size: int,
    preferred_batch_sizes: Sequence[int],
    allowed_batch_sizes: Sequence[int] = (),
) -> bool:
    """
    Run a model once for one row, each preferred batch and the largest; or each allowed batch.

    Rows are zeros and empty texts, and variable dimensions 1. A model that cannot run these is as
    good as before: what it must be able to run is in its `golden.npz`.

    Args:
        backend: The model.
        max_batch_size: As configured; 0 for a model without a batch dimension.
        preferred_batch_sizes: As configured.
        allowed_batch_sizes: As configured. All of them are run, however large they are: a backend
            that wants static shapes does its work on the first batch of each.

    Returns:
        Whether all of it ran.
    """
    row_bytes = sum(_zeros(spec, 1).nbytes for spec in backend.inputs)
    most = max(1, min(MAX_WARM_UP_ROWS, MAX_WARM_UP_BYTES // max(1, row_bytes)))
    sizes = {min(size, most) for size in (1, *preferred_batch_sizes, max_batch_size)}
    for rows in allowed_batch_sizes or sorted(sizes - {0}):
        try:
            backend.infer({spec.name: _zeros(spec, rows) for spec in backend.inputs})
        except (BackendError, InvalidTensor) as error:
            _LOG.info("warm_up_failed", rows=rows, error=str(error))
            return False
        if not max_batch_size:
            break
    return True


def _zeros(spec: TensorSpec, rows: int) -> NDArray[np.generic]:
    dims = itertools.chain((rows,), itertools.repeat(1))
    shape = tuple(
        fill if want == -1 else want for want, fill in zip(spec.shape, dims, strict=False)
    )
    filler = b"" if spec.datatype == "BYTES" else 0
    return np.full(shape, filler, spec.dtype)
