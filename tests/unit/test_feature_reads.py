"""Batches of feature requests: every caller is answered, whatever happens to the others."""

import gc
import math
import threading
import time
import weakref

import pytest

from headrace.errors import (
    CallerLeft,
    ComputationFailed,
    DeadlineExceeded,
    FeaturesNotFound,
    FeatureStoreUnavailable,
    InvalidRequest,
)
from headrace.feature_reads import LONG_ROWS, VALUES_MAX, FeatureReads, FeatureRequest
from headrace.features.memory_store import MemoryStore
from headrace.features.plan import FeatureSource, FeatureStatus, ViewSource, compile_plan
from headrace.features.plans import Selection
from headrace.features.values import ValueType
from headrace.telemetry.calls import CallRecorder
from headrace.telemetry.feature_metrics import FeatureReadMetrics, ViewMetrics
from headrace.telemetry.metrics import Metrics

TIMEOUT_S = 10.0
KEY = (("driver_id", "driver_id", ValueType.INT64),)


def plan_of(features):
    names = tuple(FeatureSource(f"f{i}", ValueType.FLOAT) for i in range(features))
    return compile_plan("service", "demo", "1", [ViewSource("v", KEY, names)])


class Plans:
    """What is registered: services by the number of their features."""

    def __init__(self):
        self._plans = {}

    def find(self, selection):
        if not selection.service.isdigit():
            raise FeaturesNotFound(f"there is no feature service '{selection.service}'")
        return self._plans.setdefault(selection.service, plan_of(int(selection.service)))


class Store(MemoryStore):
    """A store in which driver -1 cannot be computed, and driver -2 is a bug."""

    def __init__(self):
        super().__init__()
        self.reads = []
        self.timeouts_s = []
        self.long_reads_go_on = threading.Event()
        self.long_reads_go_on.set()

    def read(self, plan, entities, **how):
        ids = entities["driver_id"]
        self.reads.append(len(ids))
        self.timeouts_s.append(how["timeout_s"])
        if len(ids) > LONG_ROWS:
            assert self.long_reads_go_on.wait(TIMEOUT_S)
        if -1 in ids:
            raise ComputationFailed("on-demand feature view 'odd' failed")
        if -2 in ids:
            raise MemoryError
        return super().read(plan, entities, **how)


class Caller(FeatureRequest):
    method = "test/Read"

    def __init__(self, ids, service="1", deadline_s=math.inf):
        super().__init__(
            Selection(service),
            len(ids),
            deadline_s=deadline_s,
            arrival_s=time.perf_counter(),
            byte_count=8 * len(ids),
            trace=None,
        )
        self.ids = ids
        self.has_left = False
        self.told = threading.Event()
        self.outcome = None

    def column_values(self, column):
        return list(self.ids)

    def expired(self, now_s):
        return self.has_left or self.deadline_s <= now_s

    def answer(self, read, start):
        self._tell([FeatureStatus(one) for one in read.rows.statuses[0, start : start + self.rows]])

    def fail(self, error):
        self._tell(error)

    def _tell(self, outcome):
        if not self.told.is_set():
            self.outcome = outcome
            self.told.set()

    def result(self):
        assert self.told.wait(TIMEOUT_S), "nobody answered"
        return self.outcome


@pytest.fixture
def store():
    return Store()


def reads_of(store, timeout_s=1.0):
    return FeatureReads(
        Plans(),
        store,
        FeatureReadMetrics(),
        ViewMetrics(),
        CallRecorder(Metrics()),
        max_entities=10_000,
        max_queue_size=100,
        max_queue_bytes=1 << 20,
        timeout_s=timeout_s,
    )


@pytest.fixture
def reads(store):
    reads = reads_of(store)
    yield reads
    store.long_reads_go_on.set()
    assert reads.stop(TIMEOUT_S)


def share_a_batch(reads, *callers):
    for caller in callers:
        reads.submit(caller)
    reads.start()


FOUND, NOT_FOUND = [FeatureStatus.PRESENT], [FeatureStatus.NOT_FOUND]


def test_one_request_that_cannot_be_computed_fails_alone(reads, store):
    store.put("v", {"driver_id": 7}, {"f0": 0.5}, time.time())
    callers = [Caller([7]), Caller([-1]), Caller([8])]
    for caller in callers:
        reads.submit(caller)

    reads.start()

    assert callers[0].result() == FOUND
    assert isinstance(callers[1].result(), ComputationFailed)
    assert callers[2].result() == NOT_FOUND
    assert store.reads == [3, 2, 1, 1, 1]


def test_who_cannot_be_computed_is_found_in_few_reads(reads, store):
    callers = [Caller([-1 if i == 21 else i]) for i in range(32)]

    share_a_batch(reads, *callers)

    assert isinstance(callers[21].result(), ComputationFailed)
    for caller in callers[:21] + callers[22:]:
        assert caller.result() == [FeatureStatus.NOT_FOUND]
    assert store.reads.count(32) == 1
    assert len(store.reads) <= 2 + 2 * 5


def test_whoever_is_wrong_besides_is_told_once(reads, store):
    class Wrong(Caller):
        def column_values(self, column):
            raise InvalidRequest("no number")

    wrong, odd, right = Wrong([1]), Caller([-1]), Caller([2])

    share_a_batch(reads, wrong, odd, right)

    assert right.result() == [FeatureStatus.NOT_FOUND]
    assert isinstance(odd.result(), ComputationFailed)
    assert isinstance(wrong.result(), InvalidRequest)
    assert reads._metrics._requests_failed == 2


def test_a_store_that_goes_away_during_the_search_is_not_asked_for_everybody(reads, store):
    def fail_then_go(plan, entities, **how):
        store.reads.append(len(entities["driver_id"]))
        if len(entities["driver_id"]) == 8:
            raise ComputationFailed("somebody's values")
        raise FeatureStoreUnavailable("gone")

    callers = [Caller([i]) for i in range(8)]
    store.read = fail_then_go

    reads._serve(plan_of(1), callers)

    assert all(isinstance(caller.result(), FeatureStoreUnavailable) for caller in callers)
    assert store.reads == [8, 4]


def test_one_who_is_in_a_hurry_does_not_end_the_search_for_the_others(reads, store):
    def fail_then_hang(plan, entities, **how):
        ids = entities["driver_id"].tolist()
        store.reads.append(len(ids))
        if len(ids) == 4:
            raise ComputationFailed("somebody's values")
        if 0 in ids:  # not in the time that its callers have
            time.sleep(how["timeout_s"] + 0.01)
            raise FeatureStoreUnavailable("not in time")
        return MemoryStore.read(store, plan, entities, **how)

    hurried = [Caller([i], deadline_s=time.time() + 0.5) for i in (0, 1)]
    patient = [Caller([i]) for i in (2, 3)]
    store.read = fail_then_hang

    reads._serve(plan_of(1), [*hurried, *patient])

    assert all(isinstance(caller.result(), FeatureStoreUnavailable) for caller in hurried)
    assert [caller.result() for caller in patient] == [NOT_FOUND, NOT_FOUND]


def test_a_caller_who_has_left_is_not_read_for_during_the_search(reads, store):
    callers = [Caller([-1]), Caller([5]), Caller([6])]
    real = store.read

    def leave_then_read(plan, entities, **how):
        callers[1].has_left = True
        return real(plan, entities, **how)

    store.read = leave_then_read

    reads._serve(plan_of(1), callers)

    assert isinstance(callers[1].result(), CallerLeft)
    assert callers[2].result() == [FeatureStatus.NOT_FOUND]
    assert store.reads == [3, 1, 1]


def test_whatever_happens_then_the_thread_goes_on(reads):
    callers = [Caller([-2]), Caller([-1]), Caller([8])]
    for caller in callers:
        reads.submit(caller)

    reads.start()

    assert str(callers[0].result()) == "internal error"
    assert isinstance(callers[1].result(), ComputationFailed)
    assert callers[2].result() == NOT_FOUND
    assert reads.is_alive
    reads.submit(later := Caller([8]))
    assert later.result() == NOT_FOUND


def test_a_selection_that_there_is_not_fails_those_who_ask_for_it(reads):
    callers = [Caller([8], service="other"), Caller([8])]
    for caller in callers:
        reads.submit(caller)

    reads.start()

    assert isinstance(callers[0].result(), FeaturesNotFound)
    assert callers[1].result() == NOT_FOUND


def test_a_caller_who_left_or_whose_time_is_over_costs_no_read(reads, store):
    gone, late, here = Caller([7]), Caller([7], deadline_s=time.time() + 0.1), Caller([8])
    for caller in (gone, late, here):
        reads.submit(caller)
    gone.has_left = True
    while time.time() < late.deadline_s:
        time.sleep(0.01)

    reads.start()

    assert here.result() == NOT_FOUND
    assert store.reads == [1]
    assert isinstance(gone.result(), CallerLeft)
    assert isinstance(late.result(), DeadlineExceeded)


@pytest.mark.parametrize(
    ("deadlines_s", "least_s", "most_s"),
    [
        ([300.0, 600.0], 300.0, 600.0),  # the last of them counts
        ([300.0, math.inf], 900.0, 900.0),
        ([300.0, 5000.0], 900.0, 900.0),
    ],
)
def test_a_batch_waits_for_the_store_no_longer_than_its_callers_wait(
    store, deadlines_s, least_s, most_s
):
    reads = reads_of(store, timeout_s=900.0)
    now_s = time.time()
    callers = [Caller([8], deadline_s=now_s + deadline_s) for deadline_s in deadlines_s]
    for caller in callers:
        reads.submit(caller)

    reads.start()

    assert [caller.result() for caller in callers] == [NOT_FOUND] * 2
    (timeout_s,) = store.timeouts_s
    assert least_s <= timeout_s <= most_s
    assert reads.stop(TIMEOUT_S)


def test_a_long_read_does_not_hold_up_short_ones(reads, store):
    store.long_reads_go_on.clear()
    reads.start()
    reads.submit(long := Caller(list(range(500))))

    for _ in range(20):
        reads.submit(short := Caller([8]))
        assert short.result() == NOT_FOUND

    assert not long.told.is_set()
    store.long_reads_go_on.set()
    assert long.result() == NOT_FOUND * 500


def test_more_values_than_fit_a_reply_are_refused_before_they_are_read(reads, store):
    reads.start()
    reads.submit(wide := Caller(list(range(1_001)), service="1000"))

    refusal = wide.result()

    assert isinstance(refusal, InvalidRequest)
    assert "1001 x 1000 values; at most 1000000" in str(refusal)
    assert store.reads == []
    reads.submit(just := Caller(list(range(1_000)), service="1000"))
    assert just.result() == NOT_FOUND * 1_000


def test_a_batch_reads_no_more_at_once_than_one_request_may(reads, store):
    callers = [Caller(list(range(400)), service="1000") for _ in range(5)]
    for caller in callers:
        reads.submit(caller)

    reads.start()

    assert [caller.result() for caller in callers] == [NOT_FOUND * 400] * 5
    assert store.reads == [800, 800, 400]
    assert max(store.reads) * 1_000 <= VALUES_MAX


@pytest.mark.parametrize("service", ["1", "nobody's"])
def test_a_thread_that_has_nothing_to_do_keeps_nobody_s_request(reads, service):
    reads.start()
    gc.collect()
    gc.disable()
    try:
        caller = Caller([7], service=service)
        reads.submit(caller)
        caller.result()
        caller.outcome = None  # an error leads back to whom it was told
        freed = weakref.ref(caller)
        del caller
        deadline_s = time.monotonic() + TIMEOUT_S
        while freed() is not None:
            assert time.monotonic() < deadline_s, "it is kept"
            time.sleep(0.002)
    finally:
        gc.enable()
