"""What the monitor must not forget: windows, alarms, predictions that wait for their outcome.

One SQLite file, owned by one thread. Everything between two `commit`s is kept or lost together.
"""

import json
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

from headrace.errors import StartupError
from headrace.monitoring.counts import WindowCounts

SCHEMA_VERSION = 1
FILENAME = "monitor.sqlite3"

_SCHEMA = """
CREATE TABLE IF NOT EXISTS model_version (
  id INTEGER PRIMARY KEY, model TEXT NOT NULL, version INTEGER NOT NULL,
  alarms TEXT NOT NULL DEFAULT '{}', UNIQUE (model, version));
CREATE TABLE IF NOT EXISTS window (
  of INTEGER NOT NULL, start_s REAL NOT NULL, is_open INTEGER NOT NULL, counts TEXT NOT NULL,
  PRIMARY KEY (of, start_s)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS performance (
  of INTEGER NOT NULL, start_s REAL NOT NULL, body TEXT NOT NULL,
  PRIMARY KEY (of, start_s)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS prediction (
  prefix TEXT NOT NULL, number INTEGER NOT NULL, row INTEGER NOT NULL, of INTEGER NOT NULL,
  start_s REAL NOT NULL, value REAL NOT NULL, outcome REAL,
  PRIMARY KEY (prefix, number, row)) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS prediction_window ON prediction (of, start_s);
CREATE TABLE IF NOT EXISTS incident (
  id INTEGER PRIMARY KEY, of INTEGER NOT NULL, signal TEXT NOT NULL, subject TEXT NOT NULL,
  opened_s REAL NOT NULL, resolved_s REAL, statistic REAL NOT NULL, threshold REAL NOT NULL);
CREATE TABLE IF NOT EXISTS notice (
  id INTEGER PRIMARY KEY, body TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS source (
  name TEXT PRIMARY KEY, rows_seen INTEGER NOT NULL, rows_dropped INTEGER NOT NULL);
"""


class StoredVersion(NamedTuple):
    """A model version that has been seen."""

    id: int
    model: str
    version: int
    alarms: dict[str, Any]


class StoredWindow(NamedTuple):
    """A window."""

    counts: WindowCounts
    is_open: bool


class Incident(NamedTuple):
    """One alarm from its beginning to its end."""

    id: int
    signal: str
    subject: str
    opened_s: float
    resolved_s: float | None
    statistic: float
    threshold: float


class OutcomeCounts(NamedTuple):
    """What became of reported outcomes."""

    joined: int = 0
    duplicate: int = 0
    conflicting: int = 0
    unknown: int = 0


class MonitorState:
    """
    The file. Its methods are called by one thread; only the constructor may be called by another.

    Args:
        folder: Made when it is not there; None keeps everything in memory.

    Raises:
        StartupError: the folder cannot be used, another monitor uses it, or the file is not one.
    """

    def __init__(self, folder: Path | None) -> None:
        name = ":memory:"
        try:
            if folder is not None:
                folder.mkdir(parents=True, exist_ok=True, mode=0o700)
                name = str(folder / FILENAME)
            self._db = sqlite3.connect(name, timeout=1, check_same_thread=False)
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = NORMAL")
            self._db.execute("PRAGMA locking_mode = EXCLUSIVE")
            self._check_version()
            self._db.executescript(_SCHEMA)
            self._db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
            self._db.execute("BEGIN EXCLUSIVE")  # taken now and never given back
            self._db.commit()
        except (OSError, sqlite3.Error) as error:
            raise StartupError(f"--state-dir {folder}: {error}") from None

    def commit(self) -> None:
        """Keep everything so far."""
        self._db.commit()

    def close(self) -> None:
        """Keep everything and let go of the file."""
        self._db.commit()
        self._db.close()

    def versions(self) -> list[StoredVersion]:
        """Return every model version that was seen."""
        rows = self._db.execute("SELECT id, model, version, alarms FROM model_version")
        return [StoredVersion(i, model, number, json.loads(a)) for i, model, number, a in rows]

    def add_version(self, model: str, version: int) -> int:
        """Note a model version; return its id."""
        added = self._db.execute(
            "INSERT INTO model_version (model, version) VALUES (?, ?)", (model, version)
        )
        assert added.lastrowid is not None
        return added.lastrowid

    def forget_version(self, of: int) -> None:
        """Remove a model version with everything of it."""
        for table in ("window", "performance", "prediction", "incident"):
            self._db.execute(f"DELETE FROM {table} WHERE of = ?", (of,))  # noqa: S608 our names
        self._db.execute("DELETE FROM model_version WHERE id = ?", (of,))

    def put_alarms(self, of: int, alarms: dict[str, Any]) -> None:
        """Keep the alarm states of a version."""
        text = json.dumps(alarms)
        self._db.execute("UPDATE model_version SET alarms = ? WHERE id = ?", (text, of))

    def put_window(self, of: int, counts: WindowCounts, *, is_open: bool) -> None:
        """Keep a window, open or closed; one with the same start is replaced."""
        self._db.execute(
            "INSERT INTO window (of, start_s, is_open, counts) VALUES (?, ?, ?, ?)"
            " ON CONFLICT DO UPDATE SET is_open = excluded.is_open, counts = excluded.counts",
            (of, counts.start_s, is_open, json.dumps(counts.to_json())),
        )

    def put_performance(self, of: int, start_s: float, performance: dict[str, Any]) -> None:
        """Keep what is known of a window's outcomes. They may come long after the window."""
        self._db.execute(
            "INSERT OR REPLACE INTO performance (of, start_s, body) VALUES (?, ?, ?)",
            (of, start_s, json.dumps(performance)),
        )

    def performance(self, of: int, start_s: float) -> dict[str, Any] | None:
        """Return what is known of one window's outcomes."""
        found = self._db.execute(
            "SELECT body FROM performance WHERE of = ? AND start_s = ?", (of, start_s)
        ).fetchone()
        return None if found is None else dict(json.loads(found[0]))

    def performances(self, of: int, limit: int) -> list[tuple[float, dict[str, Any]]]:
        """Return the last windows with outcomes, by their start, oldest first."""
        rows = self._db.execute(
            "SELECT start_s, body FROM performance WHERE of = ? ORDER BY start_s DESC LIMIT ?",
            (of, limit),
        )
        return [(start_s, json.loads(body)) for start_s, body in rows][::-1]

    def windows(self, of: int, limit: int) -> list[StoredWindow]:
        """Return the last windows of a version, oldest first."""
        rows = self._db.execute(
            "SELECT counts, is_open FROM window WHERE of = ? ORDER BY start_s DESC LIMIT ?",
            (of, limit),
        )
        found = [
            StoredWindow(WindowCounts.from_json(json.loads(counts)), bool(is_open))
            for counts, is_open in rows
        ]
        return found[::-1]

    def prune_windows(self, of: int, keep: int) -> None:
        """Remove all but the last windows of a version."""
        self._db.execute(
            "DELETE FROM window WHERE of = ? AND start_s <="
            " (SELECT start_s FROM window WHERE of = ? ORDER BY start_s DESC LIMIT 1 OFFSET ?)",
            (of, of, keep),
        )

    def add_predictions(
        self, of: int, start_s: float, rows: Iterable[tuple[str, int, int, float]]
    ) -> None:
        """Keep predictions (id prefix, request number, row, value) of a window."""
        self._db.executemany(
            "INSERT OR IGNORE INTO prediction (prefix, number, row, value, of, start_s)"
            " VALUES (?, ?, ?, ?, ?, ?)",
            ((*row, of, start_s) for row in rows),
        )

    def join_outcomes(
        self, outcomes: Sequence[tuple[str, int, int, float]]
    ) -> tuple[OutcomeCounts, set[tuple[int, float]]]:
        """
        Join outcomes (id prefix, request number, row, value).

        Returns:
            What became of them, and the (version, window start) that know more now.
        """
        joined = duplicate = conflicting = unknown = 0
        touched: set[tuple[int, float]] = set()
        for prefix, number, row, value in outcomes:
            key = (prefix, number, row)
            found = self._db.execute(
                "SELECT of, start_s, outcome FROM prediction"
                " WHERE prefix = ? AND number = ? AND row = ?",
                key,
            ).fetchone()
            if found is None:
                unknown += 1
            elif found[2] is None:
                joined += 1
                touched.add((found[0], found[1]))
                self._db.execute(
                    "UPDATE prediction SET outcome = ? WHERE prefix = ? AND number = ? AND row = ?",
                    (value, *key),
                )
            elif found[2] == value:
                duplicate += 1
            else:
                conflicting += 1
        return OutcomeCounts(joined, duplicate, conflicting, unknown), touched

    def labelled(self, of: int, start_s: float) -> tuple[int, list[tuple[float, float]]]:
        """Return how many predictions of a window are kept, and (value, outcome) of the known."""
        where = "FROM prediction WHERE of = ? AND start_s = ?"
        kept = self._db.execute(f"SELECT count(*) {where}", (of, start_s)).fetchone()[0]
        pairs = self._db.execute(
            f"SELECT value, outcome {where} AND outcome IS NOT NULL",
            (of, start_s),
        )
        return kept, pairs.fetchall()

    def prune_predictions(self, keep: int, oldest_s: float) -> int:
        """
        Remove predictions of windows that began before `oldest_s`, and the oldest beyond `keep`.

        Whole windows go, so that no window's coverage is wrong.

        Returns:
            How many are kept.
        """
        self._db.execute("DELETE FROM prediction WHERE start_s < ?", (oldest_s,))
        self._db.execute("DELETE FROM performance WHERE start_s < ?", (oldest_s,))
        kept = int(self._db.execute("SELECT count(*) FROM prediction").fetchone()[0])
        while kept > keep:
            first = self._db.execute("SELECT min(start_s) FROM prediction").fetchone()[0]
            gone = self._db.execute("DELETE FROM prediction WHERE start_s <= ?", (first,))
            kept -= gone.rowcount
        return kept

    def open_incident(
        self,
        of: int,
        signal: str,
        subject: str,
        opened_s: float,
        statistic: float,
        threshold: float,
    ) -> int:
        """Note that an alarm began; return its id."""
        added = self._db.execute(
            "INSERT INTO incident (of, signal, subject, opened_s, statistic, threshold)"
            " VALUES (?, ?, ?, ?, ?, ?)",
            (of, signal, subject, opened_s, statistic, threshold),
        )
        assert added.lastrowid is not None
        return added.lastrowid

    def resolve_incident(self, of: int, signal: str, subject: str, resolved_s: float) -> int | None:
        """Note that an alarm ended; return its id."""
        found = self._db.execute(
            "SELECT id FROM incident WHERE of = ? AND signal = ? AND subject = ?"
            " AND resolved_s IS NULL",
            (of, signal, subject),
        ).fetchone()
        if found is None:
            return None
        self._db.execute("UPDATE incident SET resolved_s = ? WHERE id = ?", (resolved_s, found[0]))
        return int(found[0])

    def incidents(self, of: int, limit: int) -> list[Incident]:
        """Return the last incidents of a version, newest first."""
        rows = self._db.execute(
            "SELECT id, signal, subject, opened_s, resolved_s, statistic, threshold"
            " FROM incident WHERE of = ? ORDER BY id DESC LIMIT ?",
            (of, limit),
        )
        return [Incident(*row) for row in rows]

    def add_notice(self, body: str) -> int:
        """Keep a message that has to be delivered; return its id."""
        added = self._db.execute("INSERT INTO notice (body) VALUES (?)", (body,))
        assert added.lastrowid is not None
        return added.lastrowid

    def remove_notice(self, notice: int) -> None:
        """Forget a message: it was delivered, or will never be."""
        self._db.execute("DELETE FROM notice WHERE id = ?", (notice,))

    def notices(self) -> Iterator[tuple[int, str]]:
        """Yield every message that was not delivered."""
        yield from self._db.execute("SELECT id, body FROM notice ORDER BY id").fetchall()

    def source(self, name: str) -> tuple[int, int] | None:
        """Return how many rows a source had sent when heard of last, and how many dropped."""
        found = self._db.execute(
            "SELECT rows_seen, rows_dropped FROM source WHERE name = ?", (name,)
        ).fetchone()
        return None if found is None else (int(found[0]), int(found[1]))

    def put_source(self, name: str, rows_seen: int, rows_dropped: int) -> None:
        """Keep that."""
        self._db.execute(
            "INSERT OR REPLACE INTO source (name, rows_seen, rows_dropped) VALUES (?, ?, ?)",
            (name, rows_seen, rows_dropped),
        )

    def prune_sources(self, keep: int) -> None:
        """Forget all but the sources heard of last."""
        self._db.execute(
            "DELETE FROM source WHERE rowid <="
            " (SELECT rowid FROM source ORDER BY rowid DESC LIMIT 1 OFFSET ?)",
            (keep,),
        )

    def _check_version(self) -> None:
        with closing(self._db.execute("PRAGMA user_version")) as rows:
            found = int(rows.fetchone()[0])
        if found not in (0, SCHEMA_VERSION):
            raise sqlite3.Error(
                f"{FILENAME} is of format {found}, this version reads {SCHEMA_VERSION}"
            )
