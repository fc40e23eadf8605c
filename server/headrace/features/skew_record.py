"""The sampled rows of one batch, cut out of its arrays for the skew log."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from headrace.features.key_sample import sampled_rows
from headrace.features.plan import FeaturePlan
from headrace.features.store import FeatureRows

_RECORD_BYTES = 1_024
"""What a record holds besides its arrays' contents, about."""

_LIST_ELEMENT_BYTES = 32


class SkewSource:
    """
    One served version, or one selection that is read without a model.

    Args:
        model: Its name; empty for feature reads.
        version: Its version, as text; likewise.
        id_prefix: What its prediction ids begin with; None for feature reads, which have none.
        plan: What is read for it.

    Attributes:
        file_key: Equal for those whose rows are of one file.
        key_names: The plan's join keys, sorted.
    """

    __slots__ = ("file_key", "id_prefix", "key_names", "model", "plan", "version")

    def __init__(self, model: str, version: str, id_prefix: str | None, plan: FeaturePlan) -> None:
        self.model = model
        self.version = version
        self.id_prefix = id_prefix
        self.plan = plan
        self.file_key = model, version, plan
        # Services name their keys in different orders; an entity is sampled by all or by none.
        self.key_names = tuple(sorted([key.name for key in plan.join_keys]))


class SkewRecord(NamedTuple):
    """
    The sampled rows of one batch; k of them.

    Args:
        source: Whose.
        keys: By join key, shape (k,).
        values: One per feature of the plan, shape (k,); one array of all of them, shape (features,
            k), where they are all FLOAT.
        statuses: Shape (features, k).
        event_times_s: Shape (views, k).
        places: Where in the batch the rows were, shape (k,).
        first_number: Of the batch's first request; the others follow.
        request_rows: Rows of each request; none where each has one.
        time_s: When the features were read, Unix seconds.
        byte_count: What it holds in memory, about.
        parts: In a batch with parts of requests, each one's request number, and the row of its
            request with which it begins.
    """

    source: SkewSource
    keys: dict[str, NDArray[Any]]
    values: Sequence[NDArray[Any]] | NDArray[Any]
    statuses: NDArray[np.uint8]
    event_times_s: NDArray[np.float64]
    places: NDArray[np.intp]
    first_number: int
    request_rows: Sequence[int]
    time_s: float
    byte_count: int
    parts: tuple[Sequence[int], Sequence[int]] | None = None


def sampled_record(
    source: SkewSource,
    entities: Mapping[str, NDArray[Any]],
    features: FeatureRows,
    *,
    threshold: NDArray[np.uint64],
    first_number: int,
    request_rows: Sequence[int],
    time_s: float,
    parts: tuple[Sequence[int], Sequence[int]] | None = None,
) -> SkewRecord | None:
    """
    Copy the sampled rows of a batch.

    A service without join keys has no key to go by: its rows are sampled one by one.

    Args:
        source: Whose batch it is.
        entities: What was read, by join key, n keys each.
        features: What was found, n rows.
        threshold: See `key_sample`.
        first_number: Of the batch's first request.
        request_rows: Rows of each request; n together. Not to be changed any more.
        time_s: When the features were read, Unix seconds.
        parts: See `SkewRecord`.

    Returns:
        None when no row is sampled.
    """
    keys = [entities[name] for name in source.key_names]
    if not keys:
        keys = [np.arange(first_number, first_number + features.statuses.shape[1])]
    places = sampled_rows(keys, threshold)
    if not places.size:
        return None
    if features.matrix is not None:
        matrix = features.matrix[places]
        values: Sequence[NDArray[Any]] | NDArray[Any] = matrix.T
        held = matrix.nbytes
    else:
        values = [column[places] for column in features.values]
        held = sum([_held_bytes(column) for column in values])
    own = {name: entities[name][places] for name in source.key_names}
    statuses = features.statuses[:, places]
    event_times_s = features.event_times_s[:, places]
    held += sum([_held_bytes(key) for key in own.values()])
    if parts is None and len(request_rows) == features.statuses.shape[1]:
        request_rows = ()
    held += statuses.nbytes + event_times_s.nbytes + places.nbytes + 8 * len(request_rows)
    return SkewRecord(
        source=source,
        keys=own,
        values=values,
        statuses=statuses,
        event_times_s=event_times_s,
        places=places,
        first_number=first_number,
        request_rows=request_rows,
        time_s=time_s,
        byte_count=held + _RECORD_BYTES,
        parts=parts,
    )


def _held_bytes(column: NDArray[Any]) -> int:
    held = column.nbytes
    if column.dtype.kind == "O":
        for value in column.tolist():
            held += sys.getsizeof(value)
            if isinstance(value, list):
                held += sum([max(sys.getsizeof(one), _LIST_ELEMENT_BYTES) for one in value])
    return held
