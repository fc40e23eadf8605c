"""The thread that owns the monitor: everybody else hands it work through a bounded queue."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from queue import Empty, Full, Queue
from typing import TypeVar

import structlog

from headrace.errors import Draining, Overloaded
from headrace.monitoring.monitor import Monitor

_LOG = structlog.get_logger(__name__)

QUEUE_SIZE = 64
TICK_PERIOD_S = 1.0
_POLL_S = 0.1

ResultT = TypeVar("ResultT")


class MonitorThread:
    """
    Runs work on the monitor, one piece at a time, and ticks it.

    Args:
        monitor: Nobody else's from `start` to `stop`.
    """

    def __init__(self, monitor: Monitor) -> None:
        self._monitor = monitor
        self._queue: Queue[Callable[[Monitor], object]] = Queue(QUEUE_SIZE)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="monitor", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    @property
    def waiting(self) -> int:
        """Pieces of work in the queue."""
        return self._queue.qsize()

    def put(self, work: Callable[[Monitor], object], timeout_s: float) -> None:
        """
        Queue a piece of work, and wait for a place if there is none.

        Raises:
            Overloaded: no place became free in time.
            Draining: the monitor is stopping.
        """
        if self._stopping.is_set():
            raise Draining("the monitor is stopping")
        try:
            self._queue.put(work, timeout=timeout_s)
        except Full:
            raise Overloaded("the monitor has too much to do") from None

    def ask(self, work: Callable[[Monitor], ResultT], timeout_s: float) -> ResultT:
        """
        Run a piece of work and return its result.

        Raises:
            Overloaded: there was no result in time; it may still be done.
            Draining: the monitor is stopping.
        """
        result: Future[ResultT] = Future()

        def run(monitor: Monitor) -> None:
            if not result.set_running_or_notify_cancel():
                return
            try:
                result.set_result(work(monitor))
            except BaseException as error:
                result.set_exception(error)
                raise

        deadline_s = time.monotonic() + timeout_s
        self.put(run, timeout_s)
        try:
            return result.result(max(0.0, deadline_s - time.monotonic()))
        except FutureTimeout:
            result.cancel()
            raise Overloaded("the monitor has too much to do") from None

    def stop(self, timeout_s: float) -> None:
        """Do what is queued, tick a last time, end."""
        self._stopping.set()
        if self._thread.ident is not None:
            self._thread.join(timeout_s)

    def _run(self) -> None:
        next_tick_s = time.monotonic()
        while True:
            work: Callable[[Monitor], object] | None = None
            try:
                work = self._queue.get(timeout=_POLL_S)
            except Empty:
                if self._stopping.is_set():
                    break
            if work is not None:
                self._do(work)
            if time.monotonic() >= next_tick_s:
                self._do(_tick)
                next_tick_s = time.monotonic() + TICK_PERIOD_S
        self._do(_tick)

    def _do(self, work: Callable[[Monitor], object]) -> None:
        try:
            work(self._monitor)
        except Exception:  # noqa: BLE001 one piece of work must not end the thread
            _LOG.exception("monitor_work_failed")


def _tick(monitor: Monitor) -> None:
    monitor.tick(time.time())
