"""What a model does while the features of a batch are on their way, and how long it waits."""

import math
import threading
import time

import numpy as np
import pytest

from headrace.backends.stub import StubBackend
from headrace.batching.batcher import Batcher
from headrace.batching.policy import BatchPolicy
from headrace.features.join import FeatureJoin
from headrace.features.memory_store import MemoryStore
from headrace.features.plan import FeatureSource, ViewSource, compile_plan
from headrace.features.values import ValueType
from headrace.predict import ServedModel
from headrace.request import Request
from headrace.telemetry.metrics import Metrics
from headrace.tensors import CheckedInputs, Signature, TensorSpec

X, Y = TensorSpec("x", "FP32", (-1, 1)), TensorSpec("y", "FP32", (-1, 1))
DRIVER = ("driver_id", "driver_id", ValueType.INT64)
VIEW = ViewSource("v", (DRIVER,), (FeatureSource("f", ValueType.FLOAT),))
PLAN = compile_plan("service", "demo", "1", [VIEW])
FULL = (1, 2, 3, 4)
A_WHILE_S = 0.2
"""To see that nothing happens: what is asserted then fails seldom rather than wrongly."""


class Caller(Request):
    """Asks for drivers, each of whom has his number for a feature."""

    def __init__(self, *drivers, deadline_s=math.inf):
        raw = np.array(drivers, np.int64).tobytes()
        super().__init__(
            CheckedInputs(len(drivers), (raw,), ((1,),)), deadline_s, time.perf_counter(), 8
        )
        self.answered = threading.Event()

    def expired(self, now_s):
        return False

    def answer(self, batch, start, prediction_id):
        self.answer_rows = batch.outputs[0].rows(start, start + self.rows).ravel().tolist()
        self.answered.set()

    def fail(self, error):
        raise error


class SlowStore(MemoryStore):
    """Has what it is asked for a while later; counts who waits."""

    def __init__(self):
        super().__init__()
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Semaphore(0)
        self.timeouts_s = []

    def read(self, *asked, **how):
        self.timeouts_s.append(how["timeout_s"])
        self.entered.release()
        assert self.gate.wait(10)
        time.sleep(0.02)  # longer than the model, by far
        return super().read(*asked, **how)


class Served:
    def __init__(self, model_s=0.0, timeout_s=900.0):
        self.store = SlowStore()
        for driver in range(100):
            self.store.put("v", {"driver_id": driver}, {"f": float(driver)}, event_time_s=1e9)

        def infer(inputs):
            time.sleep(model_s)
            return [inputs["x"]]

        self.model = ServedModel(
            name="m",
            version="1",
            signature=Signature("m", [TensorSpec("driver_id", "INT64", (-1, 1))], [Y], 4),
            backend=StubBackend("m", [X], [Y], infer),
            batcher=Batcher(BatchPolicy(4), max_queue_size=64, overlapping=1),
            metrics=Metrics().model("m", "1"),
            join=FeatureJoin(
                plan=PLAN,
                model_inputs=[X],
                model="m",
                feature_order=None,
                missing_features="nan",
                max_batch_size=4,
            ),
            store=self.store,
            feature_timeout_s=timeout_s,
            overlapping_count=1,
        )
        self.model.start()

    def ask(self, *drivers, **how):
        caller = Caller(*drivers, **how)
        self.model.submit(caller)
        return caller

    def has_asked(self, within_s=10.0):
        """Say whether a batch more is with the store, soon."""
        return self.store.entered.acquire(timeout=within_s)

    def learn(self):
        """Answer a batch, so that what takes longer is known; then hold the store."""
        assert self.ask(*FULL).answered.wait(5)
        assert self.has_asked()
        self.store.gate.clear()


@pytest.fixture
def start():
    started = []

    def start(**how):
        started.append(Served(**how))
        return started[-1]

    yield start
    for served in started:
        served.store.gate.set()
        assert served.model.stop(5)


def test_the_next_full_batch_is_read_while_the_features_of_one_are_on_their_way(start):
    served = start()
    served.learn()
    callers = [served.ask(*FULL), served.ask(5, 6, 7, 8)]

    assert served.has_asked()
    assert served.has_asked()

    served.store.gate.set()
    for caller, drivers in zip(callers, [FULL, (5, 6, 7, 8)], strict=True):
        assert caller.answered.wait(5)
        assert caller.answer_rows == list(drivers)


def test_what_could_grow_waits_for_company_until_the_executor_is_free(start):
    served = start()
    served.learn()
    callers = [served.ask(*FULL), served.ask(5, 6)]

    assert served.has_asked()
    assert not served.has_asked(A_WHILE_S)

    served.store.gate.set()
    assert all(caller.answered.wait(5) for caller in callers)


def test_beside_a_model_that_takes_longer_than_its_features_nothing_is_read_ahead(start):
    served = start(model_s=0.02)
    served.learn()
    callers = [served.ask(*FULL), served.ask(5, 6, 7, 8)]

    assert served.has_asked()
    assert not served.has_asked(A_WHILE_S)

    served.store.gate.set()
    assert all(caller.answered.wait(5) for caller in callers)


@pytest.mark.parametrize(
    ("within_s", "least_s", "most_s"),
    [
        ([300.0, 600.0], 300.0, 600.0),  # the last of them counts
        ([300.0, math.inf], 900.0, 900.0),
        ([300.0, 5_000.0], 900.0, 900.0),
    ],
)
def test_a_batch_waits_for_its_features_no_longer_than_its_callers_wait(
    start, within_s, least_s, most_s
):
    served = start()
    served.learn()
    served.ask(*FULL)  # the others come together, while this one is with the store
    assert served.has_asked()
    callers = [served.ask(driver, deadline_s=time.time() + s) for driver, s in enumerate(within_s)]

    served.store.gate.set()

    assert all(caller.answered.wait(5) for caller in callers)
    assert len(served.store.timeouts_s) == 3
    assert least_s <= served.store.timeouts_s[-1] <= most_s
