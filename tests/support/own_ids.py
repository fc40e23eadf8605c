"""Rows whose only feature is the entity's own id: a mix-up of rows cannot hide."""

import struct
import threading
import time

import numpy as np

from headrace.errors import FeatureStoreUnavailable
from headrace.features import layout
from headrace.features.plan import FeatureSource, ViewSource, compile_plan
from headrace.features.values import ValueType

KEY = (("id", "id", ValueType.INT64),)
PLAN = compile_plan(
    "service", "demo", "1", [ViewSource("view", KEY, (FeatureSource("own_id", ValueType.FLOAT),))]
)
FIELD = layout.feature_field("view", "own_id")
COUNT = 3000


def key_of(entity):
    return layout.key_prefix(["id"]) + struct.pack("<IIq", 4, 8, entity) + b"demo"


def write_rows(client, count=COUNT):
    """Write them by redis-py's client, of whatever topology."""
    with client.pipeline(transaction=False) as pipeline:
        for entity in range(count):
            value = b"\x35" + struct.pack("<f", entity)
            mapping = {FIELD: value, b"_ts:view": b"\x08\x80\xe2\xcf\xaa\x06"}
            pipeline.hset(key_of(entity), mapping=mapping)
        pipeline.execute()


def read(store, entities, timeout_s=10.0):
    keys = {"id": np.array(entities, np.int64)}
    return store.read(PLAN, keys, now_s=1_700_000_001.0, timeout_s=timeout_s)


def own_ids(store, entities, **kwargs):
    return read(store, entities, **kwargs).values[0].tolist()


class Readers:
    """
    Threads that read batches of 50 rows over and over, and note what they got.

    Attributes:
        wrong: (expected, got) of each answer that was another.
        answers: When each batch was answered, on `time.monotonic`.
        failures: When each failed, and how long it took.
    """

    def __init__(self, store, *, threads=3, timeout_s=1.0):
        self.wrong, self.answers, self.failures = [], [], []
        self._store, self._timeout_s = store, timeout_s
        self._stopping = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(i,)) for i in range(threads)]

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self._stopping.set()
        for thread in self._threads:
            thread.join(30)

    def wait_for_answers(self, count, since_s=0.0, timeout_s=30.0):
        """Wait until so many batches have been answered since then."""
        deadline_s = time.monotonic() + timeout_s
        while sum(at >= since_s for at in self.answers[-10_000:]) < count:
            assert time.monotonic() < deadline_s, "no answers"
            time.sleep(0.01)

    def failures_after(self, at_s):
        return [at for at, _ in self.failures if at > at_s]

    def _run(self, place):
        first = place * 50
        while not self._stopping.wait(0.002):
            entities = [(first + i) % COUNT for i in range(50)]
            first += 50
            started_s = time.monotonic()
            try:
                got = own_ids(self._store, entities, timeout_s=self._timeout_s)
            except FeatureStoreUnavailable:
                now_s = time.monotonic()
                self.failures.append((now_s, now_s - started_s))
            else:
                self.answers.append(time.monotonic())
                if got != entities:
                    self.wrong.append((entities, got))
