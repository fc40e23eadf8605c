"""Runs a loaded model on made-up rows, so that its first caller does not pay for first times."""

import itertools
from collections.abc import Mapping, Sequence

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
    shapes: Sequence[Mapping[str, Sequence[int]]] = (),
) -> bool:
    """
    Run a model once for one row, each preferred batch and the largest; or each allowed batch.

    Rows are zeros and empty texts, and variable dimensions 1 unless `shapes` says otherwise. A
    model that cannot run these is as good as before: what it must be able to run is in its
    `golden.npz`.

    Args:
        backend: The model.
        max_batch_size: As configured; 0 for a model without a batch dimension.
        preferred_batch_sizes: As configured.
        allowed_batch_sizes: As configured. All of them are run, however large they are: a backend
            that wants static shapes does its work on the first batch of each.
        shapes: By input, what its variable dimensions after the batch dimension are: all of this is
            done for each. An input that is not there has 1.

    Returns:
        Whether all of it ran.
    """
    shapes = shapes or [{}]
    row_bytes = sum(_zeros(spec, 1, shapes[-1]).nbytes for spec in backend.inputs)
    most = max(1, min(MAX_WARM_UP_ROWS, MAX_WARM_UP_BYTES // max(1, row_bytes)))
    sizes = {min(size, most) for size in (1, *preferred_batch_sizes, max_batch_size)}
    for shape, rows in itertools.product(shapes, allowed_batch_sizes or sorted(sizes - {0})):
        try:
            backend.infer({spec.name: _zeros(spec, rows, shape) for spec in backend.inputs})
        except (BackendError, InvalidTensor) as error:
            _LOG.info("warm_up_failed", rows=rows, error=str(error))
            return False
        if not max_batch_size:
            break
    return True


def _zeros(spec: TensorSpec, rows: int, sizes: Mapping[str, Sequence[int]]) -> NDArray[np.generic]:
    variable = itertools.chain(sizes.get(spec.name, ()), itertools.repeat(1))
    shape = tuple(
        want if want != -1 else rows if axis == 0 else next(variable)
        for axis, want in enumerate(spec.shape)
    )
    filler = b"" if spec.datatype == "BYTES" else 0
    return np.full(shape, filler, spec.dtype)
