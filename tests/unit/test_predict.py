"""What happens to a request between the queue and its reply."""

import gc
import threading
import time
import weakref

import numpy as np
import pytest

from headrace.backends.stub import StubBackend
from headrace.batching.batcher import Batcher
from headrace.batching.bisection import attempts_max
from headrace.batching.policy import BatchPolicy
from headrace.errors import (
    BackendError,
    BackendUnavailable,
    CallerLeft,
    DeadlineExceeded,
    Draining,
)
from headrace.predict import ServedModel
from headrace.request import Request
from headrace.telemetry.metrics import Metrics
from headrace.tensors import CheckedInputs, Signature, TensorSpec

X, Y = TensorSpec("x", "FP32", (-1, 1)), TensorSpec("y", "FP32", (-1, 1))


class Caller(Request):
    """A request of `numbers`, that keeps what it was told."""

    def __init__(self, *numbers, deadline_s=float("inf")):
        raw = np.array(numbers, np.float32).tobytes()
        super().__init__(
            CheckedInputs(len(numbers), (raw,), ((1,),)), deadline_s, time.perf_counter(), len(raw)
        )
        self.has_left = False
        self.told = []
        self.prediction_ids = []
        self.done = threading.Event()

    def expired(self, now_s):
        return self.has_left or self.deadline_s <= now_s

    def answer(self, batch, start, prediction_id):
        self.prediction_ids.append(prediction_id)
        self._tell(batch.outputs[0].rows(start, start + self.rows).ravel().tolist())

    def fail(self, error):
        self._tell(error)

    def _tell(self, what):
        self.told.append(what)
        self.done.set()


class Served:
    """A model that doubles, fails on a batch with a negative number, and can be held."""

    def __init__(self, function=None, max_batch_size=8):
        self.batches = []
        self.gate = threading.Event()
        self.gate.set()
        self.backend = StubBackend("m", [X], [Y], function or self._double, gate=self.gate)
        self.metrics = Metrics()
        self.model = ServedModel(
            name="m",
            version="1",
            signature=Signature("m", [X], [Y], max_batch_size),
            backend=self.backend,
            batcher=Batcher(BatchPolicy(max_batch_size), max_queue_size=64),
            metrics=self.metrics.model("m", "1"),
        )

    def _double(self, inputs):
        self.batches.append(inputs["x"].ravel().tolist())
        if (inputs["x"] < 0).any():
            raise ValueError("negative")
        return [inputs["x"] * 2]

    def hold(self, *callers):
        """Queue callers behind a batch that is held, so that they share the next one."""
        self.gate.clear()
        first = Caller(0)
        self.model.submit(first)
        assert self.backend.entered.acquire(timeout=5)
        for caller in callers:
            self.model.submit(caller)
        return first


@pytest.fixture
def served():
    served = Served()
    served.model.start()
    yield served
    served.gate.set()
    assert served.model.stop(5)


def told(caller):
    assert caller.done.wait(5)
    assert len(caller.told) == 1
    return caller.told[0]


def test_callers_who_share_a_batch_each_get_their_own_rows(served):
    callers = [Caller(1), Caller(2, 3), Caller(4)]
    served.hold(*callers)

    served.gate.set()

    assert [told(caller) for caller in callers] == [[2], [4, 6], [8]]
    assert served.batches == [[0], [1, 2, 3, 4]]


def test_prediction_ids_are_of_one_length_and_never_repeat(served):
    callers = [Caller(i) for i in range(20)]
    for caller in callers:
        served.model.submit(caller)
    for caller in callers:
        told(caller)

    ids = [prediction_id for caller in callers for prediction_id in caller.prediction_ids]
    assert len(set(ids)) == 20
    assert {len(prediction_id) for prediction_id in ids} == {Request.PREDICTION_ID_LENGTH}


def test_a_caller_who_has_left_costs_nothing_and_does_not_disturb_its_batch(served):
    leaving, staying = Caller(5), Caller(6)
    served.hold(leaving, staying)
    leaving.has_left = True

    served.gate.set()

    assert told(staying) == [12]
    assert isinstance(told(leaving), CallerLeft)
    assert served.batches == [[0], [6]]


def test_a_deadline_that_passes_in_the_queue_drops_the_request(served):
    late, patient = Caller(5, deadline_s=time.time() + 0.1), Caller(6)
    served.hold(late, patient)
    while time.time() < late.deadline_s:
        time.sleep(0.01)

    served.gate.set()

    assert told(patient) == [12]
    assert isinstance(told(late), DeadlineExceeded)
    assert served.batches == [[0], [6]]


def test_rows_that_the_model_cannot_run_fail_alone(served):
    callers = [Caller(1), Caller(-1), Caller(3)]
    served.hold(*callers)

    served.gate.set()

    assert told(callers[0]) == [2]
    assert isinstance(told(callers[1]), BackendError)
    assert told(callers[2]) == [6]
    numbers = served.metrics.model("m", "1")
    assert (numbers.requests, numbers.requests_failed) == (3, 1)


@pytest.mark.parametrize("rows", [0, 1])
def test_a_model_that_loses_rows_fails_its_callers_and_not_the_next(rows):
    served = Served(lambda inputs: [inputs["x"][: rows if len(inputs["x"]) == 2 else None]])
    served.model.start()
    short, right = Caller(1, 2), Caller(3)

    served.model.submit(short)
    assert isinstance(told(short), BackendError)
    served.model.submit(right)

    assert told(right) == [3]
    assert served.model.stop(5)


def test_an_answer_that_cannot_be_made_fails_alone(served):
    class Odd(Caller):
        def answer(self, batch, start, prediction_id):
            raise RuntimeError("a bug")

    callers = [Caller(1), Odd(2), Caller(3)]
    served.hold(*callers)

    served.gate.set()

    assert told(callers[0]) == [2]
    assert isinstance(told(callers[1]), BackendError)
    assert "a bug" not in str(told(callers[1]))
    assert told(callers[2]) == [6]


def test_a_request_for_which_the_model_loses_rows_fails_alone():
    def lose_sevens(inputs):
        return [inputs["x"][inputs["x"][:, 0] != 7]]

    served = Served(lose_sevens)
    served.model.start()
    callers = [Caller(1), Caller(7), Caller(3)]
    served.hold(*callers)

    served.gate.set()

    assert told(callers[0]) == [1]
    assert isinstance(told(callers[1]), BackendError)
    assert told(callers[2]) == [3]
    assert served.model.stop(5)


def test_a_caller_who_leaves_during_the_search_for_who_is_to_blame_is_not_run(served):
    callers = [Caller(-1), Caller(5), Caller(6)]
    real = served.backend._function

    def leave_then_run(inputs):
        if len(inputs["x"]) == 3:  # the whole batch, before the search for the one to blame
            callers[1].has_left = True
        return real(inputs)

    served.backend._function = leave_then_run
    served.hold(*callers)

    served.gate.set()

    assert told(callers[2]) == [12]
    assert isinstance(told(callers[1]), CallerLeft)
    assert [5] not in served.batches


def test_who_is_to_blame_is_found_in_few_runs():
    served = Served(max_batch_size=64)
    served.model.start()
    callers = [Caller(-1 if i == 37 else i) for i in range(64)]
    served.hold(*callers)

    served.gate.set()

    for i, caller in enumerate(callers):
        if i == 37:
            assert isinstance(told(caller), BackendError)
        else:
            assert told(caller) == [2 * i]
    assert len(served.batches) == 2 + 2 * 6  # the one held, the whole batch, the search
    assert served.model.stop(5)


def test_a_model_that_fails_on_everything_is_not_run_for_each_request():
    served = Served(max_batch_size=64)
    served.model.start()
    callers = [Caller(-1) for _ in range(64)]
    served.hold(*callers)

    served.gate.set()

    assert all(isinstance(told(caller), BackendError) for caller in callers)
    assert served.model.stop(5)
    assert len(served.batches) <= 2 + attempts_max(64)
    assert served.metrics.model("m", "1").requests_failed == 64


def test_a_remote_model_that_goes_away_during_the_search_is_not_asked_for_everybody(served):
    def fail_then_go(inputs, timeout_s=None):
        served.batches.append(len(inputs["x"]))
        if len(inputs["x"]) == 8:
            raise BackendError("somebody's values")
        raise BackendUnavailable("gone")

    callers = [Caller(i) for i in range(8)]
    served.hold(*callers)
    served.backend.infer = fail_then_go

    served.gate.set()

    assert all(isinstance(told(caller), BackendUnavailable) for caller in callers)
    assert served.batches[1:] == [8, 4]


def test_a_remote_model_that_has_no_time_for_some_is_asked_for_the_others(served):
    def fail_then_hang(inputs, timeout_s=None):
        numbers = inputs["x"].ravel().tolist()
        if len(numbers) == 4:
            raise BackendError("somebody's values")
        if 1 in numbers:  # not in the time that its callers have
            time.sleep(max(0.0, hurried[0].deadline_s + 0.01 - time.time()))
            raise BackendUnavailable("not in time")
        return [inputs["x"] * 2]

    hurried = [Caller(i, deadline_s=time.time() + 1.0) for i in (1, 2)]
    patient = [Caller(i) for i in (3, 4)]
    served.hold(*hurried, *patient)
    served.backend.infer = fail_then_hang

    served.gate.set()

    assert all(isinstance(told(caller), BackendUnavailable) for caller in hurried)
    assert [told(caller) for caller in patient] == [[6], [8]]


def test_a_caller_who_cannot_be_told_of_a_failure_keeps_nobody_else_from_it():
    class Deaf(Caller):
        def fail(self, error):
            raise RuntimeError("a bug")

    served = Served(lambda inputs: 1 / 0)
    served.backend.infer = lambda inputs, timeout_s=None: 1 / 0  # no error that a backend may raise
    served.model.start()
    served.model.submit(Deaf(1))
    other = Caller(2)
    served.model.submit(other)

    assert isinstance(told(other), BackendError)
    assert served.model.is_alive
    assert served.model.stop(5)


def test_what_waits_is_finished_when_the_model_stops_and_the_rest_refused(served):
    waiting = [Caller(i) for i in range(1, 20)]
    served.hold(*waiting)
    stopper = threading.Thread(target=served.model.stop, args=(10,))
    stopper.start()
    while True:
        try:
            served.model.submit(extra := Caller(100))
        except Draining:
            break
        waiting.append(extra)

    served.gate.set()
    stopper.join(10)

    assert [told(caller) for caller in waiting] == [
        [2 * float(np.frombuffer(caller.raws[0], np.float32)[0])] for caller in waiting
    ]


def test_a_model_that_hangs_is_reported_when_it_stops(served):
    served.hold()

    assert not served.model.stop(0.05)


def test_a_model_without_a_batch_dimension_runs_one_request_at_a_time():
    served = Served(max_batch_size=0)
    served.model.start()
    callers = [Caller(1), Caller(2)]
    for caller in callers:
        caller.batch_key = ((1, 1),)
    served.hold(*callers)

    served.gate.set()

    for caller in callers:
        told(caller)
    assert served.batches[-2:] == [[1], [2]]
    assert served.model.stop(5)


def test_an_executor_that_has_nothing_to_do_keeps_nobody_s_request(served):
    gc.collect()
    gc.disable()
    try:
        caller = Caller(1)
        served.model.submit(caller)
        assert told(caller) == [2]
        freed = weakref.ref(caller)
        del caller
        deadline_s = time.monotonic() + 10
        while freed() is not None:
            assert time.monotonic() < deadline_s, "it is kept"
            time.sleep(0.002)
    finally:
        gc.enable()
