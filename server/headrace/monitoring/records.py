"""Prediction batches on the wire: finished batches into columns, columns out of bytes."""

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from headrace.errors import InvalidTensor
from headrace.monitoring.profile import COLUMNS_MAX, TEXT_BYTES_MAX
from headrace.tensors import BYTES_ELEMENTS_MAX, NUMPY_DTYPES, check_bytes, encode, iterate_bytes
from headrace.v1 import monitor_service_pb2 as pb

WIDTH_MAX = 256
"""A tensor with more values per row is an image or an embedding: not something to bin by column."""

ROWS_MAX = 1 << 20
"""Of one batch of the wire, so that a message cannot ask for more memory than it brings."""

ID_PREFIX_LENGTH_MAX = 64
NAME_LENGTH_MAX = 256

_PRESENT = 1
_BLOCK_BYTES_MAX = 24 << 20
"""Of a batch's inputs, and of its outputs: both are one message at the most."""

_TEXTS_MAX = BYTES_ELEMENTS_MAX // 2
"""Elements of text in one batch: several batches share a block."""


class Block(NamedTuple):
    """
    A tensor that is recorded, the same for every batch of a version.

    Args:
        tensor: Its name among the batch's inputs; for an output, its name.
        columns: A name for each value of a row.
        datatype: Open Inference Protocol's.
        features: For each column, which feature of the plan it is; None for a request-time value.
            Empty when callers send all of it.
    """

    tensor: str
    columns: tuple[str, ...]
    datatype: str
    features: tuple[int | None, ...] = ()


class RecordSchema(NamedTuple):
    """
    Whose batches they are, and what is recorded of them.

    Args:
        model: Its name.
        version: Its number.
        id_prefix: What its prediction ids begin with.
        inputs: As the model sees them.
        outputs: In signature order; None for one that is not recorded.
    """

    model: str
    version: int
    id_prefix: str
    inputs: tuple[Block, ...]
    outputs: tuple[Block | None, ...]


class BatchRecord(NamedTuple):
    """
    One answered batch. Its arrays are nobody else's to write to.

    Args:
        schema: What they are.
        first_number: Of the batch's first request; the others follow.
        request_rows: Rows of each request.
        rows: Their sum.
        inputs: By input name, shape (rows, …).
        statuses: Shape (features, rows), Feast's; None for a model without features.
        outputs: In signature order, shape (rows, …).
        time_s: When it was answered, Unix seconds.
        byte_count: What it holds in memory, about.
        parts: In a batch with parts of requests, each one's request number, and the row of its
            request with which it begins.
    """

    schema: RecordSchema
    first_number: int
    request_rows: Sequence[int]
    rows: int
    inputs: dict[str, NDArray[Any]]
    statuses: NDArray[np.uint8] | None
    outputs: Sequence[NDArray[Any]]
    time_s: float
    byte_count: int
    parts: tuple[Sequence[int], Sequence[int]] | None = None


class Column(NamedTuple):
    """
    One column of received rows.

    Args:
        values: Shape (n,); `bytes` objects for text.
        statuses: Feast's, shape (n,); None when callers sent the values.
    """

    values: NDArray[Any]
    statuses: NDArray[np.uint8] | None


class PredictionRows(NamedTuple):
    """
    Rows of one model version, as they were received.

    Args:
        model: Its name, as the gateway says.
        version: Its number.
        time_s: When the first of them was answered, Unix seconds.
        id_prefix: What their prediction ids begin with.
        request_numbers: One per request, shape (requests,).
        request_rows: Rows of each request, likewise.
        rows: Their sum, n.
        features: By column.
        predictions: By output column.
        first_rows: The row of each request with which these begin, shape (requests,); None when
            they all begin with row 0.
    """

    model: str
    version: int
    time_s: float
    id_prefix: str
    request_numbers: NDArray[np.int64]
    request_rows: NDArray[np.int64]
    rows: int
    features: dict[str, Column]
    predictions: dict[str, Column]
    first_rows: NDArray[np.int64] | None = None


def column_names(tensor: str, trailing: Sequence[int]) -> tuple[str, ...] | None:
    """
    Name the values of a tensor's row: `x` for one, `x[0]`, `x[1]`, … for more.

    Returns:
        None when their number is not fixed, or over `WIDTH_MAX`.
    """
    width = math.prod(trailing)
    if any(size < 1 for size in trailing) or width > WIDTH_MAX:
        return None
    return (tensor,) if width == 1 else tuple(f"{tensor}[{i}]" for i in range(width))


def fitting(blocks: Iterable[Block], rows_max: int) -> list[Block]:
    """
    Keep the blocks that a monitor takes; a message that is over its limits would be lost whole.

    Args:
        blocks: Of inputs or of outputs.
        rows_max: Of a batch.
    """
    kept: list[Block] = []
    width = size = 0
    for block in blocks:
        own = len(block.columns)
        itemsize = TEXT_BYTES_MAX if block.datatype == "BYTES" else _itemsize(block.datatype)
        texts = own * rows_max if block.datatype == "BYTES" else 0
        if (
            all(len(name) <= NAME_LENGTH_MAX for name in block.columns)
            and texts <= _TEXTS_MAX
            and width + own <= COLUMNS_MAX
            and size + own * itemsize * rows_max <= _BLOCK_BYTES_MAX
        ):
            kept.append(block)
            width += own
            size += own * itemsize * rows_max
    return kept


def to_wire(records: Iterable[BatchRecord]) -> list[pb.PredictionBatch]:
    """Put batches of one version together, in order: columns are joined once for all of them."""
    groups: dict[int, list[BatchRecord]] = {}
    for record in records:
        groups.setdefault(id(record.schema), []).append(record)
    return [_group_to_wire(group) for group in groups.values()]


def from_wire(batch: pb.PredictionBatch) -> PredictionRows:
    """
    Take a received batch apart.

    Raises:
        ValueError: it contradicts itself, or is over a limit; the message says how.
    """
    numbers = np.array(batch.request_numbers, np.uint64)
    request_rows = np.array(batch.request_rows, np.int64)
    rows = int(request_rows.sum())
    if len(numbers) != len(request_rows):
        raise ValueError(f"{len(numbers)} request numbers and {len(request_rows)} request rows")
    first_rows = np.array(batch.first_rows, np.int64)
    if len(first_rows) not in (0, len(numbers)):
        raise ValueError(f"{len(numbers)} request numbers and {len(first_rows)} first rows")
    if len(numbers) and int(numbers.max()) >= 1 << 40:
        raise ValueError("a request number does not fit ten hexadecimal digits")
    if not 0 < rows <= ROWS_MAX:
        raise ValueError(f"a batch has {rows} rows; expected 1 to {ROWS_MAX}")
    if len(batch.id_prefix) > ID_PREFIX_LENGTH_MAX or len(batch.model_name) > NAME_LENGTH_MAX:
        raise ValueError("a name is too long")
    return PredictionRows(
        model=batch.model_name,
        version=batch.model_version,
        time_s=batch.answer_time.seconds + batch.answer_time.nanos / 1e9,
        id_prefix=batch.id_prefix,
        request_numbers=numbers.astype(np.int64),
        request_rows=request_rows,
        rows=rows,
        features=_columns(batch.inputs, rows),
        predictions=_columns(batch.outputs, rows),
        first_rows=first_rows if len(first_rows) else None,
    )


def parse_prediction_id(text: str) -> tuple[str, int, int] | None:
    """Split `<prefix><ten digits>/<row>` into prefix, number and row; None for no such id."""
    request, slash, row = text.partition("/")
    prefix, digits = request[:-10], request[-10:]
    if not prefix or len(prefix) > ID_PREFIX_LENGTH_MAX or (slash and not row.isdecimal()):
        return None
    if not row.isascii() or len(row) > 9 or len(digits) != 10:
        return None
    if not all(digit in "0123456789abcdef" for digit in digits):
        return None
    return prefix, int(digits, 16), int(row or 0)


def _group_to_wire(group: Sequence[BatchRecord]) -> pb.PredictionBatch:
    schema = group[0].schema
    numbers = [number for record in group for number in _numbers(record)]
    batch = pb.PredictionBatch(
        model_name=schema.model,
        model_version=schema.version,
        id_prefix=schema.id_prefix,
        request_numbers=numbers,
        request_rows=[rows for record in group for rows in record.request_rows],
    )
    if any(record.parts for record in group):
        for record in group:
            batch.first_rows.extend(
                record.parts[1] if record.parts else [0] * len(record.request_rows)
            )
    batch.answer_time.FromNanoseconds(int(group[0].time_s * 1e9))
    for block in schema.inputs:
        arrays = [record.inputs[block.tensor] for record in group]
        statuses = _statuses(block, group) if block.features else b""
        batch.inputs.append(_block_to_wire(block, arrays, statuses))
    for i, output in enumerate(schema.outputs):
        if output is not None:
            arrays = [record.outputs[i] for record in group]
            batch.outputs.append(_block_to_wire(output, arrays, b""))
    return batch


def _numbers(record: BatchRecord) -> Sequence[int]:
    if record.parts is not None:
        return record.parts[0]
    return range(record.first_number, record.first_number + len(record.request_rows))


def _block_to_wire(block: Block, arrays: Sequence[NDArray[Any]], statuses: bytes) -> pb.ValueBlock:
    values = arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
    if block.datatype == "BYTES":
        raw = encode(_shortened(values))
    else:
        raw = values.astype(NUMPY_DTYPES[block.datatype], copy=False).tobytes()
    return pb.ValueBlock(
        columns=block.columns, datatype=block.datatype, values=raw, statuses=statuses
    )


def _shortened(values: NDArray[Any]) -> NDArray[Any]:
    short = np.empty(values.size, np.object_)
    short[:] = [
        (value.encode(errors="replace") if isinstance(value, str) else value or b"")[
            :TEXT_BYTES_MAX
        ]
        for value in values.ravel().tolist()
    ]
    return short


def _statuses(block: Block, group: Sequence[BatchRecord]) -> bytes:
    given = [record.statuses for record in group if record.statuses is not None]
    statuses = given[0] if len(given) == 1 else np.concatenate(given, axis=1)
    columns = np.full((len(block.columns), statuses.shape[1]), _PRESENT, np.uint8)
    for i, feature in enumerate(block.features):
        if feature is not None:
            columns[i] = statuses[feature]
    return columns.tobytes()


def _itemsize(datatype: str) -> int:
    return NUMPY_DTYPES[datatype].itemsize


def _columns(blocks: Iterable[pb.ValueBlock], rows: int) -> dict[str, Column]:
    columns: dict[str, Column] = {}
    for block in blocks:
        width = len(block.columns)
        if not width or width + len(columns) > COLUMNS_MAX:
            raise ValueError(f"a block has no columns, or there are more than {COLUMNS_MAX}")
        values = _values(block, rows, width)
        statuses = None
        if block.statuses:
            if len(block.statuses) != rows * width:
                raise ValueError("statuses do not match rows and columns")
            statuses = np.frombuffer(block.statuses, np.uint8).reshape(width, rows)
        for i, name in enumerate(block.columns):
            if len(name) > NAME_LENGTH_MAX:
                raise ValueError("a column's name is too long")
            columns[name] = Column(values[:, i], None if statuses is None else statuses[i])
    return columns


def _values(block: pb.ValueBlock, rows: int, width: int) -> NDArray[Any]:
    if block.datatype == "BYTES":
        try:
            check_bytes(block.values, rows * width, block.columns[0], "")
        except InvalidTensor as error:
            raise ValueError(str(error)) from None
        texts = np.empty(rows * width, np.object_)
        texts[:] = list(iterate_bytes(block.values))
        return texts.reshape(rows, width)
    dtype = NUMPY_DTYPES.get(block.datatype)
    if dtype is None:
        raise ValueError(f"datatype {block.datatype[:16]!r} is not one of the protocol's")
    if len(block.values) != rows * width * dtype.itemsize:
        raise ValueError(f"a block of {rows} x {width} {block.datatype} has the wrong size")
    return np.frombuffer(block.values, dtype).reshape(rows, width)
