"""What the monitor must not forget: windows, alarms, predictions that wait for their outcome.

One SQLite file, owned by one thread. Everything between two `commit`s is kept or lost together.
"""

import json
import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

from headrace.errors import StartupError
from headrace.monitoring.counts import WindowCounts
from headrace.monitoring.kept import FROM_FORMAT_1, SCHEMA, KeptPredictions

SCHEMA_VERSION = 2
FILENAME = "monitor.sqlite3"

_SCHEMA = """
CREATE TABLE IF NOT EXISTS model_version (
  id INTEGER PRIMARY KEY, model TEXT NOT NULL, version INTEGER NOT NULL,
  judgement TEXT NOT NULL DEFAULT '{}', last_rows_s REAL NOT NULL DEFAULT 0,
  UNIQUE (model, version));
CREATE TABLE IF NOT EXISTS window (
  of INTEGER NOT NULL, start_s REAL NOT NULL, is_open INTEGER NOT NULL, counts TEXT NOT NULL,
  PRIMARY KEY (of, start_s)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS incident (
  id INTEGER PRIMARY KEY, of INTEGER NOT NULL, signal TEXT NOT NULL, subject TEXT NOT NULL,
  opened_s REAL NOT NULL, resolved_s REAL, statistic REAL NOT NULL, threshold REAL NOT NULL);
CREATE INDEX IF NOT EXISTS incident_of ON incident (of, id);
CREATE TABLE IF NOT EXISTS notice (
  id INTEGER PRIMARY KEY, body TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS source (
  name TEXT PRIMARY KEY, rows_seen INTEGER NOT NULL, rows_dropped INTEGER NOT NULL);
"""


_FROM_FORMAT_1 = """
ALTER TABLE model_version RENAME COLUMN alarms TO judgement;
UPDATE model_version SET judgement = '{"alarms": ' || judgement || '}';
ALTER TABLE model_version ADD COLUMN last_rows_s REAL NOT NULL DEFAULT 0;
UPDATE model_version SET last_rows_s =
  coalesce((SELECT max(start_s) FROM window WHERE of = model_version.id), 0);
"""
"""Its windows do not say what they were counted against: none of them goes on."""


class StoredVersion(NamedTuple):
    """A model version that has been seen."""

    id: int
    model: str
    version: int
    judgement: dict[str, Any]
    last_rows_s: float


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


class MonitorState:
    """
    The file. Its methods are called by one thread; only the constructor may be called by another.

    Nobody but its owner may read it: it has what models said of whom.

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
                _make_private(folder / FILENAME)
            self._db = sqlite3.connect(name, timeout=1, check_same_thread=False)
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = NORMAL")
            self._db.execute("PRAGMA locking_mode = EXCLUSIVE")
            before = self._format()
            # One transaction: a format is changed wholly or not at all. The lock is not given back.
            self._db.executescript(
                f"BEGIN EXCLUSIVE; {_FROM_FORMAT_1 if before == 1 else ''} {_SCHEMA} {SCHEMA}"
                f"{FROM_FORMAT_1 if before == 1 else ''}"
                f"PRAGMA user_version = {SCHEMA_VERSION}; COMMIT"
            )
            self.kept = KeptPredictions(self._db)
        except (OSError, sqlite3.Error) as error:
            raise StartupError(f"--state-dir {folder}: {error}") from None

    def commit(self) -> None:
        """Keep everything so far."""
        self._db.commit()

    def rollback(self) -> None:
        """Forget everything since the last `commit`."""
        self._db.rollback()
        self.kept.recount()

    def close(self) -> None:
        """Keep everything and let go of the file."""
        self._db.commit()
        self._db.close()

    def versions(self) -> list[StoredVersion]:
        """Return every model version that was seen."""
        rows = self._db.execute(
            "SELECT id, model, version, judgement, last_rows_s FROM model_version"
        )
        return [
            StoredVersion(i, model, number, json.loads(judgement), last_rows_s)
            for i, model, number, judgement, last_rows_s in rows
        ]

    def add_version(self, model: str, version: int) -> int:
        """Note a model version; return its id."""
        added = self._db.execute(
            "INSERT INTO model_version (model, version) VALUES (?, ?)", (model, version)
        )
        assert added.lastrowid is not None
        return added.lastrowid

    def forget_version(self, of: int) -> None:
        """Remove a model version with everything of it."""
        self._db.execute("DELETE FROM window WHERE of = ?", (of,))
        self._db.execute("DELETE FROM incident WHERE of = ?", (of,))
        self.kept.forget(of)
        self._db.execute("DELETE FROM model_version WHERE id = ?", (of,))

    def put_judgement(self, of: int, judgement: dict[str, Any]) -> None:
        """Keep how a version was judged."""
        text = json.dumps(judgement, allow_nan=False)
        self._db.execute("UPDATE model_version SET judgement = ? WHERE id = ?", (text, of))

    def put_last_rows(self, of: int, last_rows_s: float) -> None:
        """Keep when a version's rows came last."""
        self._db.execute("UPDATE model_version SET last_rows_s = ? WHERE id = ?", (last_rows_s, of))

    def put_window(self, of: int, counts: WindowCounts, *, is_open: bool) -> None:
        """Keep a window, open or closed; one with the same start is replaced."""
        self._db.execute(
            "INSERT INTO window (of, start_s, is_open, counts) VALUES (?, ?, ?, ?)"
            " ON CONFLICT DO UPDATE SET is_open = excluded.is_open, counts = excluded.counts",
            (of, counts.start_s, is_open, json.dumps(counts.to_json())),
        )

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

    def open_since(self, of: int, signal: str, subject: str) -> float | None:
        """Return when the open incident began; None without one."""
        found = self._db.execute(
            "SELECT opened_s FROM incident WHERE of = ? AND signal = ? AND subject = ?"
            " AND resolved_s IS NULL",
            (of, signal, subject),
        ).fetchone()
        return None if found is None else float(found[0])

    def prune_incidents(self, of: int, keep: int) -> None:
        """Remove all but the last incidents of a version, and those that are open."""
        self._db.execute(
            "DELETE FROM incident WHERE of = ? AND resolved_s IS NOT NULL AND id <="
            " (SELECT id FROM incident WHERE of = ? ORDER BY id DESC LIMIT 1 OFFSET ?)",
            (of, of, keep),
        )

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

    def _format(self) -> int:
        """Return the file's format, 0 for a new one."""
        with closing(self._db.execute("PRAGMA user_version")) as rows:
            found = int(rows.fetchone()[0])
        if found not in (0, 1, SCHEMA_VERSION):
            raise sqlite3.Error(
                f"{FILENAME} is of format {found}, this version reads up to {SCHEMA_VERSION}"
            )
        return found


def _make_private(path: Path) -> None:
    # SQLite gives the files it makes beside this one the same mode.
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        os.fchmod(descriptor, 0o600)
    finally:
        os.close(descriptor)
