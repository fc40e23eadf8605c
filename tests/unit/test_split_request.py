"""A request with more rows than a batch holds is answered as if it had fitted, or fails as one."""

import gc
import threading
import time
import weakref

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.backends.stub import StubBackend
from headrace.batching.batcher import Batcher
from headrace.batching.lane import PATIENCE_S
from headrace.batching.policy import BatchPolicy, LevelPolicy
from headrace.errors import (
    BackendError,
    CallerLeft,
    DeadlineExceeded,
    Draining,
    InvalidTensor,
    Overloaded,
)
from headrace.monitoring.records import from_wire, to_wire
from headrace.predict import ServedModel
from headrace.request import Request
from headrace.split_request import SplitRequest
from headrace.telemetry.metrics import Metrics
from headrace.tensors import CheckedInputs, GivenTensor, Signature, TensorSpec, cut, encode, join

X, Y = TensorSpec("x", "FP32", (-1, 1)), TensorSpec("y", "FP32", (-1, 1))
TIMEOUT_S = 10.0


class Caller(Request):
    """A request of `numbers`, that keeps what it was told."""

    def __init__(self, *numbers, deadline_s=float("inf")):
        raw = np.array(numbers, np.float32).tobytes()
        super().__init__(
            CheckedInputs(len(numbers), (raw,), ((1,),)), deadline_s, time.perf_counter(), len(raw)
        )
        self.has_left = False
        self.told = []
        self.prediction_id = ""
        self.done = threading.Event()

    def expired(self, now_s):
        return self.has_left or self.deadline_s <= now_s

    def answer(self, batch, start, prediction_id):
        self.prediction_id = prediction_id
        self._tell(batch.outputs[0].rows(start, start + self.rows).ravel().tolist())

    def fail(self, error):
        self._tell(error)

    def outcome(self):
        assert self.done.wait(TIMEOUT_S), "nobody answered"
        assert len(self.told) == 1
        return self.told[0]

    def _tell(self, what):
        self.told.append(what)
        self.done.set()


@pytest.mark.parametrize("has_left", [False, True])
def test_a_part_that_is_given_up_is_not_taken_for_one_whose_caller_left(has_left):
    batcher = Batcher(BatchPolicy(4), max_queue_size=64)
    large = Caller(*range(8), deadline_s=time.time() + 60)
    split = SplitRequest(large, Signature("m", [X], [Y], 4, 1_000), batcher, 0, "p")

    split.give_up()
    large.has_left = has_left

    assert all(part.expired(time.time()) for part in split.parts)
    assert [part.left_early() for part in split.parts] == [has_left, has_left]


class Served:
    """A model of batches of four that doubles, fails on a negative number, and can be held."""

    def __init__(
        self, *, max_batch_size=4, max_queue_size=64, executors=1, function=None, calls=None, **more
    ):
        self.batches = []
        self.records = []
        self.gate = threading.Event()
        self.gate.set()
        self.backend = StubBackend("m", [X], [Y], function or self._double, gate=self.gate)
        self.metrics = Metrics().model("m", "1")
        self.batcher = Batcher(
            BatchPolicy(max_batch_size), max_queue_size=max_queue_size, executors=executors, **more
        )
        self.model = ServedModel(
            name="m",
            version="1",
            signature=Signature("m", [X], [Y], max_batch_size, 1_000),
            backend=self.backend,
            batcher=self.batcher,
            metrics=self.metrics,
            executor_count=executors,
            record=self.records.append,
            calls=calls,
        )
        self.model.start()

    def _double(self, inputs):
        self.batches.append(inputs["x"].ravel().tolist())
        if (inputs["x"] < 0).any():
            raise ValueError("negative")
        return [inputs["x"] * 2]

    def hold(self):
        """Occupy the executor, so that whatever comes waits."""
        while self.backend.entered.acquire(blocking=False):
            pass  # batches that have been run
        self.gate.clear()
        self.model.submit(Caller(0))
        assert self.backend.entered.acquire(timeout=TIMEOUT_S)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.gate.set()
        assert self.model.stop(TIMEOUT_S)


@given(
    rows=st.lists(st.integers(1, 30), min_size=1, max_size=6),
    max_batch_size=st.integers(1, 9),
    executors=st.integers(1, 3),
)
@settings(max_examples=25, deadline=None)
def test_whatever_its_size_and_its_company_everybody_gets_what_a_large_batch_would_have_said(
    rows, max_batch_size, executors
):
    starts = np.cumsum([0, *rows])
    callers = [Caller(*range(start, start + n)) for start, n in zip(starts, rows, strict=False)]

    with Served(max_batch_size=max_batch_size, max_queue_size=500, executors=executors) as served:
        for caller in callers:
            served.model.submit(caller)
        outcomes = [caller.outcome() for caller in callers]

    assert outcomes == [
        [2.0 * i for i in range(start, start + n)] for start, n in zip(starts, rows, strict=False)
    ]
    assert max(map(len, served.batches)) <= max_batch_size
    assert served.metrics.requests == len(callers)
    assert sum(served.metrics.request_s.counts) == len(callers)


def test_each_of_its_rows_is_recorded_once_under_its_one_prediction_id():
    with Served() as served:
        served.hold()
        large, small = Caller(*range(10)), Caller(77)
        served.model.submit(large)
        served.model.submit(small)
        served.gate.set()
        large.outcome()
        small.outcome()

    ids = {}
    for message in to_wire(served.records):
        rows = from_wire(message)
        values = rows.features["x"].values.tolist()
        first_rows = [0] * 9 if rows.first_rows is None else rows.first_rows
        for number, first, count in zip(
            rows.request_numbers, first_rows, rows.request_rows, strict=False
        ):
            for i in range(count):
                ids[f"{rows.id_prefix}{number:010x}/{first + i}"] = values.pop(0)
    assert [ids[f"{large.prediction_id}/{i}"] for i in range(10)] == list(range(10))
    assert ids[f"{small.prediction_id}/0"] == 77
    assert len(ids) == 12  # the one that was held, too


def test_a_sampled_request_is_told_of_once_with_all_of_its_rows():
    class Calls:
        def __init__(self):
            self.told = []

        def sample(self, metadata):
            raise NotImplementedError("the edge samples")

        def answered(self, batch):
            self.told.append(batch.calls)

    calls = Calls()
    with Served(calls=calls) as served:
        large = Caller(*range(10))
        large.trace = object()
        served.model.submit(large)
        large.outcome()

    (told,) = calls.told
    assert (told.rows, told.prediction_ids) == ([10], [large.prediction_id])
    assert told.traces == [large.trace]


def test_one_part_that_fails_fails_the_whole_and_the_others_are_not_run():
    with Served() as served:
        served.hold()
        large = Caller(1, 2, 3, 4, 5, -6, 7, 8, *range(9, 30))
        served.model.submit(large)

        served.gate.set()

        assert isinstance(large.outcome(), BackendError)
        assert served.model.waiting == 0
    assert served.batches == [[0], [1, 2, 3, 4], [5, -6, 7, 8]]
    assert (served.metrics.requests, served.metrics.requests_failed) == (1, 1)
    assert served.batcher.dropped == 0


def test_whoever_shares_a_batch_with_a_part_that_fails_is_answered():
    with Served() as served:
        served.hold()
        large, small = Caller(1, 2, 3, 4, -5), Caller(6)
        served.model.submit(large)
        served.model.submit(small)

        served.gate.set()

        assert isinstance(large.outcome(), BackendError)
        assert small.outcome() == [12]


def test_a_caller_who_leaves_takes_all_parts_out_of_the_queue_at_once():
    with Served() as served:
        served.hold()
        large, other = Caller(*range(30)), Caller(5)
        served.model.submit(large)
        served.model.submit(other)
        assert served.model.waiting == 9

        large.has_left = True
        large.leave()

        assert served.model.waiting == 1
        assert isinstance(large.outcome(), CallerLeft)
        served.gate.set()
        assert other.outcome() == [10]
    assert served.batches == [[0], [5]]
    assert served.batcher.dropped == 1


def test_a_caller_who_leaves_while_a_part_runs_is_told_once():
    with Served() as served:
        served.gate.clear()
        large = Caller(*range(30))
        served.model.submit(large)
        assert served.backend.entered.acquire(timeout=TIMEOUT_S)

        large.has_left = True
        large.leave()

        assert isinstance(large.outcome(), CallerLeft)
    assert served.batches == [[0, 1, 2, 3]]
    assert large.told == [large.outcome()]


def test_when_its_deadline_passes_in_the_queue_one_request_is_dropped():
    with Served() as served:
        served.hold()
        large = Caller(*range(1, 31), deadline_s=time.time() + 1.0)
        served.model.submit(large)
        while time.time() < large.deadline_s:
            time.sleep(0.01)

        served.gate.set()

        assert isinstance(large.outcome(), DeadlineExceeded)
    assert served.batches == [[0]]
    assert served.batcher.dropped == 1


def test_parts_are_their_callers_and_have_his_turns():
    with Served(is_fair=True) as served:
        served.hold()
        large, small = Caller(*range(1, 21)), Caller(100)
        large.caller, small.caller = "large", "small"
        served.model.submit(large)
        served.model.submit(small)
        served.gate.set()

        assert small.outcome() == [200]
        assert large.outcome() == [2 * number for number in range(1, 21)]
        assert [100] in served.batches[1:4], "parts of four rows, and then it was the other's turn"


@pytest.mark.parametrize("reason", ["is_shed", "is_displaced"])
def test_parts_that_had_to_go_are_one_request_that_had_to_and_that_is_refunded_once(reason):
    class Account:
        refunds = 0

        def refund(self, caller, rows):
            self.refunds += rows

    with Served() as served:
        served.hold()
        request = Caller(*range(12))
        request.paid_from = account = Account()
        served.model.submit(request)
        for part in list(request.waits_in.parts):
            setattr(part, reason, True)
            part.drop()

        assert isinstance(request.outcome(), Overloaded)
        assert account.refunds == 12
        assert served.model.waiting == 0


def test_a_request_whose_parts_do_not_fit_the_queue_is_refused_whole():
    with Served(max_queue_size=5) as served:
        served.hold()
        served.model.submit(Caller(1))

        with pytest.raises(Overloaded):
            served.model.submit(Caller(*range(20)))

        assert served.model.waiting == 1
        assert served.batcher.refused_full == 1
        served.model.submit(Caller(*range(16)))


def test_a_request_whose_parts_do_not_fit_their_level_is_refused_whole():
    levels = [LevelPolicy(max_queue_size=3)]
    with Served(levels=levels) as served:
        served.hold()

        with pytest.raises(Overloaded):
            served.model.submit(Caller(*range(16)))

        assert served.model.waiting == 0


def test_it_is_judged_by_all_of_its_batches_before_it_is_cut():
    def sleep(inputs):
        time.sleep(0.02)
        return [inputs["x"]]

    with Served(function=sleep, max_queue_size=500) as served:
        for _ in range(5):  # the model's cost is learned
            known = Caller(1, 2, 3, 4)
            served.model.submit(known)
            known.outcome()
        served.hold()
        large = Caller(*range(1_000), deadline_s=time.time() + 2.5)  # 250 batches, five seconds

        with pytest.raises(Overloaded):
            served.model.submit(large)

        assert served.model.waiting == 0
        assert large.waits_in is None
        assert served.batcher.refused_late == 1


def known(batcher, batch_s):
    """Have a batcher learn, just now, how long a full batch takes."""
    for _ in range(20):
        batcher._learn((time.perf_counter() - batch_s, 4, 0.0))


def test_an_idle_executor_is_no_reason_to_take_more_than_it_can_do_in_time():
    with Served(max_queue_size=500) as served:
        known(served.batcher, 1.0)
        large = Caller(*range(40), deadline_s=time.time() + 5.0)  # ten seconds of work

        with pytest.raises(Overloaded):
            served.model.submit(large)

        assert large.waits_in is None
        assert (served.batcher.refused_late, served.model.waiting) == (1, 0)


@pytest.mark.parametrize("is_fair", [False, True])
def test_what_was_learned_long_ago_keeps_nobody_out_for_ever(is_fair):
    with Served(max_queue_size=500, is_fair=is_fair) as served:
        known(served.batcher, 10.0)  # longer than anybody waits
        for _ in range(200):
            served.batcher._learned_s -= PATIENCE_S  # nothing has run since
            large = Caller(*range(40), deadline_s=time.time() + 5.0)
            try:
                served.model.submit(large)
            except Overloaded:
                continue
            if isinstance(large.outcome(), list):
                break

        assert large.outcome() == [2.0 * number for number in range(40)]


def test_a_request_as_large_as_the_queue_is_served_where_callers_have_shares_of_it():
    with Served(is_fair=True, max_queue_size=10) as served:
        large = Caller(*range(40))
        served.model.submit(large)

        assert large.outcome() == [2.0 * number for number in range(40)]


def test_whoever_holds_his_share_already_is_refused_before_his_request_is_cut():
    with Served(is_fair=True, max_queue_size=10) as served:
        served.hold()
        for _ in range(8):
            served.model.submit(Caller(1))
        large = Caller(*range(8))

        with pytest.raises(Overloaded, match="of this caller"):
            served.batcher.judge(large, 2)

        assert (served.batcher.refused_full, served.model.waiting) == (1, 8)
        assert served.batcher.pressure > 0


def test_requests_that_come_on_several_threads_are_not_more_together_than_may_wait():
    batcher = Batcher(BatchPolicy(4), max_queue_size=10)
    parts = [[Caller(1, 2, 3, 4) for _ in range(6)] for _ in range(2)]
    for own in parts:  # both are judged before either is put
        batcher.judge(Caller(*range(24)), len(own))

    batcher.put_all(parts[0])
    with pytest.raises(Overloaded):
        batcher.put_all(parts[1])

    assert len(batcher) == 6
    assert batcher.refused_full == 1


def test_nor_more_bytes():
    batcher = Batcher(BatchPolicy(4), max_queue_size=100, max_queue_bytes=100)
    parts = [[Caller(1, 2, 3, 4) for _ in range(4)] for _ in range(2)]

    batcher.put_all(parts[0])
    with pytest.raises(Overloaded):
        batcher.put_all(parts[1])

    assert len(batcher) == 4


def test_of_a_request_that_is_given_up_no_part_is_run_or_counted_after_that():
    batcher = Batcher(BatchPolicy(4), max_queue_size=64, executors=2)
    signature = Signature("m", [X], [Y], 4, 1_000)
    large = Caller(*range(12))
    split = SplitRequest(large, signature, batcher, 1, "id")
    batcher.put_all(split.parts)
    first, second, _ = split.parts

    batcher._give_up([first])  # by one executor, and by another before the caller is told
    batcher._give_up([second])
    batcher.put(small := Caller(100))

    assert batcher.take() == [small]
    assert isinstance(large.outcome(), DeadlineExceeded)
    assert batcher.dropped == 1
    assert split.expired(0.0)


def test_a_caller_who_leaves_after_a_part_was_given_up_is_counted_once():
    batcher = Batcher(BatchPolicy(4), max_queue_size=64)
    large = Caller(*range(12))
    split = SplitRequest(large, Signature("m", [X], [Y], 4, 1_000), batcher, 1, "id")
    batcher.put_all(split.parts)

    batcher._give_up([split.parts[0]])
    large.leave()

    assert len(batcher) == 0
    assert batcher.dropped == 1


def test_nothing_is_split_once_the_model_is_stopping():
    with Served() as served:
        served.model.stop(TIMEOUT_S)

        with pytest.raises(Draining):
            served.model.submit(Caller(*range(20)))


def test_parts_whose_outputs_differ_in_shape_are_not_put_together():
    def as_wide_as_its_first_number(inputs):
        return [np.zeros((len(inputs["x"]), 1 + int(inputs["x"][0, 0])), np.float32)]

    with Served(function=as_wide_as_its_first_number) as served:
        caller = Caller(0, 0, 0, 0, 1)
        served.model.submit(caller)

        assert isinstance(caller.outcome(), BackendError)
    assert "different shapes" in str(caller.outcome())
    assert served.metrics.requests_failed == 1


def test_an_answer_that_cannot_be_made_fails_the_request():
    class Odd(Caller):
        def answer(self, batch, start, prediction_id):
            raise RuntimeError("a bug")

    with Served() as served:
        odd = Odd(*range(9))
        served.model.submit(odd)

        assert isinstance(odd.outcome(), BackendError)


@pytest.mark.parametrize("number", [1, -1])
def test_a_request_that_was_split_is_freed_without_the_collector(number):
    gc.collect()
    gc.disable()
    try:
        with Served() as served:
            large = Caller(*range(10), number)
            served.model.submit(large)
            large.outcome()
            freed = weakref.ref(large)
            del large
            deadline_s = time.monotonic() + TIMEOUT_S
            while freed() is not None and time.monotonic() < deadline_s:
                time.sleep(0.01)
            assert freed() is None
    finally:
        gc.enable()


def test_more_rows_than_a_request_may_have_are_refused_with_the_limit():
    signature = Signature("m", [X], [Y], 4, 10)

    assert signature.check([GivenTensor("x", "FP32", (10, 1), bytes(40))]).rows == 10
    with pytest.raises(InvalidTensor, match="must be <= 10"):
        signature.check([GivenTensor("x", "FP32", (11, 1), bytes(44))])


tensors = st.tuples(
    st.sampled_from(["INT64", "FP16", "UINT8", "BOOL", "BYTES"]),
    st.integers(1, 12),
    st.integers(0, 3),
    st.integers(1, 7),
)


@given(tensors, st.data())
def test_the_parts_of_a_tensor_are_its_rows_in_order(case, data):
    datatype, rows, width, most = case
    spec = TensorSpec("x", datatype, (-1, width))
    if datatype == "BYTES":
        array = np.empty((rows, width), np.object_)
        array[:] = [[data.draw(st.binary(max_size=5)) for _ in range(width)] for _ in range(rows)]
    else:
        array = np.arange(rows * width).reshape(rows, width).astype(spec.dtype)
    raw = encode(array)

    parts = cut(spec, raw, rows, most)

    assert b"".join(parts) == raw
    for i, part in enumerate(parts):
        expected = array[i * most : (i + 1) * most]
        assert join(spec, [part], expected.shape).tolist() == expected.tolist()
