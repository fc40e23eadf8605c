"""What callers and executors of the batcher can rely on. Executors are driven by hand here."""

import math
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import structlog

from headrace.batching.batcher import TELLING_SHARE, TOLD_AT_ONCE, TOLD_BESIDE, Batcher
from headrace.batching.codel import Codel
from headrace.batching.policy import BatchPolicy, LevelPolicy
from headrace.errors import Draining, InvalidRequest, Overloaded


class Caller:
    """A request that can leave."""

    parts = ()

    def __init__(
        self, name, rows=1, batch_key="shape", byte_count=1, deadline_s=math.inf, priority=0
    ):
        self.name = name
        self.byte_count = byte_count
        self.rows = rows
        self.batch_key = batch_key
        self.arrival_s = time.perf_counter()
        self.deadline_s = deadline_s
        self.priority = priority
        self.timeout_s = 0.0
        self.place = None
        self.has_left = False
        self.drops = 0

    def expired(self, now_s):
        return self.has_left or self.deadline_s <= now_s

    def drop(self):
        self.drops += 1


class OwnCaller(Caller):
    """One whose caller is known."""

    caller = "a"


def names(batch):
    return [caller.name for caller in batch]


def make(max_batch_size=4, delay_s=0.0, max_queue_size=8):
    return Batcher(BatchPolicy(max_batch_size, delay_s), max_queue_size=max_queue_size)


def test_a_free_executor_takes_everything_that_waits_and_fits():
    batcher = make()
    for name in "abcdef":
        batcher.put(Caller(name))

    assert names(batcher.take()) == list("abcd")
    assert names(batcher.take()) == list("ef")


def test_rows_are_counted_and_not_requests():
    batcher = make()
    batcher.put(Caller("three", rows=3))
    batcher.put(Caller("two", rows=2))

    assert names(batcher.take()) == ["three"]
    assert names(batcher.take()) == ["two"]


def test_a_waiting_executor_is_woken_by_the_first_request():
    batcher = make()
    with ThreadPoolExecutor(1) as executor:
        taken = executor.submit(batcher.take)
        batcher.put(Caller("a"))

        assert names(taken.result(5)) == ["a"]


def test_each_of_many_requests_is_taken_exactly_once_by_several_executors():
    batcher = make(max_queue_size=100_000)
    taken = [[] for _ in range(3)]

    def execute(mine):
        while (batch := batcher.take()) is not None:
            mine.extend(names(batch))

    executors = [threading.Thread(target=execute, args=(mine,)) for mine in taken]
    for executor in executors:
        executor.start()
    for number in range(5_000):
        batcher.put(Caller(number))
    batcher.close()
    for executor in executors:
        executor.join(10)

    assert not any(executor.is_alive() for executor in executors)
    assert sorted(taken[0] + taken[1] + taken[2]) == list(range(5_000))


def test_a_caller_who_left_while_queued_costs_no_row_of_the_batch():
    batcher = make(max_batch_size=2)
    callers = [Caller(name) for name in "abcd"]
    for caller in callers:
        batcher.put(caller)
    callers[0].has_left = True

    assert names(batcher.take()) == ["b", "c"]
    assert [caller.drops for caller in callers] == [1, 0, 0, 0]


def test_one_caller_leaving_does_not_disturb_its_batch():
    batcher = make()
    callers = [Caller(name) for name in "abc"]
    for caller in callers:
        batcher.put(caller)
    callers[1].has_left = True

    assert names(batcher.take()) == ["a", "c"]
    assert callers[1].drops == 1


def test_another_shape_neither_joins_the_batch_nor_blocks_it():
    batcher = make()
    for name, shape in [("a", "x"), ("odd", "y"), ("b", "x")]:
        batcher.put(Caller(name, batch_key=shape))

    assert names(batcher.take()) == ["a", "b"]
    assert names(batcher.take()) == ["odd"]


def test_a_full_batch_of_one_shape_does_not_wait_out_anothers_delay():
    batcher = make(max_batch_size=2, delay_s=30)
    batcher.put(Caller("waits for company", batch_key="x"))
    for name in "ab":
        batcher.put(Caller(name, batch_key="y"))

    assert names(batcher.take()) == ["a", "b"]
    assert len(batcher) == 1


@pytest.mark.alone
def test_the_shortest_wait_of_all_shapes_is_waited():
    batcher = make(delay_s=0.2)
    late = Caller("late", batch_key="x")
    early = Caller("early", batch_key="y")
    early.arrival_s -= 0.15
    batcher.put(late)
    batcher.put(early)
    start_s = time.perf_counter()

    assert names(batcher.take()) == ["early"]
    assert time.perf_counter() - start_s < 0.15
    assert names(batcher.take()) == ["late"]


def test_many_shapes_are_taken_in_the_order_of_arrival_and_in_time():
    batcher = make(max_queue_size=20_000)
    for i in range(20_000):
        batcher.put(Caller(i % 10_000, batch_key=i % 10_000))
    start_s = time.perf_counter()

    taken = [batcher.take() for _ in range(10_000)]

    assert [batch[0].name for batch in taken] == list(range(10_000))
    assert {len(batch) for batch in taken} == {2}
    assert time.perf_counter() - start_s < 5  # a walk over all of them each time takes minutes


def test_a_shape_that_is_not_all_taken_keeps_its_place_in_line():
    batcher = make(max_batch_size=1)
    for name, shape in [("x1", "x"), ("x2", "x"), ("y1", "y"), ("x3", "x")]:
        batcher.put(Caller(name, batch_key=shape))

    assert [names(batcher.take())[0] for _ in range(4)] == ["x1", "x2", "y1", "x3"]


def test_bytes_are_limited_as_requests_are():
    batcher = Batcher(BatchPolicy(4), max_queue_size=8, max_queue_bytes=10)
    batcher.put(Caller("a", byte_count=6))
    with pytest.raises(Overloaded):
        batcher.put(Caller("too large", byte_count=5))
    batcher.put(Caller("fits", byte_count=4))

    assert names(batcher.take()) == ["a", "fits"]
    batcher.put(Caller("alone", byte_count=10))


def test_callers_who_have_left_give_their_bytes_back():
    batcher = Batcher(BatchPolicy(4), max_queue_size=8, max_queue_bytes=10)
    leaving = Caller("leaving", byte_count=9)
    batcher.put(leaving)
    leaving.has_left = True

    batcher.put(Caller("b", byte_count=9))

    assert leaving.drops == 1
    assert names(batcher.take()) == ["b"]


def test_a_request_that_cannot_be_told_that_its_time_is_over_stops_nobody():
    class Deaf(Caller):
        def drop(self):
            raise RuntimeError("a bug")

    batcher = make()
    deaf, gone, fine = Deaf("deaf"), Caller("gone"), Caller("fine")
    for caller in (deaf, gone, fine):
        batcher.put(caller)
    deaf.has_left = gone.has_left = True

    with structlog.testing.capture_logs() as log:
        assert names(batcher.take()) == ["fine"]

    assert gone.drops == 1
    assert [line["event"] for line in log] == ["drop_failed"]


def test_the_oldest_request_decides_whose_turn_it_is():
    batcher = make(max_batch_size=1)
    for name, shape in [("first", "x"), ("second", "y"), ("third", "x")]:
        batcher.put(Caller(name, batch_key=shape))

    assert [names(batcher.take()) for _ in range(3)] == [["first"], ["second"], ["third"]]


def test_a_partial_batch_leaves_when_its_delay_is_over():
    batcher = make(delay_s=0.05)
    caller = Caller("a")
    batcher.put(caller)

    assert names(batcher.take()) == ["a"]
    assert time.perf_counter() - caller.arrival_s >= 0.05


def test_a_batch_that_fills_up_does_not_wait_out_its_delay():
    batcher = make(max_batch_size=2, delay_s=60)
    batcher.put(Caller("a"))
    with ThreadPoolExecutor(1) as executor:
        taken = executor.submit(batcher.take)
        batcher.put(Caller("b"))

        assert names(taken.result(5)) == ["a", "b"]


def test_a_full_queue_refuses():
    batcher = make(max_queue_size=2)
    batcher.put(Caller("a"))
    batcher.put(Caller("b"))

    with pytest.raises(Overloaded, match="requests are already waiting"):
        batcher.put(Caller("c"))
    assert names(batcher.take()) == ["a", "b"]


def test_callers_who_left_make_room_in_a_full_queue():
    batcher = make(max_queue_size=2)
    gone = Caller("gone")
    batcher.put(gone)
    batcher.put(Caller("a"))
    gone.has_left = True

    batcher.put(Caller("b"))

    assert names(batcher.take()) == ["a", "b"]
    assert gone.drops == 1


def test_who_would_begin_at_once_is_taken_if_nothing_was_learned_for_a_while():
    batcher = make()
    for _ in range(20):
        batcher._cost.observe(1, 10.0)
    with pytest.raises(Overloaded, match="takes longer"):
        batcher.put(Caller("late", deadline_s=time.time() + 1))
    batcher._learned_s -= 2.0  # that expectation is old: perhaps it is wrong by now

    batcher.put(Caller("late", deadline_s=time.time() + 1))
    with pytest.raises(Overloaded, match="before its deadline"):
        batcher.put(Caller("behind", deadline_s=time.time() + 1))

    assert names(batcher.take()) == ["late"]


def test_closing_refuses_what_comes_and_hands_out_what_waits_without_delay():
    batcher = make(delay_s=60)
    batcher.put(Caller("a"))
    batcher.close()

    with pytest.raises(Draining):
        batcher.put(Caller("late"))
    assert names(batcher.take()) == ["a"]
    assert batcher.take() is None


def test_closing_ends_every_waiting_executor():
    batcher = make()
    with ThreadPoolExecutor(3) as executor:
        waiting = [executor.submit(batcher.take) for _ in range(3)]
        batcher.close()

        assert [future.result(5) for future in waiting] == [None, None, None]


class Told(Caller):
    """Notes that it was told that its time is over."""

    def __init__(self, name, told):
        super().__init__(name)
        self.told = told

    def drop(self):
        self.told.append(self.name)


def flood(batcher, count, told=None):
    """Queue requests whose callers leave, and one whose caller stays; return who is told."""
    told = [] if told is None else told
    leaving = [Told(number, told) for number in range(count)]
    for caller in (*leaving, Caller("alive")):
        batcher.put(caller)
    for caller in leaving:
        caller.has_left = True
    return told


def test_a_flood_of_those_who_are_given_up_does_not_hold_up_a_batch():
    batcher = make(max_queue_size=10_000)
    told = flood(batcher, 1_000)

    assert names(batcher.take()) == ["alive"]
    assert len(told) <= TOLD_AT_ONCE


def test_all_of_them_are_told_in_the_end_and_once():
    batcher = make(max_queue_size=10_000)
    told = flood(batcher, 1_000)
    batcher.take()
    batcher.close()

    assert batcher.take() is None
    assert sorted(told) == list(range(1_000))
    assert batcher.dropped == 1_000


def known(batcher, batch_s):
    """Let the batcher believe that a batch takes so long."""
    for _ in range(20):
        batcher._cost.observe(1, batch_s)
    return batcher


def test_before_a_slow_batch_all_are_told_that_a_small_part_of_its_time_allows():
    batcher = known(make(max_queue_size=10_000), 100.0)
    told = flood(batcher, 4_000)

    assert names(batcher.take()) == ["alive"]
    assert len(told) == 4_000


def test_telling_takes_no_more_than_that_part_of_the_batchs_time():
    batcher = known(make(max_queue_size=10_000), 1.0)

    class Slow(list):
        def append(self, name):
            time.sleep(0.001)
            super().append(name)

    told = flood(batcher, 1_000, Slow())

    assert names(batcher.take()) == ["alive"]
    assert TOLD_AT_ONCE <= len(told) <= TELLING_SHARE * 1.1 / 0.001


def test_whoever_puts_tells_a_few_so_that_all_are_told_however_busy_the_executors_are():
    batcher = make(max_queue_size=10_000)
    told = flood(batcher, 200)
    batcher.take()
    for _ in range(200 // TOLD_BESIDE):
        batcher.put(Caller("more"))

    assert len(told) == 200


def whose(name):
    caller = Caller(name)
    caller.caller = name
    return caller


def test_callers_take_turns_where_the_batcher_is_fair():
    batcher = Batcher(BatchPolicy(2), max_queue_size=100, is_fair=True)
    for name in ["flood"] * 10 + ["b"]:
        batcher.put(whose(name))

    assert names(batcher.take()) == ["flood", "b"]


def test_a_caller_who_takes_up_his_part_of_a_fair_queue_is_refused_and_others_are_not():
    batcher = Batcher(BatchPolicy(2), max_queue_size=10, is_fair=True)
    for _ in range(8):
        batcher.put(whose("flood"))

    with pytest.raises(Overloaded, match="of this caller"):
        batcher.put(whose("flood"))
    batcher.put(whose("b"))
    assert batcher.refused_full == 1


def test_who_waited_too_long_in_a_queue_that_stands_is_given_up_and_counted():
    batcher = Batcher(BatchPolicy(1), max_queue_size=100, codel=Codel(0.01, 0.02))
    callers = [Caller(number) for number in range(50)]
    for caller in callers:
        batcher.put(caller)
    for _ in range(2):
        time.sleep(0.03)  # a slow executor: the oldest waits longer than he should
        batcher.take()

    assert batcher.shed == batcher.dropped == sum(caller.drops for caller in callers) == 48
    assert all(caller.is_shed for caller in callers if caller.drops)


def test_a_level_is_not_full_of_those_whose_time_is_over():
    levels = [LevelPolicy(), LevelPolicy(max_queue_size=1, timeout_s=0.001)]
    batcher = Batcher(BatchPolicy(1), max_queue_size=8, levels=levels)
    starved, newcomer = Caller("starved", priority=2), Caller("newcomer", priority=2)
    batcher.put(Caller("first", priority=1))
    batcher.put(starved)
    time.sleep(0.01)  # at least: its time is over

    batcher.put(newcomer)

    assert starved.drops == 1
    assert (batcher.dropped, len(batcher)) == (1, 2)


@pytest.mark.parametrize("is_fair", [False, True])
@pytest.mark.parametrize("waiting", [0, 1])
def test_a_request_that_no_empty_queue_would_hold_is_wrong_and_no_overload(is_fair, waiting):
    batcher = Batcher(BatchPolicy(4), max_queue_size=8, max_queue_bytes=100, is_fair=is_fair)
    for name in range(waiting):
        batcher.put(OwnCaller(name))
    large = OwnCaller("large", byte_count=101)

    for refuse in (batcher.put, lambda request: batcher.judge(request, 2)):
        with pytest.raises(InvalidRequest, match=r"101 bytes.*100"):
            refuse(large)
    with pytest.raises(InvalidRequest):
        batcher.put_all([OwnCaller(i, byte_count=51) for i in range(2)])

    assert (batcher.pressure, batcher.refused_full) == (0, 0)


def test_nor_is_it_turned_away_unread():
    batcher = Batcher(BatchPolicy(4), max_queue_size=500, max_queue_bytes=1_000)
    for name in range(500):
        batcher.put(Caller(name))
    with pytest.raises(Overloaded):
        batcher.put(Caller("one more"))

    assert batcher.refuses(math.inf, 1_001) is None
    assert batcher.refuses(math.inf, 1_000) is not None
