"""The gateway's side of the skew log: feature vectors as they were served, never in anybody's way.

The executors leave the sampled rows of a batch in a bounded queue. One thread turns them into
columns once a second and into a Parquet file now and then (`skew_file`); `headrace features skew`
reads them.
"""

import threading
import time
from collections import deque
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog
from numpy.typing import NDArray

from headrace.features.key_sample import threshold_of
from headrace.features.plan import FeaturePlan
from headrace.features.skew_record import SkewRecord, SkewSource, sampled_record
from headrace.features.store import FeatureRows

if TYPE_CHECKING:  # Arrow takes a while to import, and not everyone has a skew log
    from headrace.features.skew_file import Columns

_LOG = structlog.get_logger(__name__)

WRITE_DOWN_PERIOD_S = 1.0
"""Rows of so long are turned into columns together."""

GATHERED_MAX = 256
"""Files that are gathered at once: callers who read features may select them as they like."""


@dataclass(slots=True)
class _Gathered:
    """Columns of one version that wait for their file."""

    since_s: float
    rows: int = 0
    byte_count: int = 0
    columns: list["Columns"] = field(default_factory=list)


class SkewLog:
    """
    Keeps the features of sampled keys, on a thread of its own.

    `put` never blocks and never fails. Rows that do not fit the queue are dropped, newest first;
    rows whose file cannot be written (a full disk, a folder that is none) are lost. Both are
    counted; only the first failure in a row is logged. The folder stays under its limit: to make
    room, the oldest files of the log go, whoever wrote them.

    Args:
        folder: Where; made when the first file is written. Several processes may share it.
        share: Share of entity keys whose reads are kept, over 0 and at most 1.
        max_queue_bytes: Most bytes of rows that wait, as arrays or as columns.
        file_rows: A file is written when a version has about so many rows.
        file_s: It is written after that time at the latest.
        folder_bytes: Most bytes of the log's files.
    """

    def __init__(
        self,
        folder: Path,
        *,
        share: float,
        max_queue_bytes: int,
        file_rows: int,
        file_s: float,
        folder_bytes: int,
    ) -> None:
        from headrace.features import skew_file  # noqa: PLC0415 see above

        self._to_columns = skew_file.to_columns
        self._folder = skew_file.SkewFolder(folder, folder_bytes)
        self._threshold = threshold_of(share)
        self._max_queue_bytes = max_queue_bytes
        self._file_rows = file_rows
        self._file_s = file_s
        self._lock = threading.Lock()
        self._queue: deque[SkewRecord] = deque()
        self._queued_bytes = 0
        self._gathered: dict[Hashable, _Gathered] = {}
        """By their source's `file_key`. The thread's own."""
        self.rows_written = 0
        self.rows_dropped = 0
        """Did not fit the queue, or were of one selection too many."""
        self.rows_failed = 0
        """Sampled and lost: they could not be written."""
        self._is_failing = False
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="skew-log", daemon=True)

    @property
    def queued_bytes(self) -> int:
        """Bytes that wait."""
        return self._queued_bytes

    @property
    def files_deleted(self) -> int:
        """Files of the log that this process removed to make room."""
        return self._folder.files_deleted

    def put(
        self,
        source: SkewSource,
        entities: Mapping[str, NDArray[Any]],
        features: FeatureRows,
        *,
        first_number: int,
        request_rows: Sequence[int],
        time_s: float,
        parts: tuple[Sequence[int], Sequence[int]] | None = None,
    ) -> None:
        """
        Queue a batch's sampled rows, or drop them. Any thread may call it.

        A service without join keys has no key to go by: its rows are sampled one by one.

        Args:
            source: Whose batch it is.
            entities: What was read, by join key, n keys each.
            features: What was found, n rows.
            first_number: Of the batch's first request.
            request_rows: Rows of each request; n together. Of no use without prediction ids.
            time_s: When the features were read, Unix seconds.
            parts: See `SkewRecord`.
        """
        record = sampled_record(
            source,
            entities,
            features,
            threshold=self._threshold,
            first_number=first_number,
            request_rows=request_rows,
            time_s=time_s,
            parts=parts,
        )
        if record is None:
            return
        with self._lock:
            waiting = self._queued_bytes + record.byte_count
            if waiting > self._max_queue_bytes:
                self.rows_dropped += len(record.places)
                return
            self._queued_bytes = waiting
            self._queue.append(record)

    def start(self) -> None:
        """Begin to write."""
        self._thread.start()

    def stop(self, timeout_s: float) -> None:
        """Write what waits, if the disk takes it in time; end."""
        self._stopping.set()
        if self._thread.ident is not None:
            self._thread.join(timeout_s)
            if self._thread.is_alive():
                _LOG.warning("skew_log_cut_off", bytes=self._queued_bytes)

    def _run(self) -> None:
        while True:
            is_last = self._stopping.wait(WRITE_DOWN_PERIOD_S)
            self._write_down()
            self._write_files(everything=is_last)
            if is_last:
                return

    def _write_down(self) -> None:
        """Turn queued records into columns: far smaller, where batches had a row or two."""
        with self._lock:
            records = list(self._queue)
            self._queue.clear()
        by_key: dict[Hashable, list[SkewRecord]] = {}
        for record in records:
            by_key.setdefault(record.source.file_key, []).append(record)
        for key, group in by_key.items():
            self._forget(sum(record.byte_count for record in group))
            rows = sum(len(record.places) for record in group)
            if key not in self._gathered and len(self._gathered) >= GATHERED_MAX:
                with self._lock:
                    self.rows_dropped += rows
                continue
            try:
                columns = self._to_columns(group)
            except Exception as error:  # noqa: BLE001 what cannot be written must not end the log
                self._failed(rows, error)
                continue
            gathered = self._gathered.setdefault(key, _Gathered(time.monotonic()))
            gathered.rows += rows
            gathered.byte_count += columns.byte_count
            gathered.columns.append(columns)
            self._forget(-columns.byte_count)

    def _write_files(self, *, everything: bool) -> None:
        # Half of the queue is for what comes while a slow disk writes the other half.
        everything |= self._queued_bytes > self._max_queue_bytes // 2
        now_s = time.monotonic()
        for key, gathered in list(self._gathered.items()):
            is_old = now_s - gathered.since_s >= self._file_s
            if everything or is_old or gathered.rows >= self._file_rows:
                del self._gathered[key]
                self._write_file(gathered)

    def _write_file(self, gathered: _Gathered) -> None:
        try:
            self._folder.write(gathered.columns)
        except Exception as error:  # noqa: BLE001 as above
            self._failed(gathered.rows, error)
        else:
            self.rows_written += gathered.rows
            if self._is_failing:
                self._is_failing = False
                _LOG.info("skew_log_writes_again")
        self._forget(gathered.byte_count)

    def _failed(self, rows: int, error: Exception) -> None:
        self.rows_failed += rows
        if not self._is_failing:
            self._is_failing = True
            _LOG.warning("skew_log_failed", reason=str(error) or type(error).__name__)

    def _forget(self, byte_count: int) -> None:
        with self._lock:
            self._queued_bytes -= byte_count


class FeatureReadLog:
    """
    What feature reads, without a model, leave in a skew log. Any thread may call it.

    Args:
        log: Keeps the rows of sampled keys, which are those that models' rows are sampled by.
    """

    def __init__(self, log: SkewLog) -> None:
        self._log = log

    def put(
        self,
        plan: FeaturePlan,
        entities: Mapping[str, NDArray[Any]],
        features: FeatureRows,
        *,
        time_s: float,
    ) -> None:
        """Queue a batch's sampled rows, or drop them; as `SkewLog.put`."""
        read = read_plan(plan)
        if read is not None:
            self._log.put(
                SkewSource("", "", None, read),  # kept nowhere: it would keep an old plan's caches
                entities,
                features.stored or features,
                first_number=int(time_s * 1e6),  # rows without a key are sampled by it
                request_rows=(),
                time_s=time_s,
            )


def read_plan(plan: FeaturePlan) -> FeaturePlan | None:
    """
    Return what can be compared of a plan; None where nothing is read for it.

    What is computed says nothing new: only what it is computed from can be compared.
    """
    return plan.stored if plan.computed else plan
