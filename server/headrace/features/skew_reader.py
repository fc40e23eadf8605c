"""Reading a skew log back, however large: a bounded number of rows at a time."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from headrace.features.logged_plan import LoggedPlan
from headrace.features.skew_file import METADATA_KEY, files_of

_DAMAGED = (OSError, KeyError, ValueError, pa.ArrowException)


@dataclass(frozen=True, slots=True)
class LoggedFile:
    """
    One file of a log.

    Args:
        path: Where.
        plan: What its rows are.
        rows: How many it has.
    """

    path: Path
    plan: LoggedPlan
    rows: int


def scan(
    folder: Path, service: str | None, since_s: float | None
) -> tuple[list[LoggedFile], list[Path]]:
    """
    Find the files of a log, those in folders below too.

    Args:
        folder: The log.
        service: Only files of this feature service.
        since_s: Files that were written before are left out, Unix seconds.

    Returns:
        Those that can be read, oldest first, and those that cannot.
    """
    files, unreadable = [], []
    for path in files_of(folder):
        if since_s is not None and _written_s(path) < since_s:
            continue
        try:
            with pq.ParquetFile(path) as file:
                plan = LoggedPlan.from_json((file.schema_arrow.metadata or {})[METADATA_KEY])
                rows = file.metadata.num_rows
        except FileNotFoundError:  # deleted to make room, meanwhile
            continue
        except _DAMAGED:
            unreadable.append(path)
            continue
        if service is None or plan.service == service:
            files.append(LoggedFile(path, plan, rows))
    return files, unreadable


def chunks(
    files: Sequence[LoggedFile],
    rows: int,
    since_s: float | None,
    on_damage: Callable[[Path], None] = lambda _: None,
) -> Iterator[tuple[LoggedPlan, Any]]:
    """
    Yield a log's rows, those of one plan after the other.

    Args:
        files: Of the log.
        rows: Most rows of one chunk.
        since_s: Older requests are left out, Unix seconds.
        on_damage: Told of a file that cannot be read to its end; what came before it is there.

    Yields:
        A plan and an Arrow table of its rows, at least one of them.
    """
    for plan in dict.fromkeys(file.plan for file in files):
        parts: list[Any] = []
        count = 0
        for file in files:
            if file.plan != plan:
                continue
            for part in _parts(file, rows, since_s, on_damage):
                rest = part
                while count + len(rest) >= rows:
                    parts.append(rest[: rows - count])
                    rest = rest[rows - count :]
                    yield plan, pa.concat_tables(parts)
                    parts, count = [], 0
                if len(rest):
                    parts.append(rest)
                    count += len(rest)
        if parts:
            yield plan, pa.concat_tables(parts)


def _parts(
    file: LoggedFile, rows: int, since_s: float | None, on_damage: Callable[[Path], None]
) -> Iterator[Any]:
    try:
        with pq.ParquetFile(file.path) as parquet:
            for batch in parquet.iter_batches(rows):
                part = pa.Table.from_batches([batch])
                if since_s is not None:
                    since = pa.scalar(int(since_s * 1e6)).cast(part["request_time"].type)
                    part = part.filter(pc.greater_equal(part["request_time"], since))
                yield part
    except FileNotFoundError:  # as above
        return
    except _DAMAGED:
        on_damage(file.path)


def _written_s(path: Path) -> float:
    try:
        written = datetime.strptime(path.name.split("-")[1], "%Y%m%dT%H%M%S%z")
    except (IndexError, ValueError):  # renamed by somebody
        return float("inf")
    return written.timestamp() + 1  # the name has whole seconds
