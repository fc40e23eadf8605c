"""What a `config.pbtxt` says of waiting, and what becomes of those who wait: from text to queue."""

import math

import numpy as np
import pytest

from headrace import predict
from headrace.backends.stub import StubBackend
from headrace.batching import batcher as batcher_module
from headrace.errors import DeadlineExceeded, Overloaded
from headrace.loading import VersionLoader
from headrace.predict import ServedModel
from headrace.repository.config import parse_config
from headrace.request import Request
from headrace.settings import load_settings
from headrace.telemetry.metrics import Metrics
from headrace.tensors import CheckedInputs, Signature, TensorSpec

X, Y = TensorSpec("x", "FP32", (-1, 1)), TensorSpec("y", "FP32", (-1, 1))
SLO = "parameters { key: 'latency_slo_ms' value { string_value: '80' } }"


class Clock:
    """What the queue believes to be `time`."""

    now_s = 1_000.0

    def time(self):
        return self.now_s

    perf_counter = time


class Caller(Request):
    """A request that keeps the error that it is told."""

    def __init__(self, name, now_s, priority, timeout_us, deadline_s):
        raw = np.zeros(1, np.float32).tobytes()
        super().__init__(CheckedInputs(1, (raw,), ((1,),)), deadline_s, now_s, len(raw))
        self.name, self.priority, self.timeout_s = name, priority, timeout_us / 1e6
        self.error = None

    def expired(self, now_s):
        return self.deadline_s <= now_s

    def answer(self, batch, start, prediction_id):
        raise AssertionError("nothing is run here")

    def fail(self, error):
        self.error = error


class Model:
    """One that a text configures, and whose batches the test takes."""

    def __init__(self, text, root, clock, **settings):
        config = parse_config(f"max_batch_size: 1 {text}", "m")
        assert not config.without_effect
        loader = VersionLoader(
            load_settings({"model_repository": root, **settings}), None, None, metrics := Metrics()
        )
        self.served = ServedModel(
            name="m",
            version="1",
            signature=Signature("m", [X], [Y], 1),
            backend=StubBackend("m", [X], [Y], lambda inputs: [inputs["x"]]),
            batcher=loader._batcher(config),
            metrics=metrics.model("m", "1"),
            latency_slo_s=config.latency_slo_s,
        )
        self.clock, self.callers = clock, []

    def ask(self, name, *, priority=0, timeout=0, deadline_s=math.inf):
        caller = Caller(name, self.clock.now_s, priority, timeout, deadline_s)
        self.served.submit(caller)
        self.callers.append(caller)

    def after(self, seconds):
        self.clock.now_s += seconds

    def order(self):
        """Take all who wait now; return their names in the order in which they were served."""
        self.served.queue.close()
        order = ""
        while (batch := self.served.queue.take()) is not None:
            order += "".join(caller.name for caller in batch)
        return order

    @property
    def given_up(self):
        assert all(isinstance(c.error, DeadlineExceeded | None) for c in self.callers)
        return "".join(caller.name for caller in self.callers if caller.error is not None)


@pytest.fixture
def model(monkeypatch, tmp_path):
    clock = Clock()
    monkeypatch.setattr(batcher_module, "time", clock)
    monkeypatch.setattr(predict, "time", clock)
    return lambda text, **settings: Model(text, tmp_path, clock, **settings)


def policy(more):
    return f"dynamic_batching {{ default_queue_policy {{ {more} }} }}"


@pytest.mark.parametrize(
    ("own", "waiting"), [("", 2), ("max_queue_size: 1", 1), ("max_queue_size: 3", 3)]
)
def test_a_models_own_queue_is_as_long_as_it_says_whatever_the_servers_limit(model, own, waiting):
    asked = model(policy(own), max_queue_size=2)
    for _ in range(waiting):
        asked.ask("a")

    with pytest.raises(Overloaded):
        asked.ask("b")


@pytest.mark.parametrize(
    ("action", "order", "given_up"),
    [("", "b", "a"), ("timeout_action: REJECT", "b", "a"), ("timeout_action: DELAY", "ba", "")],
)
def test_who_has_waited_for_the_timeout_is_given_up_or_goes_last(model, action, order, given_up):
    asked = model(policy(f"default_timeout_microseconds: 100000 {action}"))
    asked.ask("a")
    asked.after(0.05)
    asked.ask("b")
    asked.after(0.051)

    assert (asked.order(), asked.given_up) == (order, given_up)


@pytest.mark.parametrize("action", ["REJECT", "DELAY"])
def test_who_has_waited_for_less_is_served_in_turn(model, action):
    asked = model(policy(f"default_timeout_microseconds: 100000 timeout_action: {action}"))
    asked.ask("a")
    asked.after(0.05)
    asked.ask("b")
    asked.after(0.049)

    assert (asked.order(), asked.given_up) == ("ab", "")


@pytest.mark.parametrize("action", ["REJECT", "DELAY"])
def test_without_a_timeout_anybody_waits_as_long_as_it_takes(model, action):
    asked = model(policy(f"timeout_action: {action}"))
    asked.ask("a")
    asked.after(0.05)
    asked.ask("b")
    asked.after(3_600)

    assert (asked.order(), asked.given_up) == ("ab", "")


@pytest.mark.parametrize(
    ("override", "timeout", "order"),
    [
        ("", 20_000, "ab"),
        ("allow_timeout_override: false", 20_000, "ab"),
        ("allow_timeout_override: true", 20_000, "ba"),
        ("allow_timeout_override: true", 0, "ab"),
    ],
)
def test_a_call_s_timeout_shortens_a_delaying_level_s_only_where_it_may(
    model, override, timeout, order
):
    level = f"default_timeout_microseconds: 100000 timeout_action: DELAY {override}"
    asked = model(policy(level))
    asked.ask("a", timeout=timeout)
    asked.after(0.03)
    asked.ask("b")

    assert (asked.order(), asked.given_up) == (order, "")


def test_and_never_lengthens_it(model):
    level = "default_timeout_microseconds: 100000 timeout_action: DELAY"
    asked = model(policy(f"{level} allow_timeout_override: true"))
    asked.ask("a", timeout=10_000_000)
    asked.after(0.11)
    asked.ask("b")

    assert asked.order() == "ba"


@pytest.mark.parametrize("override", ["", "allow_timeout_override: true"])
def test_where_nothing_is_delayed_a_call_s_timeout_is_its_deadline(model, override):
    asked = model(policy(override))
    asked.ask("a", timeout=20_000)
    asked.after(0.03)
    asked.ask("b")

    assert (asked.order(), asked.given_up) == ("b", "a")


def test_a_level_has_its_own_policy_and_the_others_the_default_one(model):
    asked = model(
        """
        dynamic_batching {
          priority_levels: 3
          default_priority_level: 3
          default_queue_policy { default_timeout_microseconds: 50000 }
          priority_queue_policy {
            key: 2
            value { timeout_action: DELAY default_timeout_microseconds: 20000 max_queue_size: 2 }
          }
        }
        """
    )
    for name, priority in (("a", 1), ("b", 2), ("c", 3), ("d", 0)):
        asked.ask(name, priority=priority)
    asked.after(0.04)
    for name, priority in (("A", 1), ("B", 2), ("C", 3)):
        asked.ask(name, priority=priority)
    with pytest.raises(Overloaded):
        asked.ask("x", priority=2)
    asked.after(0.02)

    assert (asked.order(), asked.given_up) == ("ABbC", "acd")


@pytest.mark.parametrize("override", ["", "allow_timeout_override: true"])
def test_a_timeout_that_is_no_deadline_does_not_take_the_place_of_the_latency_objective(
    model, override
):
    asked = model(policy(f"timeout_action: DELAY {override}") + SLO)
    asked.ask("a", timeout=1)
    asked.after(0.05)
    asked.ask("b", timeout=1)
    asked.after(0.04)

    assert (asked.order(), asked.given_up) == ("b", "a")


def test_one_that_is_a_deadline_does(model):
    asked = model(SLO)
    asked.ask("a", timeout=200_000)
    asked.ask("b")
    asked.ask("c", deadline_s=asked.clock.now_s + 0.2)
    asked.after(0.1)

    assert (asked.order(), asked.given_up) == ("ac", "b")
