"""One model version as the monitor knows it."""

from collections import deque
from copy import copy
from dataclasses import dataclass, field, replace

from headrace.monitoring.counts import WindowCounts
from headrace.monitoring.watched import Unmatched, WatchedVersion

WINDOWS_SHOWN = 120


@dataclass(slots=True)
class Window:
    """
    A window that has ended, with what became known since.

    Args:
        counts: Of its rows.
        drift: Each column's, by group and name, once it was asked for.
    """

    counts: WindowCounts
    drift: dict[tuple[str, str], float | None] = field(default_factory=dict)


@dataclass(slots=True)
class VersionRecord:
    """
    A version under watch and its last windows.

    Args:
        id: In the state.
        model: Its name.
        version: Its number.
        watched: Folds and judges.
        last_rows_s: When rows came last.
        windows: The last ones, oldest first.
        rows: Rows counted since this process began.
        written: Start, rows and lost rows of the open window as the state has it.
        unmatched: Names that only one side has, as they were logged.
    """

    id: int
    model: str
    version: int
    watched: WatchedVersion
    last_rows_s: float = 0.0
    windows: deque[Window] = field(default_factory=lambda: deque(maxlen=WINDOWS_SHOWN))
    rows: int = 0
    written: tuple[float, int, int] | None = None
    unmatched: Unmatched = field(default_factory=Unmatched)

    def snapshot(self) -> "VersionRecord":
        """Return what to go back to when this one's changes cannot be written."""
        return replace(self, watched=copy(self.watched), windows=self.windows.copy())
