"""A change is answered when all workers have made it, and workers that come later begin with it."""

import pytest

from headrace.workers.changes import MARGIN_S, Changes

REFUSED = {"kind": "load", "text": "no such model"}
LATE = {"kind": "timeout", "text": ""}


class World:
    def __init__(self, workers=(1, 2)):
        self.workers = set(workers)
        self.sent = []
        self.answers = []
        self.changes = Changes(
            lambda: self.workers, lambda worker, message: self.sent.append((worker, message))
        )

    def ask(self, what="load", model="m"):
        message = {"type": "ask", "what": what, "model": model, "timeout_s": 10.0}
        self.changes.ask(message, 100.0, self.answers.append)

    def asked(self):
        return [(worker, message["what"], message["model"]) for worker, message in self.sent]

    def done(self, worker, failure=None):
        number = self.sent[-1][1]["id"]
        self.changes.done(worker, {"type": "done", "id": number, "failure": failure}, 101.0)


def test_the_caller_is_answered_when_the_last_worker_is_done():
    world = World()
    world.ask()
    assert sorted(world.asked()) == [(1, "load", "m"), (2, "load", "m")]

    world.done(2)
    assert world.answers == []
    world.done(1)

    assert world.answers == [None]
    assert world.changes.loaded == {"m"}


def test_an_unload_is_remembered_too():
    world = World()
    for what in ("load", "unload"):
        world.ask(what)
        world.done(1)
        world.done(2)

    assert world.changes.loaded == set()


def test_changes_are_made_one_after_another():
    world = World()
    world.ask(model="first")
    world.ask(model="second")
    assert {model for _, _, model in world.asked()} == {"first"}

    world.done(1)
    world.done(2)

    assert {model for _, _, model in world.asked()} == {"first", "second"}


@pytest.mark.parametrize("failing", [(1,), (2,), (1, 2)])
def test_the_failure_of_any_worker_is_the_callers(failing):
    world = World()
    world.ask()
    for worker in (1, 2):
        world.done(worker, REFUSED if worker in failing else None)

    assert world.answers == [REFUSED]
    assert world.changes.loaded == (set() if failing == (1, 2) else {"m"})


def test_a_worker_that_dies_is_not_waited_for():
    world = World()
    world.ask()
    world.done(1)
    world.changes.ended(2, 101.0)

    assert world.answers == [None]


def test_a_worker_that_starts_meanwhile_is_waited_for():
    world = World(workers=[1])
    world.ask()
    world.changes.started(2)
    world.done(1)
    assert world.answers == []
    assert world.asked()[-1] == (2, "load", "m")

    world.done(2)

    assert world.answers == [None]


def test_a_worker_that_takes_too_long_is_given_up_and_heard_no_more():
    world = World()
    world.ask()
    world.done(1)
    assert world.changes.due_s == 110.0 + MARGIN_S

    world.changes.overdue(110.0)
    assert world.answers == []
    world.changes.overdue(110.0 + MARGIN_S)
    assert world.answers == [LATE]
    world.done(2)

    assert world.answers == [LATE]
    assert world.changes.due_s is None


def test_without_workers_there_is_nothing_to_wait_for():
    world = World(workers=[])
    world.ask()

    assert world.answers == [None]
    assert world.changes.loaded == set()
