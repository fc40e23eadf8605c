"""What a caller of one worker wants changed in all of them: one change at a time, in one order."""

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import count

import structlog

from headrace.workers.channel import Message

_LOG = structlog.get_logger(__name__)

MARGIN_S = 2.0
"""How much longer than a change itself its answer may take: a worker says first that it is late."""

Failure = dict[str, str]
"""`kind` and `text`, as `link.failure_of` makes it."""


@dataclass(slots=True)
class _Change:
    what: str
    model: str
    timeout_s: float
    answer: Callable[[Failure | None], None]
    id: int = 0
    deadline_s: float = 0.0
    waiting: set[int] = field(default_factory=set)
    failures: dict[int, Failure] = field(default_factory=dict)
    is_done_somewhere: bool = False


class Changes:
    """
    Loads and unloads that reach all workers before their caller is answered.

    A worker that is starting is asked too: it makes the change as soon as it serves. One that ends
    meanwhile is not waited for: its successor begins with what is `loaded`. Reads no clock.

    Args:
        running: Returns the workers that have a process.
        send: Sends one of them a message.
    """

    def __init__(
        self, running: Callable[[], Iterable[int]], send: Callable[[int, Message], None]
    ) -> None:
        self._running = running
        self._send = send
        self._waiting: deque[_Change] = deque()
        self._current: _Change | None = None
        self._ids = count(1)
        self.loaded: set[str] = set()
        """Models that callers have had loaded, for workers to begin with."""

    @property
    def due_s(self) -> float | None:
        """When `overdue` has something to do, if nothing happens before."""
        return None if self._current is None else self._current.deadline_s

    def ask(self, message: Message, now_s: float, answer: Callable[[Failure | None], None]) -> None:
        """
        Make a change when those before it are made.

        Args:
            message: A worker's `ask`.
            now_s: Now.
            answer: Is told the failure of the first worker that had one; None if none had.
        """
        what, model, timeout_s = message["what"], message["model"], message["timeout_s"]
        self._waiting.append(_Change(what, model, timeout_s, answer))
        self._next(now_s)

    def started(self, worker: int) -> None:
        """Ask a worker that has a process since the change under way began."""
        if self._current is not None:
            self._ask(self._current, worker)

    def ended(self, worker: int, now_s: float) -> None:
        """Wait no longer for a worker."""
        if self._current is not None:
            self._current.waiting.discard(worker)
            self._finish_if_all_have(self._current, now_s)

    def done(self, worker: int, message: Message, now_s: float) -> None:
        """Take a worker's `done`."""
        change = self._current
        if change is None or change.id != message["id"] or worker not in change.waiting:
            return
        change.waiting.discard(worker)
        if message["failure"] is None:
            change.is_done_somewhere = True
        else:
            change.failures[worker] = message["failure"]
        self._finish_if_all_have(change, now_s)

    def overdue(self, now_s: float) -> None:
        """Give up on workers that take too long; they go on."""
        change = self._current
        if change is not None and now_s >= change.deadline_s:
            for worker in change.waiting:
                change.failures[worker] = {"kind": "timeout", "text": ""}
            change.waiting.clear()
            self._finish_if_all_have(change, now_s)

    def _next(self, now_s: float) -> None:
        if self._current is None and self._waiting:
            change = self._current = self._waiting.popleft()
            change.id = next(self._ids)
            change.deadline_s = now_s + change.timeout_s + MARGIN_S
            for worker in self._running():
                self._ask(change, worker)
            self._finish_if_all_have(change, now_s)

    def _ask(self, change: _Change, worker: int) -> None:
        change.waiting.add(worker)
        message = {"type": "change", "id": change.id, "what": change.what, "model": change.model}
        self._send(worker, {**message, "timeout_s": change.timeout_s})

    def _finish_if_all_have(self, change: _Change, now_s: float) -> None:
        if change.waiting:
            return
        self._current = None
        if change.is_done_somewhere:
            (self.loaded.add if change.what == "load" else self.loaded.discard)(change.model)
        failure = None
        if change.failures:
            workers = sorted(change.failures)
            failure = change.failures[workers[0]]
            _LOG.warning("change_failed", what=change.what, model=change.model, workers=workers)
        change.answer(failure)
        self._next(now_s)
