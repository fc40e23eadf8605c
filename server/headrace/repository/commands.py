"""What callers want done by the one thread that may do it: one after another, each told once."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue

from headrace.errors import Draining
from headrace.settling import settle


class Commands:
    """
    A queue of callers that wait.

    `ask` may be called by any thread, `run` by the one that does the work. After `close` nobody
    waits, whatever is still being done.
    """

    def __init__(self) -> None:
        self._queue: SimpleQueue[tuple[Callable[[], None], Future[None]]] = SimpleQueue()
        self._lock = threading.Lock()
        self._waiting: set[Future[None]] = set()
        self._is_closed = False

    def ask(
        self, what: Callable[[], None], timeout_s: float | None, wake: Callable[[], None]
    ) -> None:
        """
        Have something done, and wait for it; what it raises is raised here.

        Args:
            what: To be done.
            timeout_s: Longest to wait; None for as long as it takes.
            wake: Called when it is in the queue.

        Raises:
            Draining: this is closed, or was meanwhile.
            TimeoutError: it takes longer; it goes on.
        """
        done: Future[None] = Future()
        with self._lock:  # once this is closed, nobody comes for what is put here
            if self._is_closed:
                raise _stopping()
            self._waiting.add(done)
            self._queue.put((what, done))
        wake()
        try:
            done.result(timeout_s)
        finally:
            with self._lock:
                self._waiting.discard(done)

    def run(self) -> None:
        """Do what is in the queue, but for callers that have been told already."""
        while not self._queue.empty():
            what, done = self._queue.get()
            if done.done():
                continue
            try:
                what()
            except Exception as error:  # noqa: BLE001 its caller's
                settle(done, error)
            else:
                settle(done, None)

    def close(self) -> None:
        """Tell everybody who waits that this server is stopping."""
        with self._lock:
            self._is_closed = True
            waiting = list(self._waiting)
        for done in waiting:
            settle(done, _stopping())


def _stopping() -> Draining:
    return Draining("this server is stopping")
