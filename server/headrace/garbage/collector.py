"""The one owner of Python's garbage collector in a process that serves: collects at paced moments.

Requests make no reference cycles, so counting references frees them. What looks for cycles all the
same is kept small and, where it can be, to moments when nobody waits.
"""

import gc
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import structlog

from headrace.garbage.pace import Pace, Work
from headrace.garbage.pauses import Pauses

_LOG = structlog.get_logger(__name__)

LOOK_PERIOD_S = 0.25
"""A look costs 50 to 80 µs, most of it the waking: some 0.03 % of a core."""

AUTOMATIC_OBJECTS = 50_000
"""
New containers, net, at which the interpreter begins a young collection by itself, in whatever
thread makes the last one: a bound on what a burst between two looks can leave to one collection.
"""

_NEVER = 1 << 30


class Heap(Protocol):
    """What a collector is used through."""

    def take(self, on_gc: Callable[..., None]) -> int:
        """Let nobody else collect, tell `on_gc`, set everything aside; say how many objects."""

    def give_back(self, on_gc: Callable[..., None]) -> None:
        """Undo `take`."""

    def young(self) -> int:
        """Return how many containers were made, net, since the last collection."""

    def survived(self) -> int:
        """Return how many objects have outlived young collections that the interpreter began."""

    def collect(self, work: Work) -> int:
        """Do it; return how many of the objects looked at are left."""


class InterpretersHeap:
    """
    Python's own; any number of collectors may share it.

    The first to `take` it remembers how it was, the last to give it back restores that: several
    gateways may be in one process.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._holders = 0
        self._before = (False, (0, 0, 0))
        self._callback = self._on_gc  # the same object in both directions
        self._young_before = 0
        self._survived = 0
        self._left: dict[int, int | None] = {}  # by the threads that collect because we say so

    def take(self, on_gc: Callable[..., None]) -> int:
        with self._lock:
            self._holders += 1
            if self._holders == 1:
                self._before = gc.isenabled(), gc.get_threshold()
                gc.enable()
                gc.set_threshold(AUTOMATIC_OBJECTS, _NEVER, _NEVER)
                gc.callbacks.append(self._callback)  # before those who time what it does as well
            gc.collect()
            kept = _set_aside()
            gc.callbacks.append(on_gc)  # nobody has waited for it yet
            return kept

    def give_back(self, on_gc: Callable[..., None]) -> None:
        with self._lock:
            gc.callbacks.remove(on_gc)
            self._holders -= 1
            if self._holders:
                return
            gc.callbacks.remove(self._callback)
            was_enabled, thresholds = self._before
            gc.set_threshold(*thresholds)
            if not was_enabled:
                gc.disable()
            gc.unfreeze()

    def young(self) -> int:
        return gc.get_count()[0]

    def survived(self) -> int:
        return self._survived

    def collect(self, work: Work) -> int:
        thread = threading.get_ident()
        self._left[thread] = None
        try:
            if work is Work.YOUNG:
                count = gc.get_count()[0]
                return max(0, count - gc.collect(0))
            if work is Work.WHOLE:
                gc.unfreeze()
            gc.collect()
        finally:
            left = self._left.pop(thread)
        return _set_aside(left)

    def _on_gc(self, phase: str, info: Mapping[str, Any]) -> None:
        """Count while everybody waits anyhow; takes no lock, see `Pauses`."""
        thread = threading.get_ident()
        if thread in self._left:
            if phase == "stop" and info["generation"]:
                self._left[thread] = _count()
        elif not info["generation"]:
            if phase == "start":
                self._young_before = gc.get_count()[0]
            else:
                self._survived += max(0, self._young_before - info["collected"])


_HEAP = InterpretersHeap()


class GarbageCollector:
    """
    One thread that collects when `pace` says so.

    `start` it when everything is built, then `stop` it, from any thread; what Python's collector
    was set to before is restored then. Several may run in one process: whatever one of them has
    collected the others find done.

    Args:
        is_idle: Says whether nobody waits for an answer.
        heap: What it collects.

    Attributes:
        pauses: How long collections took.
    """

    def __init__(self, is_idle: Callable[[], bool], heap: Heap = _HEAP) -> None:
        self.pauses = Pauses()
        self._is_idle = is_idle
        self._heap = heap
        self._on_gc = self.pauses.on_gc  # the same object in both directions
        self._has_loaded = threading.Event()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="garbage", daemon=True)
        self._pace: Pace | None = None
        self._survived = 0

    def start(self) -> None:
        """Set aside what there is, and begin to look."""
        kept = self._heap.take(self._on_gc)
        self._survived = self._heap.survived()
        self._pace = Pace(kept, time.monotonic())
        self._thread.start()

    def loaded(self) -> None:
        """Say that a model was loaded, to be set aside soon. Any thread may call it."""
        self._has_loaded.set()

    def look(self) -> Work | None:
        """Look once; say what was done."""
        pace = self._pace
        if pace is None:
            return None
        before, self._survived = self._survived, self._heap.survived()
        pace.survived(self._survived - before)
        work = pace.due(
            now_s=time.monotonic(),
            young=self._heap.young(),
            is_idle=self._is_idle(),
            has_loaded=self._has_loaded.is_set(),
        )
        if work is None:
            return None
        if work is not Work.YOUNG:
            self._has_loaded.clear()  # before: one that is loaded meanwhile is for the next time
        left = self._heap.collect(work)
        pace.done(work, now_s=time.monotonic(), left=left)
        return work

    def stop(self, timeout_s: float) -> None:
        """Look no more, and leave the collector as it was found. A second call does nothing."""
        if self._pace is None:
            return
        self._pace = None
        self._stopping.set()
        self._thread.join(timeout_s)
        self._heap.give_back(self._on_gc)

    def _run(self) -> None:
        while not self._stopping.wait(LOOK_PERIOD_S):
            try:
                self.look()
            except Exception:  # noqa: BLE001 without it garbage would grow
                _LOG.exception("garbage_not_collected")


def _set_aside(left: int | None = None) -> int:
    """Freeze what is left; return how many objects that are, unless they were counted."""
    if left is None:
        left = _count()
    gc.freeze()
    return left


def _count() -> int:
    return len(gc.get_objects())  # a fifth of the time of the collection before it
