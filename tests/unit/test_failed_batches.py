"""What a batch that failed leaves behind: nothing that waits for the garbage collector."""

import gc
import time
import weakref

import numpy as np
import pytest

from headrace.backends.stub import StubBackend
from headrace.batching.batcher import Batcher
from headrace.batching.policy import BatchPolicy
from headrace.errors import (
    ComputationFailed,
    DeadlineExceeded,
    FeatureStoreUnavailable,
    InvalidRequest,
)
from headrace.feature_reads import FeatureReads, FeatureRequest
from headrace.features.join import FeatureJoin
from headrace.features.memory_store import MemoryStore
from headrace.features.plan import FeatureSource, ViewSource, compile_plan
from headrace.features.plans import Selection
from headrace.features.values import ValueType
from headrace.predict import ServedModel
from headrace.request import Request
from headrace.telemetry.calls import CallRecorder
from headrace.telemetry.feature_metrics import FeatureReadMetrics, ViewMetrics
from headrace.telemetry.metrics import Metrics
from headrace.tensors import CheckedInputs, Signature, TensorSpec

X, Y = TensorSpec("x", "FP32", (-1, 1)), TensorSpec("y", "FP32", (-1, 1))
DRIVER = ("driver_id", "driver_id", ValueType.INT64)
VIEW = ViewSource("v", (DRIVER,), (FeatureSource("f", ValueType.FLOAT),))
PLAN = compile_plan("service", "demo", "1", [VIEW])
BATCHES = pytest.mark.parametrize(
    "numbers",
    [(-1,), (1, -1), (1, 2, 3, 4, 5, 6, 7, 8, -1), (-1, -1, 3, -1, 5, 6, -1, -1, -1)],
    ids=["one", "two", "nine", "nine of which six are wrong"],
)


class Account:
    """Counts what is given back."""

    def __init__(self):
        self.refunded = 0

    def refund(self, caller, rows):
        self.refunded += rows


class Caller(Request):
    """A request of a number, which references alone must free: nothing but a test keeps it."""

    __slots__ = ("__weakref__", "has_left", "outcomes")

    def __init__(self, number, outcomes, dtype=np.float32):
        raw = np.array([number], dtype).tobytes()
        super().__init__(
            CheckedInputs(1, (raw,), ((1,),)), float("inf"), time.perf_counter(), len(raw)
        )
        self.outcomes = outcomes
        self.has_left = False

    def expired(self, now_s):
        return self.has_left or self.deadline_s <= now_s

    def answer(self, batch, start, prediction_id):
        self.outcomes.append("answered")

    def fail(self, error):
        self.outcomes.append(type(error).__name__)


class Reader(FeatureRequest):
    """As `Caller`, for features without a model."""

    __slots__ = ("__weakref__", "has_left", "number", "outcomes")
    method = "test/Read"

    def __init__(self, number, outcomes):
        super().__init__(
            Selection("1"),
            1,
            deadline_s=float("inf"),
            arrival_s=time.perf_counter(),
            byte_count=8,
            trace=None,
        )
        self.number = number
        self.outcomes = outcomes
        self.has_left = False

    def column_values(self, column):
        return [self.number]

    expired = Caller.expired
    fail = Caller.fail

    def answer(self, read, start):
        self.outcomes.append("answered")


class Store(MemoryStore):
    """A store in which driver -1 cannot be computed, and that can be gone."""

    is_gone = False
    on_read = staticmethod(lambda: None)

    def read(self, plan, entities, **how):
        self.on_read()
        if self.is_gone:
            raise FeatureStoreUnavailable("gone")
        if -1 in entities["driver_id"]:
            raise ComputationFailed("on-demand feature view 'odd' failed")
        return super().read(plan, entities, **how)


def run(inputs):
    if (inputs["x"] < 0).any():
        raise ValueError("negative")
    return [inputs["x"] * 2]


def model_of(store=None, missing_features="nan"):
    """Return a model that fails on negative numbers; with a store, one that is joined to it."""
    join = None
    inputs = [X]
    if store is not None:
        join = FeatureJoin(
            plan=PLAN,
            model_inputs=[X],
            model="m",
            feature_order=None,
            missing_features=missing_features,
            max_batch_size=16,
        )
        inputs = join.inputs
    metrics = Metrics().model("m", "1")
    model = ServedModel(
        name="m",
        version="1",
        signature=Signature("m", inputs, [Y], 16),
        backend=StubBackend("m", [X], [Y], run),
        batcher=Batcher(BatchPolicy(16), max_queue_size=64),
        metrics=metrics,
        join=join,
        store=store,
    )
    return model, metrics


class Plans:
    def find(self, selection):
        return PLAN


def reads_of(store):
    return FeatureReads(
        Plans(),
        store,
        FeatureReadMetrics(),
        ViewMetrics(),
        CallRecorder(Metrics()),
        max_entities=100,
        max_queue_size=100,
        max_queue_bytes=1 << 20,
        timeout_s=1.0,
    )


def alive_after(carry, batch):
    """Carry a batch and say how many of its requests are still there, without the collector."""
    gc.collect()
    gc.disable()
    try:
        kept = [weakref.ref(request) for request in batch]
        carry(list(batch))  # one of its own, as the queue gives it away
        batch.clear()
        return sum(one() is not None for one in kept)
    finally:
        gc.enable()


def outcomes_of(numbers, wrong):
    return sorted(wrong if number < 0 else "answered" for number in numbers)


@BATCHES
def test_requests_that_the_model_cannot_run_are_freed_without_the_collector(numbers):
    model, _ = model_of()
    outcomes = []

    alive = alive_after(model._carrier.carry, [Caller(number, outcomes) for number in numbers])

    assert sorted(outcomes) == outcomes_of(numbers, "BackendError")
    assert alive == 0


@BATCHES
def test_and_those_whose_features_cannot_be_computed(numbers):
    model, _ = model_of(Store())
    outcomes = []
    batch = [Caller(number, outcomes, np.int64) for number in numbers]

    alive = alive_after(model._carrier.carry, batch)

    assert sorted(outcomes) == outcomes_of(numbers, "ComputationFailed")
    assert alive == 0


@BATCHES
def test_and_those_whose_store_is_gone_before_or_during_the_search(numbers):
    for goes_at in (1, 2):
        store = Store()
        reads = iter(range(1, 100))

        def look(store=store, reads=reads, goes_at=goes_at):
            store.is_gone = next(reads) >= goes_at

        store.on_read = look
        model, _ = model_of(store)
        outcomes = []
        batch = [Caller(number, outcomes, np.int64) for number in numbers]

        assert alive_after(model._carrier.carry, batch) == 0
        assert len(outcomes) == len(numbers)
        assert set(outcomes) == (
            {"ComputationFailed"}
            if goes_at == 2 and len(numbers) == 1
            else {"FeatureStoreUnavailable"}
        )


@BATCHES
def test_the_same_holds_for_features_without_a_model(numbers):
    reads = reads_of(Store())
    outcomes = []
    batch = [Reader(number, outcomes) for number in numbers]

    alive = alive_after(lambda batch: reads._serve(PLAN, batch), batch)

    assert sorted(outcomes) == outcomes_of(numbers, "ComputationFailed")
    assert alive == 0


@BATCHES
def test_and_when_their_store_is_gone(numbers):
    store = Store()
    store.is_gone = True
    reads = reads_of(store)
    outcomes = []
    batch = [Reader(number, outcomes) for number in numbers]

    assert alive_after(lambda batch: reads._serve(PLAN, batch), batch) == 0
    assert outcomes == ["FeatureStoreUnavailable"] * len(numbers)


def test_who_is_out_of_time_during_the_search_has_failed_and_pays_for_the_run():
    model, metrics = model_of()
    outcomes, account = [], Account()
    batch = [Caller(number, outcomes) for number in (-1, 2, 3)]
    hurried = batch[1]
    hurried.paid_from = account

    def run_then_be_late(inputs):
        hurried.deadline_s = 0.0
        return run(inputs)

    model._backend._function = run_then_be_late
    model._carrier.carry(batch)

    assert sorted(outcomes) == ["BackendError", "DeadlineExceeded", "answered"]
    assert metrics.requests_failed == 2
    assert account.refunded == 0


def test_who_leaves_during_the_search_is_told_apart_from_who_is_out_of_time():
    model, metrics = model_of()
    outcomes = []
    batch = [Caller(number, outcomes) for number in (-1, 2, 3)]

    def run_then_leave(inputs):
        batch[1].has_left = True
        return run(inputs)

    model._backend._function = run_then_leave
    model._carrier.carry(batch)

    assert sorted(outcomes) == ["BackendError", "CallerLeft", "answered"]
    assert metrics.requests_failed == 2


def test_and_likewise_where_features_are_read_without_a_model():
    store = Store()
    reads = reads_of(store)
    outcomes, account = [], Account()
    batch = [Reader(number, outcomes) for number in (-1, 2, 3)]
    hurried = batch[1]
    hurried.paid_from = account
    store.on_read = lambda: setattr(hurried, "deadline_s", 0.0)

    reads._serve(PLAN, batch)

    assert sorted(outcomes) == ["ComputationFailed", DeadlineExceeded.__name__, "answered"]
    assert reads._metrics._requests_failed == 2
    assert account.refunded == 0


def incomplete_store(known):
    """Return a store in which only some drivers are known, and the list of its reads."""
    store, reads = Store(), []
    for number in known:
        store.put("v", {"driver_id": number}, {"f": 1.0}, time.time())
    store.on_read = lambda: reads.append(None)
    return store, reads


def test_who_is_rejected_for_missing_features_fails_once_whatever_befalls_the_others():
    store, reads = incomplete_store(known=range(3, 10))
    model, metrics = model_of(store, "reject")
    outcomes = []
    callers = [Caller(number, outcomes, np.int64) for number in range(10)]

    def look():
        reads.append(None)
        store.is_gone = len(reads) > 1

    store.on_read = look
    assert not model._carrier.carry(callers)

    assert outcomes == ["MissingFeatures"] * 3 + ["FeatureStoreUnavailable"] * 7
    assert metrics.requests_failed == 10


def test_and_likewise_during_the_search_for_others():
    store, _ = incomplete_store(known=range(1, 8))
    model, metrics = model_of(store, "reject")
    outcomes = []
    callers = [Caller(number, outcomes, np.int64) for number in (-1, *range(1, 10))]

    assert model._carrier.carry(callers)

    assert sorted(outcomes) == ["ComputationFailed", *["MissingFeatures"] * 2, *["answered"] * 7]
    assert metrics.requests_failed == 3


def test_of_a_batch_whose_callers_are_all_rejected_nobody_was_answered():
    store, reads = incomplete_store(known=())
    model, _ = model_of(store, "reject")
    outcomes = []

    assert not model._carrier.carry([Caller(number, outcomes, np.int64) for number in (1, 2)])

    assert outcomes == ["MissingFeatures"] * 2
    assert len(reads) == 1


def test_a_remote_model_is_not_waited_for_in_time_that_features_have_used_up():
    store, _ = incomplete_store(known=(1,))
    model, _ = model_of(store)
    outcomes, waits_s = [], []
    caller = Caller(1, outcomes, np.int64)
    caller.deadline_s = time.time() + 5.0
    store.on_read = lambda: time.sleep(0.5)
    backend = model._backend
    backend.is_remote = True

    def infer(inputs, timeout_s=None, traceparent=None):
        waits_s.append(timeout_s)
        return run(inputs)

    backend.infer = infer
    model._carrier.carry([caller])

    assert outcomes == ["answered"]
    assert waits_s[0] <= 4.5


class WrongReader(Reader):
    __slots__ = ()

    def column_values(self, column):
        raise InvalidRequest("wrong")


def test_who_asks_wrongly_for_features_fails_once_whatever_befalls_the_others():
    store = Store()
    store.is_gone = True
    reads = reads_of(store)
    outcomes = []

    assert not reads._serve(PLAN, [WrongReader(1, outcomes), Reader(2, outcomes)])

    assert outcomes == ["InvalidRequest", "FeatureStoreUnavailable"]
    assert reads._metrics._requests_failed == 2


def expected_s(batcher):
    return batcher._cost.estimate_s(1)


def run_one_by_one(submit, requests, outcomes):
    for request in requests:
        count = len(outcomes)
        submit(request)
        until(lambda count=count: len(outcomes) > count)


def until(condition):
    deadline_s = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline_s, "it did not happen"
        time.sleep(0.001)


def test_a_model_that_fails_at_once_is_not_believed_to_have_become_faster():
    model, _ = model_of()
    outcomes = []

    def take_time(inputs):
        done = run(inputs)
        time.sleep(0.05)
        return done

    model._backend._function = take_time
    model.start()
    try:
        callers = [Caller(number, outcomes) for number in [1] * 3 + [-1] * 30]
        run_one_by_one(model.submit, callers, outcomes)
    finally:
        assert model.stop(5)

    assert outcomes == ["answered"] * 3 + ["BackendError"] * 30
    assert expected_s(model._batcher) >= 0.05


def test_nor_is_a_store_that_does():
    store = Store()
    reads = reads_of(store)
    outcomes = []
    store.on_read = lambda: None if store.is_gone else time.sleep(0.05)
    reads.start()
    try:
        run_one_by_one(reads.submit, [Reader(1, outcomes) for _ in range(3)], outcomes)
        store.is_gone = True
        run_one_by_one(reads.submit, [Reader(1, outcomes) for _ in range(30)], outcomes)
    finally:
        assert reads.stop(5)

    assert outcomes == ["answered"] * 3 + ["FeatureStoreUnavailable"] * 30
    assert expected_s(reads._short) >= 0.05
