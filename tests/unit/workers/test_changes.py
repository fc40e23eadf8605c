"""A change is answered when all workers have made it, and workers that come later begin with it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.workers.changes import Changes

REFUSED = {"kind": "load", "text": "no such model"}
LATE = {"kind": "timeout", "text": ""}


class World:
    def __init__(self, workers=(1, 2)):
        self.sent = []
        self.answers = []
        self.changes = Changes(
            lambda worker, message: self.sent.append((worker, message)), log_level="info"
        )
        for worker in workers:
            self.begin(worker)

    def begin(self, worker):
        """Have a worker start, with all there is, and begin to serve."""
        assert self.changes.join(worker, self.changes.state()["seen"])

    def ask(self, what="load", name="m", at_s=100.0):
        message = {"type": "ask", "what": what, "name": name, "timeout_s": 10.0}
        self.changes.ask(message, at_s, self.answers.append)

    def asked(self, worker=None):
        return [
            (number, message["what"], message["name"])
            for number, message in self.sent
            if worker in (None, number)
        ]

    def done(self, worker, failure=None, change=-1, *, serves=False):
        ids = sorted({message["id"] for number, message in self.sent if number == worker})
        message = {"type": "done", "id": ids[change], "failure": failure, "serves": serves}
        self.changes.done(worker, message, 101.0)

    @property
    def loaded(self):
        return self.changes.state()["loaded"]


def test_the_caller_is_answered_when_the_last_worker_is_done():
    world = World()
    world.ask()
    assert sorted(world.asked()) == [(1, "load", "m"), (2, "load", "m")]

    world.done(2)
    assert world.answers == []
    world.done(1)

    assert world.answers == [None]
    assert world.loaded == ["m"]


def test_an_unload_is_remembered_too():
    world = World()
    for what in ("load", "unload"):
        world.ask(what)
        world.done(1)
        world.done(2)

    assert world.loaded == []


def test_changes_are_made_one_after_another():
    world = World()
    world.ask(name="first")
    world.ask(name="second")
    assert {name for _, _, name in world.asked()} == {"first"}

    world.done(1)
    world.done(2)

    assert {name for _, _, name in world.asked()} == {"first", "second"}


@pytest.mark.parametrize("failing", [(1,), (2,), (1, 2)])
def test_the_failure_of_any_worker_is_the_callers(failing):
    world = World()
    world.ask()
    for worker in (1, 2):
        world.done(worker, REFUSED if worker in failing else None)

    assert world.answers == [REFUSED]
    assert world.loaded == ([] if failing == (1, 2) else ["m"])


def test_a_load_that_failed_for_one_of_its_versions_is_what_the_next_worker_begins_with():
    world = World()
    world.ask()
    world.done(1, REFUSED, serves=True)
    world.done(2, REFUSED, serves=True)

    assert world.answers == [REFUSED]
    assert world.loaded == ["m"]


def test_a_load_after_which_nothing_serves_is_forgotten():
    world = World()
    world.ask()
    world.done(1, REFUSED)
    world.done(2, REFUSED)

    assert world.loaded == []


def test_a_worker_that_dies_is_not_waited_for():
    world = World()
    world.ask()
    world.done(1)
    world.changes.ended(2, 101.0)

    assert world.answers == [None]


def test_a_worker_that_has_died_is_asked_no_more():
    world = World()
    world.changes.ended(2, 99.0)
    world.ask()
    world.done(1)

    assert world.asked() == [(1, "load", "m")]
    assert world.answers == [None]


def test_without_workers_there_is_nothing_to_wait_for():
    world = World(workers=[])
    world.ask()

    assert world.answers == [None]
    assert world.loaded == []


# Workers that take too long


def test_a_worker_that_takes_too_long_is_given_up():
    world = World()
    world.ask()
    world.done(1)
    assert world.changes.due_s == 110.0

    world.changes.overdue(109.9)
    assert world.answers == []
    world.changes.overdue(110.0)
    assert world.answers == [LATE]
    world.done(2)

    assert world.answers == [LATE]
    assert world.changes.due_s is None


def test_what_all_workers_do_too_late_is_what_the_next_one_begins_with():
    world = World()
    world.ask()
    world.changes.overdue(110.0)
    assert world.answers == [LATE]
    assert world.loaded == []

    world.done(2)

    assert world.loaded == ["m"]


def test_a_late_failure_changes_nothing():
    world = World()
    world.ask()
    world.changes.overdue(110.0)
    world.done(1, REFUSED)
    world.done(2, REFUSED)

    assert world.loaded == []


def test_a_late_load_does_not_undo_the_unload_after_it():
    world = World()
    world.ask("load")
    world.changes.overdue(110.0)
    world.ask("unload", at_s=111.0)
    for change in (0, 1):
        world.done(2, change=change)
    world.done(1, change=0)
    assert world.loaded == []
    world.done(1, change=1)

    assert world.answers == [LATE, None]
    assert world.loaded == []


def test_a_worker_that_begins_while_others_are_late_has_to_do_it_too():
    world = World()
    world.ask("load", "m")
    world.changes.overdue(110.0)
    world.ask("load", "n", at_s=111.0)
    world.changes.ended(1, 112.0)
    world.begin(1)
    assert world.asked(1)[-2:] == [(1, "load", "m"), (1, "load", "n")]

    for worker in (1, 2):
        for change in (-2, -1):
            world.done(worker, change=change)

    assert world.answers == [LATE, None]
    assert world.loaded == ["m", "n"]


# Workers that start


def test_a_worker_that_starts_is_neither_asked_nor_waited_for():
    world = World(workers=[1])
    world.changes.state()  # which the other one starts with
    world.ask()
    world.done(1)

    assert world.asked() == [(1, "load", "m")]
    assert world.answers == [None]


def test_what_changed_while_a_worker_started_it_does_before_it_begins():
    world = World(workers=[1])
    started_with = world.changes.state()
    world.ask()
    world.done(1)
    assert not world.changes.join(2, started_with["seen"])

    again = world.changes.state()
    assert again["loaded"] == ["m"]
    assert world.changes.join(2, again["seen"])
    world.ask("unload")

    assert world.asked(2) == [(2, "unload", "m")]


def test_a_model_that_is_loaded_anew_while_a_worker_starts_is_looked_at_again():
    world = World(workers=[1])
    world.ask()
    world.done(1)
    started_with = world.changes.state()
    world.ask()  # its files have changed
    world.done(1)

    assert started_with["loaded"] == world.loaded
    assert not world.changes.join(2, started_with["seen"])


def test_a_worker_is_not_asked_again_for_what_it_has_begun_with():
    world = World(workers=[1, 2])
    for what in ("load", "unload"):
        world.ask(what)
        world.done(1)
        if what == "load":
            world.done(2)
    world.begin(3)  # without the model: 1 has unloaded it, and 2 is still at it
    assert world.asked(3) == []

    world.done(2)

    assert world.answers == [None, None]


def test_a_log_level_is_no_reason_to_look_at_models_again():
    world = World(workers=[1])
    before = world.changes.state()
    world.ask("log_level", "debug")
    world.done(1)
    after = world.changes.state()

    assert after["seen"] != before["seen"]
    assert after["models_seen"] == before["models_seen"]


def test_a_worker_that_begins_during_a_change_makes_it_and_is_waited_for():
    world = World(workers=[1])
    world.ask()
    world.begin(2)
    world.done(1)
    assert world.answers == []
    assert world.asked(2) == [(2, "load", "m")]

    world.done(2)

    assert world.answers == [None]


# The log's level


def test_a_log_level_does_not_wait_for_a_load():
    world = World()
    world.ask("load", "m")
    world.ask("log_level", "debug")
    for worker in (1, 2):
        world.done(worker)  # the newest

    assert world.answers == [None]
    assert world.changes.state()["log_level"] == "debug"
    assert world.loaded == []


def test_the_newest_log_level_is_what_a_worker_begins_with():
    world = World(workers=[1])
    assert world.changes.state()["log_level"] == "info"
    for level in ("debug", "error"):
        world.ask("log_level", level)
        world.done(1)

    assert world.changes.state()["log_level"] == "error"


# All of it together


class Server:
    """Workers that make changes one by one, as late as they like, and die; time is a count."""

    def __init__(self):
        self.now_s = 0.0
        self.queues = {}
        self.models = {}
        self.starting = {}
        self.answers = {}
        self.changes = Changes(lambda worker, message: self.queues[worker].append(message), "info")

    def start(self, worker):
        if worker not in self.queues and worker not in self.starting:
            self.starting[worker] = self.changes.state()

    def built(self, worker):
        if worker in self.starting:
            state = self.starting.pop(worker)
            self.queues[worker] = []
            if self.changes.join(worker, state["seen"]):
                self.models[worker] = set(state["loaded"])
            else:
                del self.queues[worker]
                self.starting[worker] = self.changes.state()

    def ask(self, what, name):
        number = len(self.answers)
        self.answers[number] = []
        message = {"what": what, "name": name, "timeout_s": 3.0}
        self.changes.ask(message, self.now_s, self.answers[number].append)

    def work(self, worker):
        if self.queues.get(worker):
            change = self.queues[worker].pop(0)
            models = self.models[worker]
            failure, serves = None, change["what"] == "load"
            if change["what"] == "load":
                models.add(change["name"])
                if change["name"] == "n":  # one of its versions is broken
                    failure = REFUSED
            elif change["name"] in models:
                models.remove(change["name"])
            else:
                failure = {"kind": "load", "text": "it is not loaded"}
            self.changes.done(
                worker, {"id": change["id"], "failure": failure, "serves": serves}, self.now_s
            )

    def die(self, worker):
        self.starting.pop(worker, None)
        if self.queues.pop(worker, None) is not None:
            del self.models[worker]
        self.changes.ended(worker, self.now_s)

    def wait(self):
        self.now_s += 1.0
        self.changes.overdue(self.now_s)


WORKERS = st.integers(0, 2)
STEPS = st.one_of(
    st.tuples(st.sampled_from(["start", "built", "die"]), WORKERS),
    st.tuples(st.just("work"), WORKERS),
    st.tuples(st.just("ask"), st.sampled_from(["load", "unload"]), st.sampled_from("mn")),
    st.tuples(st.just("wait")),
)


@given(st.lists(STEPS, min_size=8, max_size=60))
def test_whenever_workers_die_start_or_are_late_they_end_up_alike(steps):
    server = Server()
    for worker in range(3):
        server.start(worker)
        server.built(worker)
    for name, *arguments in steps:
        getattr(server, name)(*arguments)
    for _ in range(4 * (len(steps) + 1)):
        for worker in range(3):
            server.start(worker)
            server.built(worker)
            server.work(worker)
        server.wait()

    assert all(len(answers) == 1 for answers in server.answers.values())
    assert set(server.models) == {0, 1, 2}
    assert all(
        sorted(models) == server.changes.state()["loaded"] for models in server.models.values()
    )
