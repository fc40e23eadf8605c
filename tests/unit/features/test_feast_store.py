"""Reading through Feast: its failures and its hangs stay its own."""

import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import structlog

from headrace.errors import FeatureStoreUnavailable
from headrace.features.feast_store import FeastStore
from headrace.features.plan import FeatureSource, ViewSource, compile_plan
from headrace.features.values import ValueType

KEY = (("id", "id", ValueType.INT64),)
PLAN = replace(
    compile_plan(
        *("", "demo", "1"),
        [ViewSource("view", KEY, (FeatureSource("f", ValueType.FLOAT),))],
        references=["view:f"],
    ),
    registry=SimpleNamespace(online=None),
)
HIDDEN = "^the online feature store does not answer$"


def feast_store(behave):
    """A store whose provider, Feast's way to its own, does what it is told."""
    return FeastStore(None, SimpleNamespace(get_online_features=lambda **_: behave()))


@pytest.fixture
def release():
    release = threading.Event()
    yield release
    release.set()


def read(store, timeout_s):
    store.read(PLAN, {"id": np.array([1])}, now_s=0.0, timeout_s=timeout_s)


def test_a_failure_of_feasts_is_unavailable_without_its_text():
    def fail():
        raise ConnectionError("cannot reach db.internal with password hunter2")

    store = feast_store(fail)
    with pytest.raises(FeatureStoreUnavailable, match=HIDDEN):
        read(store, 10.0)
    store.check()
    store.close()


def test_a_read_that_hangs_costs_its_caller_the_timeout_and_fails_the_check():
    release = threading.Event()
    store = feast_store(lambda: release.wait(60))
    started_s = time.monotonic()
    for _ in range(2):  # the second waits behind the first
        with pytest.raises(FeatureStoreUnavailable, match=HIDDEN):
            read(store, 0.1)
    with pytest.raises(FeatureStoreUnavailable, match=HIDDEN):
        store.check()
    assert time.monotonic() - started_s < 5.0
    release.set()
    store.check()
    store.close()


def test_the_log_says_that_the_store_is_down_when_it_was_given_time(release):
    store = feast_store(lambda: release.wait(60))
    told = []
    for timeout_s in (0.01, 0.2):
        with structlog.testing.capture_logs() as log, pytest.raises(FeatureStoreUnavailable):
            read(store, timeout_s)
        told.append([line["event"] for line in log])
    assert told == [[], ["online_store_down"]]
    store.close()


def test_a_closed_store_is_unavailable_and_its_thread_ends():
    store = feast_store(lambda: None)
    store.close()
    with pytest.raises(FeatureStoreUnavailable, match=HIDDEN):
        read(store, 1.0)
    store._thread.join(10)
    assert not store._thread.is_alive()
