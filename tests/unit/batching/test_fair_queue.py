"""Whose turn it is when callers share a queue; what a queue shares with any other: `test_queue`."""

import math
import time
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from waiting_callers import cost

from headrace.batching.codel import Codel
from headrace.batching.cost import BatchCost
from headrace.batching.fair_queue import FairQueue
from headrace.batching.line_up import LineUp
from headrace.batching.policy import BatchPolicy, LevelPolicy

ONE_LEVEL = (LevelPolicy(),)


class Request:
    parts = ()

    def __init__(self, caller, name="", due=math.inf, rows=1, priority=0, key="x"):
        self.caller, self.name, self.deadline_s, self.rows = caller, name or caller, due, rows
        self.priority, self.batch_key, self.timeout_s = priority, key, 0.0
        self.byte_count, self.arrival_s, self.place, self.is_shed = rows, 0.0, None, False
        self.has_left = False

    def expired(self, now_s):
        return self.has_left or self.deadline_s <= now_s


def queue(*requests, size=4, levels=ONE_LEVEL, known=None, policy=None, **limits):
    made = FairQueue(policy or BatchPolicy(size), known or BatchCost(), levels, **limits)
    for request in requests:
        assert made.add(request, 0.0)
    return made


def some(caller, count, **what):
    return [Request(caller, **what) for _ in range(count)]


def names(requests):
    return "".join(request.name for request in requests)


def test_callers_take_turns_within_a_batch():
    waiting = queue(*some("a", 6), *some("b", 3))

    assert names(waiting.take(0).batch) == "abab"
    assert names(waiting.take(0).batch) == "abaa"


def test_turns_are_counted_by_rows():
    waiting = queue(*some("a", 3, rows=3), *some("b", 9), size=3)

    assert [names(waiting.take(0).batch) for _ in range(4)] == ["a", "bbb", "a", "bbb"]


def test_within_one_caller_the_earliest_deadline_goes_first():
    waiting = queue(
        Request("a", "3", 0.9), *some("b", 3), Request("a", "1", 0.7), Request("a", "2", 0.8)
    )

    assert names(waiting.take(0).batch) == "1b2b"


def test_a_higher_level_goes_first_whoever_asks():
    levels = [LevelPolicy()] * 2
    low, high = some("low", 4, name="l", priority=2), some("high", 3, name="h", priority=1)
    waiting = queue(*low, *high, levels=levels)

    assert names(waiting.take(0).batch) == "hhhl"


def test_who_comes_after_a_flood_is_in_the_next_batch():
    waiting = queue(*some("flood", 1_000, name="f"))
    waiting.take(0)
    waiting.add(Request("b"), 0.0)

    assert "b" in names(waiting.take(0).batch)


def test_other_shapes_get_a_caller_no_more_turns():
    flood = [Request("a", key=number % 10) for number in range(100)]
    waiting = queue(*flood, *some("b", 40, key="own"), size=2)

    served = Counter()
    for _ in range(40):
        for request in waiting.take(0).batch:
            served[request.caller] += 1

    assert abs(served["a"] - served["b"]) <= 2


def test_many_callers_of_as_many_shapes_go_in_turn():
    waiting = queue(*[Request(str(i % 50), f"{i % 50},", key=i % 50) for i in range(100)], size=1)

    turns = [names(waiting.take(0).batch) for _ in range(100)]

    assert turns == 2 * [f"{i}," for i in range(50)]


def test_what_a_batch_leaves_behind_keeps_its_turn():
    policy = BatchPolicy(8, 1.0, preferred_batch_sizes=(2,))
    waiting = queue(*some("a", 2), *some("b", 2), Request("c"), policy=policy)

    assert [names(waiting.take(0, 0).batch) for _ in range(2)] == ["ab", "ca"]


def test_a_lane_that_waits_for_company_is_charged_to_nobody():
    policy = BatchPolicy(2, 1.0)
    waiting = queue(Request("a", key="alone"), *some("a", 3), *some("b", 3), policy=policy)

    # The lonely one is looked at each time, and each time put back.
    assert [names(waiting.take(0, 0).batch) for _ in range(3)] == ["ab", "ab", "ab"]
    assert names(waiting.take(0).batch) == "a"


def test_while_everything_fits_the_batch_is_as_small_as_its_most_urgent_request_needs():
    known = cost(0.02, 0.02)
    waiting = queue(known=known)
    for request in (*some("a", 2, due=9), Request("u", due=1.07)):
        waiting.add(request, 1.0)

    assert names(waiting.take(1.0).batch) == "ua"
    assert names(waiting.take(1.0).batch) == "a"


def test_while_more_waits_than_fits_who_would_be_late_in_a_full_batch_makes_room():
    waiting = queue(Request("u", due=1.05), *some("a", 5, due=9), known=cost(0.02, 0.02))

    taken = waiting.take(1.0)

    assert (names(taken.batch), names(taken.dropped)) == ("aaaa", "u")


def test_the_last_one_runs_although_it_should_be_late():
    waiting = queue(*[Request(name, due=1.05) for name in "abc"], known=cost(10.0))

    taken = waiting.take(1.0)

    assert (names(taken.batch), names(taken.dropped)) == ("c", "ab")


def test_who_is_given_up_costs_his_caller_no_turn():
    gone = some("a", 3)
    waiting = queue(*gone, *some("a", 2, name="A"), *some("b", 4), size=2)
    for request in gone:
        request.has_left = True

    taken = waiting.take(0)

    assert (names(taken.batch), names(taken.dropped)) == ("Ab", "aaa")
    assert names(waiting.take(0).batch) == "Ab"


def test_one_caller_cannot_take_up_the_whole_queue():
    waiting = queue(max_queue_size=100)

    taken = Counter(waiting.add(Request("flood"), 0.0) for _ in range(200))

    assert taken[True] == 80
    assert waiting.add(Request("b"), 0.0)


def test_nor_all_its_bytes():
    waiting = queue(max_queue_bytes=100)
    while waiting.add(Request("flood", rows=10), 0.0):
        assert waiting.byte_count <= 100

    assert waiting.add(Request("b", rows=10), 0.0)


def test_nor_the_whole_of_a_level():
    levels = [LevelPolicy(max_queue_size=10), LevelPolicy()]
    waiting = queue(levels=levels)

    taken = Counter(waiting.add(Request("flood", priority=1), 0.0) for _ in range(20))

    assert taken[True] == 8
    assert waiting.add(Request("b", priority=1), 0.0)
    assert waiting.add(Request("flood", priority=2), 0.0)


def test_a_request_in_parts_may_fill_a_queue_in_which_its_caller_has_nothing():
    waiting = queue(max_queue_size=10, max_queue_bytes=10)

    assert waiting.add_all(some("large", 10), 0.0)
    assert waiting.count == 10


def test_but_is_refused_whole_once_he_holds_his_part_of_it():
    waiting = queue(*some("large", 8), max_queue_size=10)

    assert not waiting.add_all(some("large", 2), 0.0)
    assert waiting.count == 8
    assert waiting.add_all(some("b", 2), 0.0)


def test_nor_may_parts_be_more_than_their_level_has_room_for():
    waiting = queue(levels=[LevelPolicy(max_queue_size=10), LevelPolicy()])

    assert not waiting.add_all(some("large", 11, priority=1), 0.0)
    assert waiting.add_all(some("large", 10, priority=1), 0.0)


def test_a_flood_is_expected_to_be_late_and_who_asks_for_little_is_not():
    known = cost(0.1)
    waiting = queue(*some("flood", 400), known=known)

    light = waiting.finish_s(Request("light"), 0.0, 0.0)
    flood = waiting.finish_s(Request("flood"), 0.0, 0.0)

    assert light <= 0.1 + known.bound_s(4) + 0.01
    assert flood == pytest.approx(100 * 0.1 + known.bound_s(4), rel=0.05)


def test_others_rows_are_expected_ahead_of_a_flood():
    waiting = queue(*some("flood", 40), *some("b", 8), known=cost(0.1))

    alone = queue(*some("flood", 40), known=cost(0.1))
    later_s = waiting.finish_s(Request("flood"), 0.0, 0.0)

    assert later_s == pytest.approx(alone.finish_s(Request("flood"), 0.0, 0.0) + 0.2, abs=0.11)


def test_who_asks_for_little_waits_for_few_of_the_shapes_of_a_flood():
    known = cost(0.01)
    flood = [Request("flood", key=i % 64) for i in range(640)]
    waiting = queue(*flood, size=32, known=known)

    light = waiting.finish_s(Request("light", key="new"), 0.0, 0.0)
    flood = waiting.finish_s(Request("flood", key="new"), 0.0, 0.0)

    assert light <= 0.01 + known.bound_s(1) + 0.001
    assert flood == pytest.approx(64 * 0.01 + known.bound_s(1), rel=0.05)


def test_shapes_of_a_lower_level_are_not_waited_for():
    known, levels = cost(0.01), [LevelPolicy()] * 2
    flood = [Request("a", key=i, priority=2) for i in range(64)]
    waiting = queue(*flood, Request("a", priority=1), size=32, known=known, levels=levels)

    finish_s = waiting.finish_s(Request("a", key="y", priority=1), 0.0, 0.0)

    assert finish_s <= 0.01 + known.bound_s(1) + 0.001


def test_a_higher_level_is_expected_ahead_of_everybody():
    levels = [LevelPolicy()] * 2
    waiting = queue(*some("a", 40, priority=1), known=cost(0.1), levels=levels)

    assert waiting.finish_s(Request("b", priority=2), 0.0, 0.0) > 1.0


def test_in_a_queue_that_stands_the_flood_is_given_up_and_nobody_else():
    waiting = queue(*some("flood", 100), codel=Codel(0.05, 0.1))
    dropped = []
    for step in range(1, 5):
        waiting.add(Request("light"), step * 0.06 - 0.01)
        dropped += waiting.take(step * 0.06).dropped

    assert {request.caller for request in dropped} == {"flood"}
    assert all(request.is_shed for request in dropped)
    assert waiting.shed == len(dropped) > 80


def test_shedding_always_leaves_a_batch():
    waiting = queue(*some("a", 30), size=8, codel=Codel(0.05, 0.1))
    waiting.take(0.06)

    taken = waiting.take(10.0)

    assert len(taken.batch) == 8
    assert waiting.count == 0


def test_a_burst_is_taken_up_by_a_queue_that_was_emptied_before_it():
    waiting = queue(Request("a"), size=4, codel=Codel(0.05, 0.1))
    waiting.take(0.06)  # it waited long, and nobody is left
    for request in some("a", 30):
        waiting.add(request, 0.1)

    assert waiting.take(0.17).dropped == []


def test_who_has_left_the_queue_is_not_kept_in_memory_by_it():
    taken, leaving = Request("a", due=1), Request("a", due=2)
    waiting = queue(taken, leaving, size=1, codel=Codel(1.0))

    waiting.take(0)
    assert waiting.remove(leaving)

    assert taken.place is leaving.place is None
    assert not waiting.remove(leaving)
    assert (waiting.count, waiting.rows, waiting.byte_count) == (0, 0, 0)


def per_request_s(callers):
    """Return the CPU time of one put and its part of a take, with so many callers waiting."""
    waiting = FairQueue(BatchPolicy(32), BatchCost())
    for number in range(4_096):
        waiting.add(Request(number % callers), 0.0)
    requests = [Request(number % callers) for number in range(4_096)]
    start_s = time.thread_time()
    for number, request in enumerate(requests, 1):
        waiting.add(request, 0.0)
        if number % 32 == 0:
            waiting.take(0.0)
    return (time.thread_time() - start_s) / len(requests)


def test_a_thousand_callers_cost_hardly_more_than_two():
    two_s, many_s = (min(per_request_s(callers) for _ in range(3)) for callers in (2, 1_024))

    assert many_s < 8 * two_s  # a walk over all callers each time costs fifty times as much


@pytest.mark.parametrize("gone", [lambda i: "gone", lambda i: f"gone {i}"], ids=["one", "many"])
def test_a_flood_of_the_late_costs_a_batch_a_few_draws_each(gone, monkeypatch):
    draws = 0
    draw = LineUp.draw

    def counting_draw(line_up):
        nonlocal draws
        draws += 1
        return draw(line_up)

    monkeypatch.setattr(LineUp, "draw", counting_draw)
    late = [Request(gone(i), due=0.5) for i in range(1_000)]
    waiting = queue(*[Request(f"alive {i % 255}") for i in range(765)], *late, size=256)

    taken = [waiting.take(1.0) for _ in range(3)]

    assert sum(len(each.dropped) for each in taken) == 1_000
    assert sum(len(each.batch) for each in taken) == 765
    assert draws <= 1_000 + 765 + 3  # each once, and that nobody is left


def test_a_put_that_is_refused_looks_at_no_other_caller():
    def refusals_s(callers):
        levels = [LevelPolicy(max_queue_size=callers + 100), LevelPolicy()]
        waiting = FairQueue(BatchPolicy(32), BatchCost(), levels)
        for number in range(callers):
            waiting.add(Request(number, priority=1), 0.0)
        while waiting.add(Request("flood", priority=1), 0.0):
            pass
        start_s = time.thread_time()
        for _ in range(2_000):
            assert not waiting.add(Request("flood", priority=1), 0.0)
        return time.thread_time() - start_s

    few_s, many_s = (min(refusals_s(callers) for _ in range(3)) for callers in (2, 4_096))

    assert many_s < 8 * few_s


BACKLOG = st.lists(st.tuples(st.sampled_from("aab"), st.integers(1, 8)), min_size=200)


@given(
    st.lists(st.integers(1, 8), min_size=80, max_size=80),
    st.lists(st.integers(1, 8), min_size=80, max_size=80),
    st.integers(8, 16),
    st.sampled_from(["x", "xy"]),
    st.lists(st.floats(0.1, 0.9), min_size=160, max_size=160),
)
def test_two_callers_who_wait_throughout_get_as_many_rows_as_each_other(a, b, size, keys, dues):
    requests = [
        Request(caller, due=due, rows=rows, key=keys[i % len(keys)])
        for i, (caller, rows, due) in enumerate(zip("a" * 80 + "b" * 80, a + b, dues, strict=True))
    ]
    waiting, served, left = queue(*requests, size=size), Counter(), Counter("a" * 80 + "b" * 80)
    # Within a quantum and a request; where shapes differ a batch has one shape's rows only.
    bound = 1 + 8 if keys == "x" else 1 + 8 + size

    while True:
        for request in waiting.take(0.0).batch:
            served[request.caller] += request.rows
            left[request.caller] -= 1
        if min(left["a"], left["b"]) < size:
            return
        assert abs(served["a"] - served["b"]) <= bound
