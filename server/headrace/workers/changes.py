"""What a caller of one worker wants changed in all of them: one change at a time, in one order."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count

import structlog

from headrace.workers.channel import Message

_LOG = structlog.get_logger(__name__)

Failure = dict[str, str]
"""`kind` and `text`, as `link.failure_of` makes it."""

_LINES = {"load": "models", "unload": "models", "log_level": "logs"}
"""What waits for what: who wants to see more of a load that hangs must not wait behind it."""

_LOG_LEVEL = ""
"""No model's name."""


@dataclass(slots=True)
class _Change:
    what: str
    name: str
    timeout_s: float
    answer: Callable[[Failure | None], None]
    id: int = 0
    deadline_s: float = 0.0
    waiting: set[int] = field(default_factory=set)
    failures: dict[int, Failure] = field(default_factory=dict)
    is_answered: bool = False

    @property
    def line(self) -> str:
        return _LINES[self.what]

    @property
    def subject(self) -> str:
        """What `_made` has it under."""
        return self.name if self.line == "models" else _LOG_LEVEL


@dataclass(frozen=True, slots=True)
class _Made:
    id: int
    what: str
    name: str


class Changes:
    """
    Loads, unloads and log levels that reach all workers before their caller is answered.

    Asked are workers that can answer. One that starts is given the `state` to start with, and
    `join`s before it serves: what has been changed meanwhile it does first. One that ends is not
    waited for. One that takes too long keeps its caller waiting no longer, but what it comes to is
    what workers begin with from then on. Reads no clock.

    Args:
        send: Sends one worker a message.
        log_level: To begin with.
    """

    def __init__(self, send: Callable[[int, Message], None], log_level: str) -> None:
        self._send = send
        self._log_level = log_level
        self._workers: set[int] = set()
        self._waiting: dict[str, deque[_Change]] = {line: deque() for line in _LINES.values()}
        self._current: dict[str, _Change] = {}
        """Of each line, the one whose caller waits while it is made."""
        self._open: dict[int, _Change] = {}
        """Those that some worker has not done yet, the oldest first."""
        self._made: dict[str, _Made] = {}
        """Of each model, and under `_LOG_LEVEL`, the newest that a worker has made."""
        self._seen = self._models_seen = 0
        """Count what becomes of `_made`, and of the models in it."""
        self._ids = count(1)

    @property
    def due_s(self) -> float | None:
        """When `overdue` has something to do, if nothing happens before."""
        return min((change.deadline_s for change in self._current.values()), default=None)

    @property
    def log_level(self) -> str:
        """What it is now."""
        made = self._made.get(_LOG_LEVEL)
        return self._log_level if made is None else made.name

    def state(self) -> Message:
        """Return what a worker is to begin with, and what it says when it wants to `join`."""
        loaded = [change.name for change in self._made.values() if change.what == "load"]
        return {
            "seen": self._seen,
            "models_seen": self._models_seen,
            "loaded": sorted(loaded),
            "log_level": self.log_level,
        }

    def join(self, worker: int, seen: int) -> bool:
        """
        Ask a worker from now on, if it is as the others are: what they are at, it has to do too.

        Args:
            worker: One that is about to serve.
            seen: Of the `state` that it has.

        Returns:
            Whether it may serve; else it needs the `state` of now first.
        """
        if seen != self._seen:
            return False
        self._workers.add(worker)
        for change in self._open.values():
            made = self._made.get(change.subject)
            if made is None or made.id < change.id:  # else the state has it, or a newer one
                self._ask(change, worker)
        return True

    def ask(self, message: Message, now_s: float, answer: Callable[[Failure | None], None]) -> None:
        """
        Make a change when those before it are made.

        Args:
            message: A worker's `ask`.
            now_s: Now.
            answer: Is told the failure of the first worker that had one; None if none had.
        """
        change = _Change(message["what"], message["name"], message["timeout_s"], answer)
        self._waiting[change.line].append(change)
        self._next(change.line, now_s)

    def ended(self, worker: int, now_s: float) -> None:
        """Wait no longer for a worker."""
        self._workers.discard(worker)
        for change in list(self._open.values()):
            change.waiting.discard(worker)
            self._finish_if_all_have(change, now_s)

    def done(self, worker: int, message: Message, now_s: float) -> None:
        """
        Take a worker's `done`, a late one too.

        Args:
            worker: Whose.
            message: Its `failure`; with one, whether the model `serves` all the same.
            now_s: Now.
        """
        change = self._open.get(message["id"])
        if change is None or worker not in change.waiting:
            return
        change.waiting.discard(worker)
        failure = message["failure"]
        if failure is not None:
            change.failures[worker] = failure
        # A load may fail although one of the model's versions serves: whoever comes later has to
        # serve that too.
        if failure is None or (change.what == "load" and message["serves"]):
            newest = self._made.get(change.subject)
            if newest is None or newest.id < change.id:
                self._made[change.subject] = _Made(change.id, change.what, change.name)
                self._seen += 1
                self._models_seen += change.line == "models"
        if change.is_answered:
            kind = None if failure is None else failure["kind"]
            _LOG.warning(
                "change_came_late", what=change.what, name=change.name, of=worker, failure=kind
            )
        self._finish_if_all_have(change, now_s)

    def overdue(self, now_s: float) -> None:
        """Let callers wait no longer for workers that take too long; those go on."""
        for change in list(self._current.values()):
            if now_s >= change.deadline_s:
                late = {worker: {"kind": "timeout", "text": ""} for worker in change.waiting}
                self._answer({**change.failures, **late}, change, now_s)

    def _next(self, line: str, now_s: float) -> None:
        if line not in self._current and self._waiting[line]:
            change = self._current[line] = self._waiting[line].popleft()
            change.id = next(self._ids)
            change.deadline_s = now_s + change.timeout_s
            self._open[change.id] = change
            for worker in sorted(self._workers):
                self._ask(change, worker)
            self._finish_if_all_have(change, now_s)

    def _ask(self, change: _Change, worker: int) -> None:
        change.waiting.add(worker)
        message = {"type": "change", "id": change.id, "what": change.what, "name": change.name}
        self._send(worker, message)

    def _finish_if_all_have(self, change: _Change, now_s: float) -> None:
        if change.waiting:
            return
        self._open.pop(change.id, None)
        if not change.is_answered:
            self._answer(change.failures, change, now_s)

    def _answer(self, failures: dict[int, Failure], change: _Change, now_s: float) -> None:
        change.is_answered = True
        del self._current[change.line]
        failure = None
        if failures:
            workers = sorted(failures)
            failure = failures[workers[0]]
            _LOG.warning("change_failed", what=change.what, name=change.name, workers=workers)
        change.answer(failure)
        self._next(change.line, now_s)
