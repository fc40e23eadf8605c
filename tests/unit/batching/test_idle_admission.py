"""Who is taken by an executor with nothing to do: hardly anybody for nothing, and for no guess.

The batcher is the real thing under a clock of the test's; one executor, driven by hand.
"""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from one_executor import Clock, Rests, Tokens

from headrace.batching import batcher as batcher_module
from headrace.batching.batcher import Batcher
from headrace.batching.policy import BatchPolicy
from headrace.batching.queue import PATIENCE_S
from headrace.errors import Overloaded

MODEL_S = 0.05


class Caller:
    parts = ()
    byte_count = 1
    priority = 0
    timeout_s = 0.0
    place = None

    def __init__(self, rows, deadline_s, arrival_s):
        self.rows = rows
        self.batch_key = "shape"
        self.deadline_s = deadline_s
        self.arrival_s = arrival_s

    def expired(self, now_s):
        return self.deadline_s <= now_s

    def drop(self):
        raise AssertionError("nobody waits here")


class Model:
    """A batcher with one executor, which has nothing to do before and after each call."""

    def __init__(self):
        with pytest.MonkeyPatch.context() as patch:
            self.clock = Clock(1_000.0)
            for name in ("time", "threading"):
                patch.setattr(batcher_module, name, self.clock)
            patch.setattr(batcher_module, "SimpleQueue", Tokens)
            self.batcher = Batcher(BatchPolicy(8), max_queue_size=8)

    def serves(self, takes_s, *, within_s=math.inf, rows=1):
        """Ask for rows; say whether they were run, which takes so long."""
        with pytest.MonkeyPatch.context() as patch:
            for name in ("time", "threading"):
                patch.setattr(batcher_module, name, self.clock)
            now_s = self.clock.now_s
            caller = Caller(rows, now_s + within_s, now_s)
            try:
                self.batcher.put(caller)
            except Overloaded:
                return False
            assert self.batcher.take() == [caller]
            self.clock.now_s += takes_s
            with pytest.raises(Rests):
                self.batcher.take()
            return True

    def learn(self, takes_s, batches=20, rows=1):
        for _ in range(batches):
            assert self.serves(takes_s, rows=rows)


def test_before_anything_is_known_nobody_is_refused_on_a_guess():
    assert Model().serves(MODEL_S, within_s=0.005)


def test_a_deadline_shorter_than_the_model_is_run_for_nothing_once_in_a_while_at_most():
    model = Model()
    model.learn(MODEL_S)
    begun_s, run = model.clock.now_s, 0

    for _ in range(1_000):
        run += model.serves(MODEL_S, within_s=0.005)
        model.clock.now_s += 0.02

    passed_s = model.clock.now_s - begun_s
    assert passed_s / PATIENCE_S / 2 <= run <= passed_s / PATIENCE_S
    assert model.batcher.refused_late == 1_000 - run


def test_others_who_are_answered_meanwhile_make_even_that_unneeded():
    model = Model()
    model.learn(MODEL_S)

    for _ in range(100):
        assert not model.serves(MODEL_S, within_s=0.005)
        assert model.serves(MODEL_S, within_s=1.0)
        assert model.serves(MODEL_S)
        model.clock.now_s += 0.5


def test_who_makes_it_on_average_is_taken_whatever_the_margin():
    model, numbers = Model(), random.Random(3)
    for _ in range(300):
        model.learn(MODEL_S * numbers.lognormvariate(0, 0.5), batches=1)
    average_s = model.batcher._cost.estimate_s(1)
    assert model.batcher._cost.bound_s(1) > 1.5 * average_s

    assert model.serves(MODEL_S, within_s=1.05 * average_s)


def test_many_rows_are_judged_by_what_many_rows_take():
    model = Model()
    for rows in (1, 8) * 20:
        model.learn(0.01 + 0.01 * rows, batches=1, rows=rows)

    assert not model.serves(0.09, within_s=0.05, rows=8)
    assert model.serves(0.02, within_s=0.05, rows=1)
    assert not model.serves(0.09, within_s=0.05, rows=8)


def first_served_s(model, takes_s, within_s):
    """Ask a hundred times a second; return when the first was run, from now."""
    begun_s = model.clock.now_s
    while not model.serves(takes_s, within_s=within_s):
        model.clock.now_s += 0.01
    return model.clock.now_s - takes_s - begun_s


def test_after_a_slow_time_one_call_is_tried_within_a_second_and_then_all_are_served():
    model = Model()
    model.learn(0.005)
    model.learn(2.0)

    assert first_served_s(model, 0.005, within_s=0.02) <= PATIENCE_S + 0.02
    for _ in range(1_000):
        assert model.serves(0.005, within_s=0.02)
        model.clock.now_s += 0.01


@given(
    st.floats(1e-3, 100.0), st.integers(1, 200), st.floats(1e-4, 1.0), st.floats(1.0 + 1e-6, 50.0)
)
def test_expectations_mend_after_any_slow_time(slow_s, batches, fast_s, times):
    model = Model()
    model.learn(fast_s)
    model.learn(slow_s, batches)

    assert first_served_s(model, fast_s, within_s=times * fast_s) <= PATIENCE_S + 0.02
    for _ in range(20):
        assert model.serves(fast_s, within_s=times * fast_s)
        model.clock.now_s += 0.01
