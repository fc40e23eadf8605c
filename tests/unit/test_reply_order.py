"""Replies leave in the order in which requests came, and nobody waits for more than that."""

import gc
import math
import threading
import time
import weakref

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.backends.stub import StubBackend
from headrace.batching.batcher import Batcher
from headrace.batching.policy import BatchPolicy
from headrace.errors import BackendError, CallerLeft, Draining, InvalidRequest, Overloaded
from headrace.predict import ServedModel
from headrace.reply_order import OrderedRequest, ReplyOrder
from headrace.request import Request
from headrace.telemetry.metrics import Metrics
from headrace.tensors import CheckedInputs, Signature, TensorSpec

X, Y = TensorSpec("x", "FP32", (-1, 1)), TensorSpec("y", "FP32", (-1, 1))
TIMEOUT_S = 10.0


class Caller(Request):
    """A request of `numbers`, that notes when it was told in a list shared by all."""

    def __init__(self, replies, *numbers, deadline_s=float("inf")):
        raw = np.array(numbers, np.float32).tobytes()
        super().__init__(
            CheckedInputs(len(numbers), (raw,), ((1,),)), deadline_s, time.perf_counter(), len(raw)
        )
        self.name = numbers[0]
        self.outcome = None
        self.has_left = False
        self.may_be_told = threading.Event()
        self.may_be_told.set()
        self.done = threading.Event()
        self._replies = replies

    def expired(self, now_s):
        return self.has_left or self.deadline_s <= now_s

    def answer(self, batch, start, prediction_id):
        assert self.may_be_told.wait(TIMEOUT_S)
        self._tell(batch.outputs[0].rows(start, start + self.rows).ravel().tolist())

    def fail(self, error):
        self._tell(error)

    def _tell(self, outcome):
        if self.outcome is None:
            self.outcome = outcome
            self._replies.append(self.name)
            self.done.set()


class Served:
    """A model of two instances that doubles, and can be held at any number."""

    def __init__(
        self,
        *,
        most=100,
        most_bytes=1 << 20,
        max_batch_size=1,
        max_queue_size=64,
        max_request_rows=0,
    ):
        self.replies = []
        self.held = {}
        self.begun = []
        backend = StubBackend("m", [X], [Y], self._double)
        self.order = ReplyOrder("replies-m-1", most, most_bytes)
        self.model = ServedModel(
            name="m",
            version="1",
            signature=Signature("m", [X], [Y], max_batch_size, max_request_rows),
            backend=backend,
            batcher=Batcher(
                BatchPolicy(max_batch_size), max_queue_size=max_queue_size, executors=2
            ),
            metrics=Metrics().model("m", "1"),
            order=self.order,
            executor_count=2,
        )
        self.model.start()

    def caller(self, *numbers, **more):
        return Caller(self.replies, *numbers, **more)

    def submit(self, *callers):
        for caller in callers:
            self.model.submit(caller)
        return callers

    def hold(self, number):
        self.held[number] = threading.Event()
        return self.held[number].set

    def _double(self, inputs):
        number = float(inputs["x"][0, 0])
        self.begun.append(number)
        if number in self.held:
            assert self.held[number].wait(TIMEOUT_S)
        if number < 0:
            raise ValueError("negative")
        return [inputs["x"] * 2]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for event in self.held.values():
            event.set()
        assert self.model.stop(TIMEOUT_S)
        assert self.order.held == 0


def until(condition):
    deadline_s = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline_s, "it did not happen"
        time.sleep(0.002)


def test_replies_wait_for_an_earlier_one_and_no_longer():
    with Served() as served:
        let_go = served.hold(0)
        callers = [served.caller(i) for i in range(8)]
        served.submit(*callers)
        until(lambda: len(served.begun) == 8)  # the other instance has done all of it
        until(lambda: served.order.held == 7)
        assert served.replies == []

        let_go()

        for caller in callers:
            assert caller.done.wait(TIMEOUT_S)
        assert served.replies == list(range(8))
        assert [caller.outcome for caller in callers] == [[2.0 * i] for i in range(8)]


def test_replies_that_wait_for_nobody_are_not_held():
    with Served() as served:
        let_go = served.hold(5)
        early = served.submit(*[served.caller(i) for i in range(5)])
        for caller in early:
            assert caller.done.wait(TIMEOUT_S)
        last = served.submit(served.caller(5))[0]
        until(lambda: 5 in served.begun)

        assert served.order.held == 0
        let_go()
        assert last.done.wait(TIMEOUT_S)


def test_a_failure_has_its_turn_and_ends_nobody_elses():
    with Served() as served:
        let_go = served.hold(0)
        callers = served.submit(*[served.caller(n) for n in (0, -1, 2)])
        until(lambda: served.order.held == 2)

        let_go()

        for caller in callers:
            assert caller.done.wait(TIMEOUT_S)
        assert served.replies == [0, -1, 2]
        assert isinstance(callers[1].outcome, BackendError)


def test_a_caller_who_leaves_is_out_at_once_and_nobody_waits_for_him():
    with Served() as served:
        let_go, let_other_go = served.hold(0), served.hold(1)
        running = served.submit(served.caller(0), served.caller(1))
        until(lambda: len(served.begun) == 2)
        leaving, staying = served.submit(served.caller(2), served.caller(3))

        leaving.has_left = True
        leaving.leave()

        assert isinstance(leaving.outcome, CallerLeft)
        assert served.model.waiting == 1
        let_go()
        let_other_go()
        for caller in (*running, staying):
            assert caller.done.wait(TIMEOUT_S)
        assert served.replies == [2, 0, 1, 3]


def test_who_waited_too_long_in_a_queue_that_stands_is_told_so_in_his_turn():
    with Served() as served:
        let_go, let_other_go = served.hold(0), served.hold(1)
        running = served.submit(served.caller(0), served.caller(1))
        until(lambda: len(served.begun) == 2)
        (waiting,) = served.submit(served.caller(2))
        stand_in = waiting.waits_in.stand_in
        assert stand_in.waits_in.leave(stand_in)

        stand_in.is_shed = True
        stand_in.drop()
        let_go()
        let_other_go()

        for caller in (*running, waiting):
            assert caller.done.wait(TIMEOUT_S)
        assert served.replies == [0, 1, 2]
        assert isinstance(waiting.outcome, Overloaded)


def test_a_slow_reply_does_not_hold_up_an_executor():
    with Served() as served:
        slow = served.caller(0)
        slow.may_be_told.clear()
        served.submit(slow, *[served.caller(i) for i in range(1, 6)])

        until(lambda: len(served.begun) == 6 and served.model.waiting == 0)
        assert served.replies == []
        slow.may_be_told.set()

        until(lambda: served.replies == list(range(6)))


def test_so_many_replies_may_wait_and_no_more():
    with Served(most=4) as served:
        let_go = served.hold(0)
        served.submit(*[served.caller(i) for i in range(4)])
        until(lambda: served.order.held == 3)
        refused = served.caller(9)

        with pytest.raises(Overloaded):
            served.submit(refused)

        assert refused.waits_in is None
        let_go()
        until(lambda: served.replies == list(range(4)))
        served.submit(served.caller(5))
        until(lambda: served.replies[4:] == [5])


@pytest.mark.parametrize("limit", [{"most": 4}, {"most_bytes": 16}])
def test_requests_that_the_queue_refuses_take_nobodys_place(limit):
    with Served(max_queue_size=1, **limit) as served:
        for number in (0, 1):
            served.hold(number)
            running = served.submit(served.caller(number))
            until(lambda number=number: number in served.begun)
        waiting = served.submit(served.caller(2))

        for _ in range(100):
            with pytest.raises(Overloaded, match="requests are already waiting"):
                served.submit(served.caller(9))
        assert len(served.order) == 3
        waiting[0].leave()

        served.submit(served.caller(3))

        assert len(served.order) == 3
        assert running[0].outcome is None


def test_whom_the_order_refuses_is_counted_and_the_next_ones_are_not_read():
    with Served(most=2) as served:
        let_go, _ = (served.hold(0), served.hold(1))
        served.submit(served.caller(0), served.caller(1))
        with pytest.raises(Overloaded, match="wait for an earlier one"):
            served.submit(served.caller(2))
        queue = served.model.queue
        assert (queue.refused_full, queue.pressure > 0) == (1, True)

        assert "wait for an earlier one" in str(served.model.refuses(math.inf))

        assert queue.refused_full == 2
        let_go()
        until(lambda: served.replies == [0])
        assert served.model.refuses(math.inf) is None


def test_nor_may_more_bytes_of_requests():
    with Served(most_bytes=12) as served:
        let_go = served.hold(0)
        served.submit(*[served.caller(i) for i in range(3)])  # of four bytes each
        until(lambda: served.order.held == 2)

        with pytest.raises(Overloaded):
            served.submit(served.caller(9))

        let_go()
        until(lambda: served.replies == [0, 1, 2])
        served.submit(*[served.caller(i) for i in (3, 4, 5)])
        until(lambda: served.replies[3:] == [3, 4, 5])


def test_a_request_that_no_empty_order_would_hold_is_wrong_and_no_overload():
    with Served(most_bytes=12) as served:
        with pytest.raises(InvalidRequest, match=r"16 bytes.*12"):
            served.submit(served.caller(*range(4)))

        assert served.model.queue.refused_full == 0


def test_while_a_reply_waits_its_request_keeps_no_bytes():
    with Served() as served:
        served.hold(0)
        _, second = served.submit(served.caller(0), served.caller(1))
        until(lambda: served.order.held == 1)

        assert second.raws == ()


def test_a_request_that_comes_after_the_end_is_refused():
    order = ReplyOrder("replies", 3)
    order.start()
    assert order.stop(time.perf_counter() + TIMEOUT_S)

    for _ in range(5):
        with pytest.raises(Draining):
            order.enter(Caller([], 1))


@pytest.mark.parametrize("waits_in_order", [False, True])
def test_a_caller_may_leave_while_another_thread_settles_his_request(waits_in_order):
    class Settled(OrderedRequest if waits_in_order else Caller):
        """What another thread settles the moment after it was looked at."""

        __slots__ = ("places",)

        @property
        def waits_in(self):
            return self.places.pop(0) if self.places else None

        @waits_in.setter
        def waits_in(self, place):
            self.places = [place]

    class Place:
        left = ()

        def leave(self, request):
            self.left = (request,)
            return False

    place = Place()
    caller = Caller([], 1)
    if waits_in_order:
        order = ReplyOrder("replies", 3)
        turn = order.enter(caller).turn
        turn.stand_in = waiting = Settled(caller, turn)
    else:
        waiting = caller = Settled([], 1)
    waiting.waits_in = place

    caller.leave()

    assert place.left == (waiting,)


def test_whoever_is_refused_by_the_queue_leaves_no_gap():
    with Served(max_queue_size=1) as served:
        let_go, let_other_go = served.hold(0), served.hold(1)
        for i in (0, 1):
            served.submit(served.caller(i))
            until(lambda i=i: i in served.begun)
        served.submit(served.caller(2))

        with pytest.raises(Overloaded):
            served.submit(served.caller(3))

        let_go()
        let_other_go()
        until(lambda: served.replies == [0, 1, 2])
        served.submit(served.caller(4))
        until(lambda: served.replies == [0, 1, 2, 4])


def test_a_request_in_parts_has_its_turn_when_all_of_it_is_there():
    with Served(max_batch_size=2, max_request_rows=20) as served:
        let_go = served.hold(4)
        large, small = served.submit(served.caller(*range(7)), served.caller(50))
        until(lambda: small.outcome is None and served.order.held == 1)

        let_go()

        assert small.done.wait(TIMEOUT_S)
        assert served.replies == [0, 50]
        assert large.outcome == [2.0 * i for i in range(7)]


def test_an_answer_that_cannot_be_made_fails_and_the_next_has_its_turn():
    class Odd(Caller):
        def answer(self, batch, start, prediction_id):
            raise RuntimeError("a bug")

    with Served() as served:
        odd = Odd(served.replies, 0)
        served.submit(odd, served.caller(1))

        until(lambda: served.replies == [0, 1])
        assert isinstance(odd.outcome, BackendError)
        assert "a bug" not in str(odd.outcome)


def test_when_an_executor_hangs_at_the_stop_what_is_ready_is_sent_all_the_same():
    served = Served()
    let_go = served.hold(0)
    served.submit(*[served.caller(i) for i in range(3)])
    until(lambda: served.order.held == 2)

    assert not served.model.stop(0.2)

    until(lambda: served.replies == [1, 2])
    let_go()
    until(lambda: served.replies == [1, 2, 0])


@given(
    order=st.permutations(range(12)),
    left=st.sets(st.integers(0, 11)),
    failed=st.sets(st.integers(0, 11)),
)
@settings(max_examples=50, deadline=None)
def test_whatever_ends_in_whatever_order_each_is_told_once_in_the_order_of_coming(
    order, left, failed
):
    replies = []
    callers = [Caller(replies, i) for i in range(12)]
    turns = ReplyOrder("replies", 12)
    turns.start()
    stand_ins = [turns.enter(caller) for caller in callers]

    for number in order:
        if number in left:
            assert turns.settle(stand_ins[number].turn, None)
        elif number in failed:
            stand_ins[number].fail(BackendError("wrong"))
        else:
            stand_ins[number].drop()
        stand_ins[number].drop()  # a second word has no effect
    assert turns.held == 0
    assert turns.stop(time.perf_counter() + TIMEOUT_S)

    assert replies == [i for i in range(12) if i not in left]
    assert all((caller.outcome is None) == (i in left) for i, caller in enumerate(callers))


@pytest.mark.parametrize("number", [1, -1])
def test_a_request_that_had_its_turn_is_freed_without_the_collector(number):
    gc.collect()
    gc.disable()
    try:
        with Served() as served:
            caller = served.submit(served.caller(number))[0]
            assert caller.done.wait(TIMEOUT_S)
            freed = weakref.ref(caller)
            del caller
            until(lambda: freed() is None)
    finally:
        gc.enable()
