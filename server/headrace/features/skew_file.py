"""The skew log's files: feature vectors as served, in Parquet that anybody can read.

A file holds rows of one model version, or of one selection of features that was read without a
model. Columns: `prediction_id`, `request_time`, `model`, `version` (null and empty for such reads),
`registry_version`; `key.<join key>`; `value.<feature>` (null where nothing was found)
and `status.<feature>`; `event_time.<view>`, with the number of the key group behind it (`#1`) where
one view is read by two keys. The footer's entry `headrace.skew` is a `LoggedPlan` in JSON.
"""

import fcntl
import os
import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from headrace.features.logged_plan import logged_plan
from headrace.features.plan import FeatureStatus
from headrace.features.skew_record import SkewRecord, SkewSource
from headrace.features.values import ValueType

METADATA_KEY = b"headrace.skew"
FILE_PATTERN = "skew-*.parquet"

STATUS_NAMES = ("INVALID", *(status.name for status in FeatureStatus))

_GROUP_ROWS = 65_536
"""Of one row group: a reader may have to hold that much."""

_TEMPORARY_PREFIX = ".skew-"
_TEMPORARY_LIFE_S = 600.0
"""Nobody writes a file for so long: whoever began it has died."""

_LOCK_TIMEOUT_S = 5.0
_LOCK_PERIOD_S = 0.01

_TIME_LIMIT_S = 9e12
_TIME = pa.timestamp("us", "UTC")
_NAME = pa.dictionary(pa.int8(), pa.string())
_LISTS = {
    ValueType.BYTES_LIST: pa.binary(),
    ValueType.STRING_LIST: pa.string(),
    ValueType.INT32_LIST: pa.int32(),
    ValueType.INT64_LIST: pa.int64(),
    ValueType.DOUBLE_LIST: pa.float64(),
    ValueType.FLOAT_LIST: pa.float32(),
    ValueType.BOOL_LIST: pa.bool_(),
    ValueType.UNIX_TIMESTAMP_LIST: pa.int64(),
}


class Columns(NamedTuple):
    """
    Rows of one version, column by column.

    Args:
        source: Whose.
        batch: An Arrow record batch.
        byte_count: What it holds in memory.
    """

    source: SkewSource
    batch: Any
    byte_count: int


def to_columns(records: Sequence[SkewRecord]) -> Columns:
    """
    Put the records of one source together.

    Raises:
        pyarrow.ArrowInvalid: a value is not of the type that the plan declares.
    """
    source = records[0].source
    rows = sum(len(record.places) for record in records)
    plan = source.plan
    columns: dict[str, Any] = {
        "prediction_id": pa.array(_prediction_ids(records), pa.string()),
        "request_time": _times(
            np.repeat([record.time_s for record in records], [len(r.places) for r in records])
        ),
        "model": _constant(source.model, rows),
        "version": _constant(source.version, rows),
        "registry_version": _constant(plan.registry_version, rows),
    }
    for key in plan.join_keys:
        columns[f"key.{key.name}"] = _array(
            _joined([record.keys[key.name] for record in records]), key.value_type, None
        )
    statuses = _joined([record.statuses for record in records])
    matrices = [record.values for record in records if isinstance(record.values, np.ndarray)]
    matrix = _joined(matrices) if matrices else None  # one for all: a plan is FLOAT or it is not
    for i, feature in enumerate(plan.features):
        known = (statuses[i] == FeatureStatus.PRESENT) | (
            statuses[i] == FeatureStatus.OUTSIDE_MAX_AGE
        )
        own = matrix[i] if matrix is not None else _joined([r.values[i] for r in records])
        columns[f"value.{feature.name}"] = _array(own, feature.value_type, ~known)
        columns[f"status.{feature.name}"] = pa.DictionaryArray.from_arrays(
            pa.array(statuses[i].astype(np.int8)), pa.array(STATUS_NAMES)
        )
    event_times_s = _joined([record.event_times_s for record in records])
    for i, view in enumerate(logged_plan(plan).views):
        columns[view.column] = _times(event_times_s[i])
    batch = pa.RecordBatch.from_arrays(list(columns.values()), list(columns))
    return Columns(source, batch, batch.nbytes)


class SkewFolder:
    """
    The folder of a log. One thread writes; other processes may write their own files to it.

    Its files stay under the limit at any time, whoever wrote them: room is made and a file is added
    under a lock (`flock`, of the folder). Not counted is the file that each process is writing.
    Where the file system has no locks, or somebody holds it for seconds, it is done without.

    Args:
        path: Made when the first file is written.
        max_bytes: Most bytes of all files of the log.
    """

    def __init__(self, path: Path, max_bytes: int) -> None:
        self.files_deleted = 0
        self._path = path
        self._max_bytes = max_bytes
        self._token = secrets.token_hex(4)
        self._next_number = 0

    def write(self, columns: Sequence[Columns]) -> None:
        """
        Write a file: whole and synced, or not at all. The oldest go first where it does not fit.

        Raises:
            OSError: it cannot be written, or is larger than the whole log may be.
        """
        source = columns[0].source
        table = pa.Table.from_batches([one.batch for one in columns])
        table = table.replace_schema_metadata({METADATA_KEY: logged_plan(source.plan).to_json()})
        self._path.mkdir(parents=True, exist_ok=True)
        name = f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{self._token}-{self._next_number:06d}"
        self._next_number += 1
        temporary = self._path / f"{_TEMPORARY_PREFIX}{name}.tmp"
        try:
            with temporary.open("wb") as file:
                pq.write_table(table, file, compression="zstd", row_group_size=_GROUP_ROWS)
                file.flush()
                os.fsync(file.fileno())
                size = file.tell()
            folder = os.open(self._path, os.O_RDONLY)
            try:
                _lock(folder)
                self._make_room(size, temporary.name)
                temporary.rename(self._path / f"skew-{name}.parquet")
                with suppress(OSError):  # not every file system can
                    os.fsync(folder)  # its name, too, is to survive a power failure
            finally:
                os.close(folder)
        finally:
            temporary.unlink(missing_ok=True)

    def _make_room(self, size: int, own_name: str) -> None:
        if size > self._max_bytes:
            raise OSError(f"a file of {size} bytes where the whole log may have {self._max_bytes}")
        files, total = [], size
        dead_s = time.time() - _TEMPORARY_LIFE_S
        with os.scandir(self._path) as entries:
            for entry in entries:
                if entry.name.startswith(_TEMPORARY_PREFIX) and entry.name.endswith(".tmp"):
                    if _modified_s(entry) < dead_s:
                        Path(entry.path).unlink(missing_ok=True)
                    elif entry.name != own_name:  # another process is about to add it
                        total += _size(entry)
                elif Path(entry.name).match(FILE_PATTERN):
                    files.append((entry.name, _size(entry)))
        total += sum(one for _, one in files)
        for name, one in sorted(files):  # names begin with their time
            if total <= self._max_bytes:
                return
            with suppress(FileNotFoundError):  # another process was faster
                (self._path / name).unlink()
                self.files_deleted += 1
            total -= one


def _lock(folder: int) -> None:
    """Lock a folder until it is closed; without, where that takes too long or cannot be done."""
    deadline_s = time.monotonic() + _LOCK_TIMEOUT_S
    while True:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline_s:
                return
            time.sleep(_LOCK_PERIOD_S)
        except OSError:
            return
        else:
            return


def files_of(path: Path) -> Iterator[Path]:
    """Yield the files of a log, those in folders below too, oldest first."""
    yield from sorted(path.rglob(FILE_PATTERN), key=lambda file: (file.name, file))


def _prediction_ids(records: Sequence[SkewRecord]) -> list[str | None]:
    ids: list[str | None] = []
    for record in records:
        prefix, first = record.source.id_prefix, record.first_number
        if prefix is None:
            ids += [None] * len(record.places)
            continue
        if not record.request_rows:
            ids += [f"{prefix}{first + at:010x}/0" for at in record.places.tolist()]
            continue
        ends = np.cumsum(record.request_rows)
        requests = np.searchsorted(ends, record.places, side="right")
        rows = record.places - (ends - record.request_rows)[requests]
        numbers = first + requests
        if record.parts is not None:
            numbers = np.array(record.parts[0])[requests]
            rows += np.array(record.parts[1])[requests]
        ids += [
            f"{prefix}{number:010x}/{row}"
            for number, row in zip(numbers.tolist(), rows.tolist(), strict=True)
        ]
    return ids


def _joined(arrays: Sequence[NDArray[Any]]) -> NDArray[Any]:
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays, axis=-1)


def _times(times_s: NDArray[np.float64]) -> Any:
    unknown = ~(np.abs(times_s) < _TIME_LIMIT_S)  # not known, or damaged
    microseconds = np.rint(np.where(unknown, 0.0, times_s) * 1e6).astype(np.int64)
    return pa.array(microseconds, pa.int64(), mask=unknown).cast(_TIME)


def _constant(text: str, rows: int) -> Any:
    return pa.DictionaryArray.from_arrays(pa.array(np.zeros(rows, np.int8)), pa.array([text]))


def _array(values: NDArray[Any], value_type: ValueType, missing: NDArray[np.bool_] | None) -> Any:
    if value_type in _LISTS:
        return pa.array(values.tolist(), pa.list_(_LISTS[value_type]))
    if values.dtype.kind != "O":
        return pa.array(values, mask=missing)
    if value_type is ValueType.BYTES or value_type.is_opaque:
        return pa.array(values.tolist(), pa.binary())
    # A text key that is not UTF-8 names no entity, whatever is written here.
    texts = [v.decode(errors="replace") if isinstance(v, bytes) else v for v in values.tolist()]
    return pa.array(texts, pa.string())


def _modified_s(entry: "os.DirEntry[str]") -> float:
    try:
        return entry.stat().st_mtime
    except FileNotFoundError:
        return np.inf


def _size(entry: "os.DirEntry[str]") -> int:
    try:
        return entry.stat().st_size
    except FileNotFoundError:
        return 0
