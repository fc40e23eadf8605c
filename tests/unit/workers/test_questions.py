"""A page is made when all workers have answered, and no later than its time is over."""

from concurrent.futures import Future

import pytest
from prometheus_client.core import CounterMetricFamily

from headrace.workers.numbers import Ledger, page_of
from headrace.workers.questions import TIMEOUT_S, Questions


class World:
    def __init__(self, workers=(1, 2)):
        self.workers = list(workers)
        self.sent = []
        self.questions = Questions(
            Ledger(2), lambda: self.workers, lambda *sent: self.sent.append(sent)
        )

    def ask(self):
        answer = Future()
        self.questions.ask(Ledger.together, answer, 100.0)
        return answer

    def answered(self, worker, count, question=0):
        family = CounterMetricFamily("headrace_batches", "help", value=count)
        number = self.sent[question * len(self.workers)][1]["id"]
        self.questions.answered(worker, {"id": number, "families": page_of([family])})


def count(answer):
    (family,) = answer.result(0)
    return family.samples[0].value


def test_the_page_waits_for_all():
    world = World()
    answer = world.ask()
    world.answered(1, 5)
    assert not answer.done()
    world.answered(2, 6)

    assert count(answer) == 11
    assert world.questions.due_s is None


def test_the_page_does_not_wait_for_one_that_dies_or_hangs():
    for leave in ("ended", "overdue"):
        world = World()
        answer = world.ask()
        world.answered(1, 5)
        if leave == "ended":
            world.questions.ended(2)
        else:
            world.questions.overdue(100.0 + TIMEOUT_S)

        assert count(answer) == 5


def test_what_comes_late_counts_the_next_time():
    world = World()
    world.ask()
    world.questions.overdue(100.0 + TIMEOUT_S)
    world.answered(1, 5)
    world.answered(2, 6)

    answer = world.ask()
    world.questions.overdue(100.0 + TIMEOUT_S)

    assert count(answer) == 11


def test_several_may_ask_at_once():
    world = World()
    first, second = world.ask(), world.ask()
    for worker in (1, 2):
        for question in (0, 1):
            world.answered(worker, 5, question)

    assert count(first) == count(second) == 10


def test_without_workers_the_page_is_empty():
    assert World(workers=[]).ask().result(0) == []


def test_a_page_that_cannot_be_made_is_told_to_whoever_asked():
    world = World(workers=[])
    answer = Future()

    world.questions.ask(lambda *_: 1 / 0, answer, 100.0)

    with pytest.raises(ZeroDivisionError):
        answer.result(0)
