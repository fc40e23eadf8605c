"""Reading through Feast: its failures and its hangs stay its own."""

import threading
import time

import numpy as np
import pytest

from headrace.errors import FeatureStoreUnavailable
from headrace.features.feast_store import FeastStore
from headrace.features.plan import FeatureSource, ViewSource, compile_plan
from headrace.features.values import ValueType

KEY = (("id", "id", ValueType.INT64),)
PLAN = compile_plan(
    "service", "demo", "1", [ViewSource("view", KEY, (FeatureSource("f", ValueType.FLOAT),))]
)
HIDDEN = "^the online feature store does not answer$"


class Client:
    """What `FeastStore` asks of Feast, doing what it is told."""

    def __init__(self, behave):
        self.get_online_features = lambda **_: behave()

    def get_feature_service(self, name, **_):
        return name


def read(store, timeout_s):
    store.read(PLAN, {"id": np.array([1])}, now_s=0.0, timeout_s=timeout_s)


def test_a_failure_of_feasts_is_unavailable_without_its_text():
    def fail():
        raise ConnectionError("cannot reach db.internal with password hunter2")

    store = FeastStore(Client(fail))
    with pytest.raises(FeatureStoreUnavailable, match=HIDDEN):
        read(store, 10.0)
    store.check()
    store.close()


def test_a_read_that_hangs_costs_its_caller_the_timeout_and_fails_the_check():
    release = threading.Event()
    store = FeastStore(Client(lambda: release.wait(60)))
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


def test_a_closed_store_is_unavailable_and_its_thread_ends():
    store = FeastStore(Client(lambda: None))
    store.close()
    with pytest.raises(FeatureStoreUnavailable, match=HIDDEN):
        read(store, 1.0)
    store._thread.join(10)
    assert not store._thread.is_alive()
