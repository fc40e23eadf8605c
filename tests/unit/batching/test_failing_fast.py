"""A model whose batches fail at once, and which is well again: what is expected of it then.

The batcher and the carrying of batches are the real thing under a clock of the test's; one
executor, and arrivals at random moments from a seed.
"""

import math
import random

import numpy as np
import pytest
from one_executor import Clock, Rests, Tokens

from headrace import carrying
from headrace.batching import batcher as batcher_module
from headrace.batching.batcher import Batcher
from headrace.batching.policy import BatchPolicy
from headrace.carrying import BatchCarrier
from headrace.errors import BackendUnavailable, ServingError
from headrace.request import Answering, Request
from headrace.tensors import CheckedInputs, Signature, TensorSpec

X, Y = TensorSpec("x", "INT64", (-1, 1)), TensorSpec("y", "INT64", (-1, 1))
SIZE = 16
FAILS_S = 0.0002
GONE_FROM_S, GONE_UNTIL_S, END_S = 1.0, 3.0, 5.5
"""In between every batch fails at once."""


class Caller(Request):
    """Notes when it was answered."""

    __slots__ = ("answered_s", "clock")

    def __init__(self, clock, within_s):
        raw = np.array([1], np.int64).tobytes()
        super().__init__(
            CheckedInputs(1, (raw,), ((1,),)), clock.now_s + within_s, clock.now_s, len(raw)
        )
        self.clock, self.answered_s = clock, math.nan

    def expired(self, now_s):
        return self.deadline_s <= now_s

    def answer(self, batch, start, prediction_id):
        self.answered_s = self.clock.now_s

    def fail(self, error):
        pass


class Observer:
    def take_numbers(self, count):
        return 0

    def failed(self, count):
        pass

    def answered(self, batch, carried):
        pass


class World:
    """One model under a load, from second 0 to `END_S`; its own backend."""

    inputs, outputs, is_remote = (X,), (Y,), False
    is_gone = False

    def __init__(self, monkeypatch, batch_s, load, within_s, *, fails):
        self.clock = clock = Clock()
        for module in (batcher_module, carrying):
            monkeypatch.setattr(module, "time", clock)
        monkeypatch.setattr(batcher_module, "threading", clock)
        monkeypatch.setattr(batcher_module, "SimpleQueue", Tokens)
        self.batch_s, self.within_s, self.fails = batch_s, within_s, fails
        self.arrivals_per_s = load * SIZE / batch_s
        self.numbers = random.Random(1)
        self.batcher = Batcher(BatchPolicy(SIZE), max_queue_size=10_000)
        self.carrier = BatchCarrier(
            model=Answering("m", "1", Signature("m", [X], [Y], SIZE)),
            backend=self,
            metrics=Observer(),
            observer=Observer(),
            id_prefix="p",
            join=None,
            store=None,
            feature_timeout_s=1.0,
            max_feature_age_s=None,
            buckets=None,
        )
        self.callers = []
        self.errors = []  # of estimates, batch by batch, once it is well again

    def infer(self, inputs):
        if self.is_gone:
            raise BackendUnavailable("gone")
        return [inputs["x"]]

    def run(self):
        clock, was_answered = self.clock, True
        next_s = self.numbers.expovariate(self.arrivals_per_s)
        while clock.now_s < END_S:
            try:
                batch = self.batcher.take(was_answered=was_answered)
            except Rests:
                clock.now_s, batch = next_s, None
            until_s = clock.now_s
            if batch:
                self.is_gone = self.fails and GONE_FROM_S <= clock.now_s < GONE_UNTIL_S
                until_s += FAILS_S if self.is_gone else self.batch_s
            while next_s <= until_s:
                clock.now_s = next_s
                self.arrive()
                next_s += self.numbers.expovariate(self.arrivals_per_s)
            clock.now_s = until_s
            if batch:
                was_answered = self.carrier.carry(batch)
                if clock.now_s >= GONE_UNTIL_S and not self.is_gone:
                    expected_s = self.batcher._cost.estimate_s(len(batch))
                    self.errors.append(expected_s / self.batch_s - 1)
        return self

    def arrive(self):
        caller = Caller(self.clock, self.within_s)
        self.callers.append(caller)
        try:
            self.batcher.put(caller)
        except ServingError:
            self.callers.pop()

    @property
    def late(self):
        """How many were run to be told too late, of those who came once it was well again."""
        return sum(
            caller.answered_s > caller.deadline_s
            for caller in self.callers
            if caller.arrival_s >= GONE_UNTIL_S
        )


@pytest.mark.parametrize("load", [0.5, 0.9, 1.5], ids=lambda load: f"load {load}")
@pytest.mark.parametrize("batch_s", [0.02, 0.05, 0.2], ids=lambda s: f"{1000 * s:g} ms")
def test_batches_that_fail_at_once_teach_nothing_of_how_long_answers_take(
    monkeypatch, batch_s, load
):
    world = World(monkeypatch, batch_s, load, 4 * batch_s, fails=True).run()
    always_well = World(monkeypatch, batch_s, load, 4 * batch_s, fails=False).run()

    assert max(map(abs, world.errors[4:])) < 0.1
    assert world.late <= always_well.late
