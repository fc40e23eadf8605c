"""When a request that comes now is expected to be answered: after what goes before it."""

import random
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from waiting_callers import Caller, cost

from headrace.batching.ahead import COUNTED_MAX
from headrace.batching.cost import BatchCost
from headrace.batching.fair_queue import FairQueue
from headrace.batching.policy import BatchPolicy, LevelPolicy
from headrace.batching.queue import RequestQueue

ONE_LEVEL = (LevelPolicy(),)
KINDS = pytest.mark.parametrize("kind", [RequestQueue, FairQueue], ids=["plain", "fair"])


def queue(*callers, size=4, levels=ONE_LEVEL, known=None, executors=1, kind=RequestQueue):
    made = kind(BatchPolicy(size), known or BatchCost(), levels, executors=executors)
    for caller in callers:
        assert made.add(caller, 0.0)
    return made


def test_an_idle_executor_is_expected_to_begin_at_once():
    waiting = queue(known=cost(0.1))

    assert waiting.finish_s(Caller("a", 9), 5.0, 0.0) == pytest.approx(5.1, rel=0.01)


def test_a_request_of_several_batches_is_expected_to_take_as_long_as_they_do():
    known = cost(0.01, 0.01)
    waiting = queue(known=known)

    finish_s = waiting.finish_s(Caller("a", 9, rows=40), 0.0, 0.0)

    assert finish_s == pytest.approx(9 * 0.05 + known.bound_s(4), rel=0.05)


def test_what_is_ahead_is_waited_for_and_what_is_behind_is_not():
    known = cost(0.1)
    waiting = queue(*[Caller("w", 0.8) for _ in range(8)], known=known)

    late = waiting.finish_s(Caller("a", 0.9), 0.0, 0.05)
    early = waiting.finish_s(Caller("b", 0.7), 0.0, 0.05)

    assert late == pytest.approx(0.05 + 2 * 0.1 + known.bound_s(4), rel=0.05)
    assert early == pytest.approx(0.05 + known.bound_s(4), rel=0.05)


def test_large_ones_behind_are_not_taken_for_small_ones_ahead():
    known = cost(0.1)
    small = [Caller("w", 0.3) for _ in range(8)]
    large = [Caller("p", 0.8, rows=4) for _ in range(15)]
    waiting = queue(*small, *large, known=known)

    finish_s = waiting.finish_s(Caller("a", 0.5), 0.0, 0.05)

    assert finish_s == pytest.approx(0.05 + 2 * 0.1 + known.bound_s(4), rel=0.05)


def test_several_executors_share_what_is_ahead():
    known = cost(0.1)
    waiting = queue(*[Caller("w", 0.5) for _ in range(8)], known=known, executors=2)

    finish_s = waiting.finish_s(Caller("a", 0.9), 0.0, 0.0)

    assert finish_s == pytest.approx(0.1 + known.bound_s(4), rel=0.05)


def test_a_higher_level_waits_for_no_other_shape_of_a_lower_one():
    known = cost(0.01)
    flood = [Caller("w", priority=2, key="x") for _ in range(1_600)]
    waiting = queue(*flood, size=32, levels=[LevelPolicy()] * 2, known=known)

    for key in "xy":
        finish_s = waiting.finish_s(Caller("a", 0.1, priority=1, key=key), 0.0, 0.01)
        assert finish_s == pytest.approx(0.01 + known.bound_s(32), rel=0.05)


def test_nor_does_an_earlier_deadline_wait_for_other_shapes_that_are_due_later():
    known = cost(0.01)
    waiting = queue(*[Caller("w", 0.9, key="x") for _ in range(400)], known=known)

    first = waiting.finish_s(Caller("a", 0.5, key="y"), 0.0, 0.01)
    last = waiting.finish_s(Caller("b", 0.95, key="y"), 0.0, 0.01)

    assert first == pytest.approx(0.01 + known.bound_s(1), rel=0.05)
    assert last == pytest.approx(0.01 + 100 * 0.01 + known.bound_s(1), rel=0.05)


@KINDS
def test_each_shape_ahead_is_a_batch_however_few_its_rows(kind):
    known = cost(0.01)
    waiting = kind(BatchPolicy(32), known)
    for key in range(64):
        waiting.add(Caller("w", key=key), 0.0)

    assert waiting.finish_s(Caller("a", key="new"), 0.0, 0.0) == pytest.approx(0.65, rel=0.05)
    assert waiting.finish_s(Caller("a", key=63), 0.0, 0.0) == pytest.approx(0.64, rel=0.05)
    assert not waiting.is_in_time(0.6, 0.0)
    assert waiting.is_in_time(0.8, 0.0)


@KINDS
def test_of_many_shapes_no_more_are_taken_than_can_be_answered_in_time(kind):
    waiting, answered = kind(BatchPolicy(32), cost(0.01)), 0
    taken = 0
    for number in range(400):
        caller = Caller("a", 0.25, key=number % 200)
        if waiting.finish_s(caller, 0.0, 0.0) <= caller.deadline_s:
            taken += waiting.add(caller, 0.0)

    for step in range(25):
        answered += len(waiting.take(step * 0.01).batch)

    assert 20 <= taken <= 50
    assert answered >= taken - 2


@KINDS
def test_who_joins_a_batch_waits_only_for_what_goes_before_its_head(kind):
    known = cost(0.01)
    first = Caller("f", 0.1, key="own")
    waiting = queue(
        first, *[Caller("w", 0.5, key=key) for key in range(20)], known=known, kind=kind
    )

    joins = waiting.finish_s(Caller("a", 0.9, key="own"), 0.0, 0.0)
    alone = waiting.finish_s(Caller("a", 0.9, key="new"), 0.0, 0.0)

    assert joins == pytest.approx(known.bound_s(2), rel=0.05)
    assert alone == pytest.approx(21 * 0.01 + known.bound_s(1), rel=0.05)


@KINDS
def test_nor_is_other_shapes_rest_waited_for_that_is_due_later(kind):
    known = cost(0.01)
    early = [Caller("e", 0.2, key=key) for key in range(4)]
    late = [Caller("l", 0.8, key=key) for key in range(4, 40)]
    waiting = queue(*early, *late, known=known, kind=kind)

    finish_s = waiting.finish_s(Caller("a", 0.5, key="new"), 0.0, 0.0)

    assert finish_s == pytest.approx(4 * 0.01 + known.bound_s(1), abs=0.011)


KEYS = st.sampled_from("xxyz")


@given(
    there=st.lists(
        st.tuples(KEYS, st.floats(0.3, 1.2), st.integers(1, 2)), min_size=1, max_size=60
    ),
    comes=st.tuples(KEYS, st.floats(0.3, 1.2), st.integers(1, 2)),
    size=st.sampled_from([0, 1, 4, 16]),
)
def test_a_request_ends_when_it_is_expected_to_if_nobody_comes_after_it(there, comes, size):
    known = cost(1e-5, 1e-6)
    waiting = RequestQueue(BatchPolicy(size), known, [LevelPolicy()] * 2)
    for key, due_s, level in there:
        waiting.add(Caller("w", due_s, key=key, priority=level), 0.0)
    key, due_s, level = comes
    caller = Caller("a", due_s, key=key, priority=level)

    expected_s = waiting.finish_s(caller, 0.0, 0.0)

    waiting.add(caller, 0.0)
    now_s, batch = 0.0, []
    while caller not in batch:
        batch = waiting.take(now_s).batch
        now_s += known.estimate_s(len(batch))
    assert expected_s == pytest.approx(now_s, rel=0.05)


@KINDS
def test_what_a_request_that_has_its_time_need_not_ask_is_never_less_than_what_it_would_hear(kind):
    numbers = random.Random(7)
    for _ in range(300):
        waiting = kind(BatchPolicy(numbers.choice((1, 4))), cost(0.01))
        for _ in range(numbers.choice((0, 1, 5, 40))):
            waiting.add(Caller("w", numbers.uniform(0.2, 1.2), key=numbers.randrange(8)), 0.0)
        caller = Caller("a", numbers.uniform(0.01, 1.0), key=numbers.randrange(8))
        if waiting.is_in_time(caller.deadline_s, 0.0):
            assert waiting.finish_s(caller, 0.0, 0.01) <= caller.deadline_s


def test_looking_at_hundreds_of_shapes_ends_after_some():
    waiting = queue(*[Caller("w", key=key) for key in range(4_000)], known=cost(1e-4))
    caller = Caller("a", 9.0, key="new")
    start_s = time.perf_counter()

    for _ in range(200):
        assert waiting.finish_s(caller, 0.0, 0.0) >= 0.01

    assert time.perf_counter() - start_s < 200 * 0.0005


class Counted(Caller):
    """Counts how often somebody looks at its rows."""

    looks = 0

    @property
    def rows(self):
        Counted.looks += 1
        return self._rows

    @rows.setter
    def rows(self, rows):
        self._rows = rows


def test_of_hundreds_of_shapes_with_many_waiting_only_some_requests_are_looked_at():
    numbers = random.Random(5)
    waiting = queue(
        *[
            Counted("w", numbers.uniform(0.1, 0.9), key=key)
            for key in range(128)
            for _ in range(32)
        ],
        known=cost(1e-4),
    )
    Counted.looks = 0

    finish_s = waiting.finish_s(Caller("a", 0.5, key="new"), 0.0, 0.0)

    assert Counted.looks <= COUNTED_MAX
    assert finish_s == pytest.approx(128 * 4 * 1e-4, rel=0.2)  # half of them are due before it
