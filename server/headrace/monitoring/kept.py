"""Predictions that wait for their outcome, by window: kept, joined, and removed when they must be.

They are most of the state's rows, so nothing here looks at all of them: how many a window has, and
has outcomes of, is counted as they come.
"""

import json
import sqlite3
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

SCHEMA = """
CREATE TABLE IF NOT EXISTS performance (
  of INTEGER NOT NULL, start_s REAL NOT NULL, body TEXT NOT NULL,
  PRIMARY KEY (of, start_s)) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS performance_start ON performance (start_s);
CREATE TABLE IF NOT EXISTS prediction (
  prefix TEXT NOT NULL, number INTEGER NOT NULL, row INTEGER NOT NULL, of INTEGER NOT NULL,
  start_s REAL NOT NULL, value REAL NOT NULL, outcome REAL,
  PRIMARY KEY (prefix, number, row)) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS prediction_window ON prediction (of, start_s);
CREATE TABLE IF NOT EXISTS kept (
  of INTEGER NOT NULL, start_s REAL NOT NULL, predictions INTEGER NOT NULL,
  outcomes INTEGER NOT NULL DEFAULT 0, is_dirty INTEGER NOT NULL DEFAULT 0,
  is_leaving INTEGER NOT NULL DEFAULT 0, PRIMARY KEY (of, start_s)) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS kept_start ON kept (start_s);
CREATE INDEX IF NOT EXISTS kept_dirty ON kept (of, start_s) WHERE is_dirty;
CREATE INDEX IF NOT EXISTS kept_leaving ON kept (start_s) WHERE is_leaving;
"""
"""
`kept` has a row for each window with predictions. `is_dirty`: it has outcomes that were not summed
up yet. `is_leaving`: it is being removed, some predictions at a time.
"""

FROM_FORMAT_1 = """
DELETE FROM performance WHERE body LIKE '%Infinity%' OR body LIKE '%NaN%';
INSERT OR IGNORE INTO kept (of, start_s, predictions, outcomes, is_dirty)
  SELECT of, start_s, count(*), count(outcome), count(outcome) > 0 FROM prediction
  GROUP BY of, start_s;
"""
"""Format 1 forgot at a stop which windows were dirty: all with outcomes are summed up again."""

WindowKey = tuple[int, float]
"""A version and the start of one of its windows."""


class OutcomeCounts(NamedTuple):
    """What became of reported outcomes."""

    joined: int = 0
    duplicate: int = 0
    conflicting: int = 0
    unknown: int = 0


class KeptPredictions:
    """
    The tables. Who owns the database commits.

    Args:
        database: Has the tables of `SCHEMA`.
    """

    def __init__(self, database: sqlite3.Connection) -> None:
        self._db = database
        self.total = 0
        """Predictions kept."""
        self.recount()

    def recount(self) -> None:
        """Find `total` again, after a rollback."""
        found = self._db.execute("SELECT coalesce(sum(predictions), 0) FROM kept").fetchone()
        self.total = int(found[0])

    def add(self, of: int, start_s: float, rows: Sequence[tuple[str, int, int, float]]) -> None:
        """Keep predictions (id prefix, request number, row, value) of a window."""
        added = self._db.executemany(
            "INSERT OR IGNORE INTO prediction (prefix, number, row, value, of, start_s)"
            " VALUES (?, ?, ?, ?, ?, ?)",
            ((*row, of, start_s) for row in rows),
        ).rowcount
        self._db.execute(
            "INSERT INTO kept (of, start_s, predictions) VALUES (?, ?, ?)"
            " ON CONFLICT DO UPDATE SET predictions = predictions + excluded.predictions",
            (of, start_s, added),
        )
        self.total += added

    def join(self, outcomes: Sequence[tuple[str, int, int, float]]) -> OutcomeCounts:
        """Join outcomes (id prefix, request number, row, value); their windows become dirty."""
        joined: dict[WindowKey, int] = {}
        duplicate = conflicting = unknown = 0
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
                window = (found[0], found[1])
                joined[window] = joined.get(window, 0) + 1
                self._db.execute(
                    "UPDATE prediction SET outcome = ? WHERE prefix = ? AND number = ? AND row = ?",
                    (value, *key),
                )
            elif found[2] == value:
                duplicate += 1
            else:
                conflicting += 1
        self._db.executemany(
            "UPDATE kept SET outcomes = outcomes + ?, is_dirty = 1 WHERE of = ? AND start_s = ?",
            [(count, *window) for window, count in joined.items()],
        )
        return OutcomeCounts(sum(joined.values()), duplicate, conflicting, unknown)

    def count(self, of: int, start_s: float) -> tuple[int, int]:
        """Return how many predictions of a window are kept, and how many of them have outcomes."""
        found = self._db.execute(
            "SELECT predictions, outcomes FROM kept WHERE of = ? AND start_s = ?", (of, start_s)
        ).fetchone()
        return (0, 0) if found is None else (int(found[0]), int(found[1]))

    def labelled(self, of: int, start_s: float) -> list[tuple[float, float]]:
        """Return (value, outcome) of a window's predictions that have one."""
        return self._db.execute(
            "SELECT value, outcome FROM prediction"
            " WHERE of = ? AND start_s = ? AND outcome IS NOT NULL",
            (of, start_s),
        ).fetchall()

    def dirty(self, of: int, limit: int) -> list[float]:
        """Return the starts of the first windows that have outcomes that were not summed up."""
        rows = self._db.execute(
            "SELECT start_s FROM kept WHERE of = ? AND is_dirty AND NOT is_leaving"
            " ORDER BY start_s LIMIT ?",
            (of, limit),
        )
        return [start_s for (start_s,) in rows]

    def put_performance(self, of: int, start_s: float, performance: dict[str, Any]) -> None:
        """Keep what a window's outcomes sum up to: it is dirty no more."""
        self._db.execute(
            "INSERT OR REPLACE INTO performance (of, start_s, body) VALUES (?, ?, ?)",
            (of, start_s, json.dumps(performance, allow_nan=False)),
        )
        self._db.execute("UPDATE kept SET is_dirty = 0 WHERE of = ? AND start_s = ?", (of, start_s))

    def performance(self, of: int, start_s: float) -> dict[str, Any] | None:
        """Return what one window's outcomes sum up to."""
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

    def prune(self, keep: int, oldest_s: float, open_windows: Collection[WindowKey]) -> None:
        """
        Let windows go that began before `oldest_s`, and the oldest beyond `keep` predictions.

        Whole windows go, so that no window's coverage is wrong, and never an open one. Nobody sums
        them up from now on; `remove` takes their predictions away.
        """
        self._db.execute("DELETE FROM performance WHERE start_s < ?", (oldest_s,))
        over = self.total - keep
        leaving = "SELECT coalesce(sum(predictions), 0) FROM kept WHERE is_leaving"
        over -= self._db.execute(leaving).fetchone()[0]
        gone: list[WindowKey] = []
        for of, start_s, predictions in self._db.execute(
            "SELECT of, start_s, predictions FROM kept WHERE NOT is_leaving ORDER BY start_s"
        ):
            if over <= 0 and start_s >= oldest_s:
                break
            if (of, start_s) not in open_windows:
                gone.append((of, start_s))
                over -= predictions
        self._db.executemany("UPDATE kept SET is_leaving = 1 WHERE of = ? AND start_s = ?", gone)

    def remove(self, limit: int) -> None:
        """Remove up to `limit` predictions of windows that `prune` let go."""
        for of, start_s, predictions in self._db.execute(
            "SELECT of, start_s, predictions FROM kept WHERE is_leaving ORDER BY start_s"
        ).fetchall():
            removed = self._db.execute(
                "DELETE FROM prediction WHERE (prefix, number, row) IN (SELECT prefix, number, row"
                " FROM prediction WHERE of = ? AND start_s = ? LIMIT ?)",
                (of, start_s, limit),
            ).rowcount
            if removed == limit:
                self._db.execute(
                    "UPDATE kept SET predictions = predictions - ? WHERE of = ? AND start_s = ?",
                    (removed, of, start_s),
                )
                self.total -= removed
                return
            self._db.execute("DELETE FROM kept WHERE of = ? AND start_s = ?", (of, start_s))
            self.total -= predictions
            limit -= removed

    def forget(self, of: int) -> None:
        """Let all windows of a model version go."""
        self._db.execute("DELETE FROM performance WHERE of = ?", (of,))
        self._db.execute("UPDATE kept SET is_leaving = 1 WHERE of = ?", (of,))
