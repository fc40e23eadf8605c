"""Asks all workers for their numbers, and waits for a worker that hangs only so long."""

from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import count

from prometheus_client.core import Metric

from headrace.workers.channel import Message
from headrace.workers.numbers import Ledger

TIMEOUT_S = 1.0
"""A worker that does not answer in that time is on the page with what it had counted before."""

Make = Callable[[Ledger, Iterable[int]], list[Metric]]
"""Makes a page of the ledger and the workers that have answered."""


@dataclass(slots=True)
class _Question:
    make: Make
    answer: Future[list[Metric]]
    deadline_s: float
    waiting: set[int] = field(default_factory=set)
    present: set[int] = field(default_factory=set)


class Questions:
    """
    Pages that somebody waits for. One thread's own, but for the futures. Reads no clock.

    Args:
        ledger: Gets what comes.
        serving: Returns the workers that can be asked.
        send: Sends one of them a message.
    """

    def __init__(
        self,
        ledger: Ledger,
        serving: Callable[[], Iterable[int]],
        send: Callable[[int, Message], None],
    ) -> None:
        self._ledger = ledger
        self._serving = serving
        self._send = send
        self._open: dict[int, _Question] = {}
        self._ids = count(1)

    @property
    def due_s(self) -> float | None:
        """When `overdue` has something to do, if nothing happens before."""
        return min((question.deadline_s for question in self._open.values()), default=None)

    def ask(self, make: Make, answer: "Future[list[Metric]]", now_s: float) -> None:
        """Ask all workers; the page is made when they have answered, or their time is over."""
        number, workers = next(self._ids), list(self._serving())
        question = _Question(make, answer, now_s + TIMEOUT_S, waiting=set(workers))
        self._open[number] = question
        for worker in workers:
            self._send(worker, {"type": "numbers", "id": number})
        self._answer_if_all_have(number, question)

    def answered(self, worker: int, message: Message) -> None:
        """Take a worker's numbers, late ones too."""
        self._ledger.report(worker, message["families"])
        question = self._open.get(message["id"])
        if question is not None:
            question.present.add(worker)
            question.waiting.discard(worker)
            self._answer_if_all_have(message["id"], question)

    def ended(self, worker: int) -> None:
        """Wait no longer for a worker."""
        self._ledger.ended(worker)
        for number, question in list(self._open.items()):
            question.waiting.discard(worker)
            self._answer_if_all_have(number, question)

    def overdue(self, now_s: float) -> None:
        """Make the pages whose time is over."""
        for number, question in list(self._open.items()):
            if now_s >= question.deadline_s:
                question.waiting.clear()
                self._answer_if_all_have(number, question)

    def _answer_if_all_have(self, number: int, question: _Question) -> None:
        if question.waiting or self._open.pop(number, None) is None:
            return
        try:
            page = question.make(self._ledger, sorted(question.present))
        except Exception as error:  # noqa: BLE001 whoever asked is told; the workers go on
            question.answer.set_exception(error)
        else:
            question.answer.set_result(page)
