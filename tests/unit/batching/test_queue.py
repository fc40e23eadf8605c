"""Who goes first, who waits no longer, and what is promised to a request that comes."""

import math
import time

import pytest
from waiting_callers import Caller, cost

from headrace.batching.codel import Codel
from headrace.batching.cost import BatchCost
from headrace.batching.fair_queue import FairQueue
from headrace.batching.lane import PATIENCE_S
from headrace.batching.policy import BatchPolicy, LevelPolicy
from headrace.batching.queue import RequestQueue

ONE_LEVEL = (LevelPolicy(),)
KINDS = pytest.mark.parametrize("kind", [RequestQueue, FairQueue], ids=["plain", "fair"])


def queue(*callers, size=4, levels=ONE_LEVEL, default=1, known=None, executors=1, at=0.0):
    made = RequestQueue(BatchPolicy(size), known or BatchCost(), levels, default, executors)
    for caller in callers:
        assert made.add(caller, at)
    return made


def names(callers):
    return "".join(caller.name for caller in callers)


class Part(Caller):
    """One of some that are a request together; `split` makes them."""

    def __init__(self, *what, **more):
        super().__init__(*what, **more)
        self.parts = []


def split(*parts):
    for part in parts:
        part.parts = parts
    return parts


def with_codel(*callers, size=4, delay_s=0.0, kind=RequestQueue):
    made = kind(BatchPolicy(size, delay_s), BatchCost(), codel=Codel(0.05, 0.1))
    for caller in callers:
        made.add(caller, 0.0)
    return made


@KINDS
def test_a_request_in_parts_that_runs_alone_is_not_given_up_for_the_time_it_takes(kind):
    waiting = with_codel(*split(*[Part(name, rows=4) for name in "abcdefghij"]), kind=kind)

    taken = [waiting.take(step * 0.06) for step in range(10)]

    assert [names(each.batch) for each in taken] == list("abcdefghij")
    assert waiting.shed == 0


@KINDS
def test_a_request_of_which_nothing_has_run_is_given_up_with_all_its_parts(kind):
    whole = split(*[Part("b", rows=4) for _ in range(3)])
    waiting = with_codel(*[Caller("a", rows=4) for _ in range(3)], *whole, kind=kind)
    taken = [waiting.take(0.06)]
    for _ in range(2):
        waiting.add(Caller("c", rows=4), 0.15)
    taken += [waiting.take(0.16), waiting.take(0.17)]

    assert [names(each.batch) for each in taken] == ["a", "c", "c"]
    assert [names(each.dropped) for each in taken] == ["", "aabbb", ""]
    assert (waiting.shed, waiting.count) == (3, 0)
    assert all(part.is_shed for part in whole)


@KINDS
def test_no_part_runs_in_the_batch_for_which_another_part_is_given_up(kind):
    long, short = split(Part("p", rows=4, due=1.05), Part("p", rows=1, due=1.05))
    waiting = kind(BatchPolicy(4), cost(0.01, 0.02))
    for request in (long, short, Caller("a", due=1.06)):
        waiting.add(request, 1.0)

    taken = waiting.take(1.0)

    assert (names(taken.batch), names(taken.dropped)) == ("a", "pp")
    assert waiting.count == waiting.rows == 0


@KINDS
def test_a_queue_whose_requests_wait_for_company_does_not_stand(kind):
    waiting = with_codel(size=32, delay_s=0.2, kind=kind)
    ran = 0
    for step in range(1_500):
        caller = Caller("a", key=step % 10)
        caller.arrival_s = now_s = step * 0.001
        waiting.add(caller, now_s)
        while batch := waiting.take(now_s, now_s).batch:
            ran += len(batch)

    assert waiting.shed == 0
    assert ran > 1_200


def test_the_earliest_deadline_goes_first():
    waiting = queue(Caller("c", 0.3), Caller("a", 0.1), Caller("b", 0.2), size=2)

    assert names(waiting.take(0).batch) == "ab"
    assert names(waiting.take(0).batch) == "c"


def test_equal_deadlines_go_in_the_order_of_arrival():
    waiting = queue(*[Caller(name, 5) for name in "abcdef"], size=3)

    assert names(waiting.take(0).batch) == "abc"


def test_a_request_without_a_deadline_does_not_wait_for_ever():
    waiting = queue(Caller("p"), size=1)
    waiting.add(Caller("a", PATIENCE_S * 1.5), PATIENCE_S)

    assert names(waiting.take(PATIENCE_S).batch) == "p"


def test_a_higher_level_goes_before_an_earlier_deadline():
    levels = [LevelPolicy()] * 2
    waiting = queue(Caller("b", 1, priority=2), Caller("a", 9, priority=1), size=1, levels=levels)

    assert names(waiting.take(0).batch) == "a"


@pytest.mark.parametrize("priority", [0, 3, 2**63])
def test_a_level_that_is_not_there_is_the_default_one(priority):
    waiting = queue(levels=[LevelPolicy()] * 2, default=2)

    assert waiting.level_of(Caller("a", priority=priority)) == 2


def test_a_full_level_refuses_and_the_others_do_not():
    waiting = queue(Caller("a", priority=1), levels=[LevelPolicy(max_queue_size=1)] * 2)

    assert not waiting.add(Caller("b", priority=1), 0)
    assert waiting.add(Caller("c", priority=2), 0)


def test_who_has_waited_as_long_as_his_level_allows_is_given_up():
    waiting = queue(Caller("a"), Caller("b", timeout_s=5.0), levels=[LevelPolicy(timeout_s=1.0)])
    waiting.add(Caller("c"), 1.0)

    taken = waiting.take(1.5)

    assert (names(taken.batch), names(taken.dropped)) == ("c", "ab")


def test_or_goes_after_all_others_where_the_level_delays():
    level = LevelPolicy(timeout_s=1.0, is_delayed=True)
    waiting = queue(Caller("a"), levels=[level], size=1)
    waiting.add(Caller("b"), 1.0)

    assert names(waiting.take(1.5).batch) == "b"
    assert names(waiting.take(1.5).batch) == "a"
    assert waiting.count == waiting.rows == waiting.byte_count == 0


def test_a_request_may_shorten_its_wait_where_its_level_allows():
    level = LevelPolicy(timeout_s=9.0, is_delayed=True, may_override=True)
    waiting = queue(Caller("a", timeout_s=1.0), levels=[level], size=1)
    waiting.add(Caller("b"), 1.0)

    assert names(waiting.take(1.5).batch) == "b"


def test_elsewhere_its_timeout_is_its_deadline():
    caller = Caller("a", 9.0, timeout_s=2.0)

    queue().bind(caller, 1.0)

    assert caller.deadline_s == 3.0


def test_while_more_waits_than_fits_who_would_be_late_in_a_full_batch_makes_room():
    waiting = queue(
        Caller("u", 1.05), *[Caller(name, 9) for name in "abcde"], known=cost(0.02, 0.02)
    )

    taken = waiting.take(1.0)  # four rows take 0.1 s, one takes 0.04 s

    assert (names(taken.batch), names(taken.dropped)) == ("abcd", "u")


def test_otherwise_the_batch_is_as_small_as_its_most_urgent_request_needs():
    waiting = queue(Caller("u", 1.07), Caller("a", 9), Caller("b", 9), known=cost(0.02, 0.02))

    assert names(waiting.take(1.0).batch) == "ua"
    assert names(waiting.take(1.0).batch) == "b"


def test_the_last_one_runs_although_it_should_be_late_so_that_expectations_mend():
    waiting = queue(*[Caller(name, 1.05) for name in "abc"], known=cost(10.0))

    taken = waiting.take(1.0)

    assert (names(taken.batch), names(taken.dropped)) == ("c", "ab")


def test_nothing_is_run_after_its_deadline():
    waiting = queue(Caller("a", 1.0))

    taken = waiting.take(1.0)

    assert (names(taken.batch), names(taken.dropped)) == ("", "a")


def test_parts_of_a_request_go_in_line_together_or_not_at_all():
    waiting = queue(Caller("a"), levels=[LevelPolicy(max_queue_size=4)])

    assert not waiting.add_all([Caller("p") for _ in range(4)], 0.0)
    assert waiting.count == 1
    assert waiting.add_all([Caller("p") for _ in range(3)], 0.0)
    assert waiting.count == 4


def in_parts(kind, due=math.inf, known=None, executors=1, levels=ONE_LEVEL):
    """Return a queue in which a request of ten parts waits, of which each takes 0.1 s by itself."""
    made = kind(BatchPolicy(4), known or cost(0.1), levels, executors=executors)
    assert made.add_all(split(*[Part("p", due, rows=4) for _ in range(10)]), 0.0)
    return made


def order(waiting, *coming):
    """Return who is taken, a batch each 0.1 s, while callers come at their times."""
    coming, taken = list(coming), []
    for step in range(30):
        while coming and coming[0][0] <= step * 0.1:
            at_s, caller = coming.pop(0)
            assert waiting.add(caller, at_s)
        taken.append(names(waiting.take(step * 0.1).batch))
    assert waiting.count == 0
    return " ".join(taken).split()


@KINDS
def test_who_comes_while_a_request_in_parts_is_run_waits_for_none_of_the_parts_that_are_left(kind):
    taken = order(in_parts(kind), (0.25, Caller("a")), (0.65, Caller("b")), (0.66, Caller("c")))

    # Each part that was overtaken is late by then, and goes before who comes later than its turn.
    assert taken == [*"ppp", "a", *"pppp", "bc", *"ppp"]


@KINDS
def test_as_many_parts_as_there_are_executors_run_before_who_comes_at_the_same_time(kind):
    waiting = in_parts(kind, executors=2)
    waiting.add(Caller("a"), 0.06)

    assert [names(waiting.take(at_s).batch) for at_s in (0.0, 0.0, 0.1)] == ["p", "p", "a"]


@KINDS
def test_what_the_parts_of_a_request_have_to_spare_is_how_far_they_are_overtaken(kind):
    known = cost(0.1)
    needs_s = 10 * known.bound_s(4)
    coming = [(0.05, Caller("a"))]

    assert order(in_parts(kind, needs_s + 0.001, known), *coming).index("a") == 10
    assert order(in_parts(kind, needs_s + 60, known), *coming).index("a") == 1


@KINDS
def test_parts_are_not_put_off_beyond_what_their_level_lets_them_wait(kind):
    known = cost(0.1)
    levels = [LevelPolicy(timeout_s=10 * known.bound_s(4) + 0.001)]

    taken = order(in_parts(kind, known=known, levels=levels), (0.05, Caller("a")))

    assert taken.index("a") == 10  # one of them would have been too late


@KINDS
def test_parts_are_not_put_off_by_who_comes_later_than_they_would_have_run(kind):
    """More comes than can be run: small ones, of which each batch is full."""
    late = [(0.1 * i + 0.05, Caller("n", rows=4)) for i in range(19)]

    taken = order(in_parts(kind), *late)

    assert taken.count("p") == 10
    assert "".join(taken).rindex("p") <= 18  # half of what was run while they waited


def test_a_caller_who_leaves_is_out_of_the_queue_at_once():
    leaving = Caller("b", 2, rows=2)
    waiting = queue(Caller("a", 1), leaving, Caller("c", 3))

    assert waiting.remove(leaving)

    assert (waiting.count, waiting.rows, waiting.byte_count) == (2, 2, 2)
    assert not waiting.remove(leaving)
    assert names(waiting.take(0).batch) == "ac"


@KINDS
def test_a_full_batch_leaves_without_a_look_at_all_who_wait(kind):
    """Nobody's wait matters to it, and ingress waits for the lock meanwhile."""
    looked_at = set()

    class Watched(Caller):
        @property
        def deadline_s(self):
            looked_at.add(self.name)
            return math.inf

        @deadline_s.setter
        def deadline_s(self, _):
            pass

    waiting = kind(BatchPolicy(4, 0.1), cost(0.01))
    for number in range(100):
        waiting.add(Watched(str(number)), 0.0)
    looked_at.clear()

    assert len(waiting.take(0.0, 0.0).batch) == 4
    assert len(looked_at) <= 4


def test_company_is_waited_for_only_as_long_as_everybody_has_time():
    def waiting_for(*callers, levels=ONE_LEVEL):
        made = RequestQueue(BatchPolicy(8, 0.1), cost(0.01), levels)
        for caller in callers:
            made.add(caller, 0)
        return made

    patient = waiting_for(Caller("p"))
    hurried = waiting_for(Caller("p"), Caller("h", 0.05))
    limited = waiting_for(Caller("p"), levels=[LevelPolicy(timeout_s=0.05)])

    assert patient.take(0.0, 0.0).wait_s == pytest.approx(0.1)
    assert hurried.take(0.0, 0.0).wait_s == pytest.approx(0.05 - 0.01 - 0.002, abs=0.002)
    assert limited.take(0.0, 0.0).wait_s == pytest.approx(0.05 - 0.002)
    assert names(hurried.take(0.039, 0.039).batch) == "hp"
    assert names(limited.take(0.049, 0.049).batch) == "p"


@pytest.mark.parametrize("delay_s", [0.0, 0.001])
def test_preferred_sizes_do_not_shrink_the_batches_of_a_long_queue(delay_s):
    waiting = RequestQueue(BatchPolicy(64, delay_s, (8,)), BatchCost())
    for _ in range(200):
        waiting.add(Caller("a"), 0.0)

    assert [len(waiting.take(0.5, 0.5).batch) for _ in range(4)] == [64, 64, 64, 8]


def test_a_queue_of_the_dead_is_cleared_in_the_time_of_one_walk():
    waiting = queue(*[Caller("d", 1.0, key=key) for key in "xy" for _ in range(20_000)])
    start_s = time.perf_counter()

    taken = waiting.take(2.0)

    assert len(taken.dropped) == 40_000
    assert not taken.batch
    assert time.perf_counter() - start_s < 5  # each time over a lane's rows takes half a minute


def test_who_has_left_the_queue_is_not_kept_in_memory_by_it():
    taken, leaving = Caller("a", 1), Caller("b", 2)
    waiting = queue(taken, leaving, size=1)

    waiting.take(0)
    waiting.remove(leaving)

    assert taken.place is leaving.place is None


def test_a_lane_whose_head_leaves_keeps_its_turn():
    head = Caller("h", 1)
    waiting = queue(head, Caller("a", 2), Caller("b", 3, key="y"))
    waiting.remove(head)

    assert [names(waiting.take(0).batch) for _ in range(2)] == ["a", "b"]
    assert not waiting.take(0).batch


LEVEL_2 = LevelPolicy(max_queue_size=1)


@KINDS
def test_where_others_always_go_first_what_is_noted_does_not_grow_with_the_batches(kind):
    waiting = kind(BatchPolicy(4), BatchCost(), [LevelPolicy()] * 2)
    for step in range(1_000):
        waiting.add(Caller("b", priority=2), step)
        waiting.add(Caller("a", priority=1), step)
        assert names(waiting.take(step).batch) == "ab"
        assert len(waiting._order) < 100


@KINDS
def test_nor_with_those_who_came_and_left_behind_them(kind):
    waiting = kind(BatchPolicy(4), BatchCost(), [LevelPolicy()] * 2)
    waiting.add(Caller("a", priority=1), 0)
    for step in range(1_000):
        leaving = Caller("b", 9_000 - step, priority=2)
        waiting.add(leaving, 0)
        assert waiting.remove(leaving)

    assert len(waiting._order) < 100
    assert len(waiting._limits._heap) < 100
    for line_up in getattr(waiting, "_line_ups", {}).values():
        assert len(line_up._heap) < 100
    assert names(waiting.take(0).batch) == "a"


@KINDS
@pytest.mark.parametrize("key", ["x", "y"], ids=["in their lane", "in another lane"])
@pytest.mark.parametrize(
    ("level", "due", "timeout_s"),
    [
        pytest.param(LEVEL_2._replace(timeout_s=1.0), math.inf, 0.0, id="by its level"),
        pytest.param(
            LEVEL_2._replace(timeout_s=9.0, may_override=True), math.inf, 1.0, id="by its timeout"
        ),
        pytest.param(LEVEL_2, 1.0, 0.0, id="by its deadline"),
        pytest.param(LEVEL_2._replace(is_delayed=True), 1.0, 0.0, id="by its deadline, delayed"),
    ],
)
def test_whose_time_is_over_waits_no_longer_although_others_always_go_first(
    kind, key, level, due, timeout_s
):
    waiting = kind(BatchPolicy(1), BatchCost(), [LevelPolicy(), level])
    waiting.add(Caller("b", due, priority=2, key=key, timeout_s=timeout_s), 0.0)
    given_up = {}
    for now_s in (0.5, 1.0, 1.5, 2.0):
        for _ in range(2):
            waiting.add(Caller("a", priority=1), now_s)
        taken = waiting.take(now_s)
        assert names(taken.batch) == "a"
        given_up[now_s] = names(taken.dropped)

    assert given_up == {0.5: "", 1.0: "", 1.5: "b", 2.0: ""}
    assert waiting.add(Caller("c", priority=2), 2.0), "its level has room again"


@KINDS
def test_who_is_only_put_behind_the_others_of_his_level_is_kept(kind):
    level = LevelPolicy(timeout_s=1.0, is_delayed=True)
    waiting = kind(BatchPolicy(1), BatchCost(), [LevelPolicy(), level])
    waiting.add(Caller("b", priority=2), 0.0)
    waiting.add(Caller("a", priority=1), 5.0)

    assert [names(waiting.take(5.0).batch) for _ in range(2)] == ["a", "b"]


def test_whose_level_s_time_is_over_waits_no_longer_behind_earlier_deadlines():
    waiting = queue(Caller("p"), levels=[LevelPolicy(timeout_s=0.3)], size=1)
    for now_s, given_up in ((0.2, ""), (0.4, "p")):
        for _ in range(2):
            waiting.add(Caller("h", now_s + 0.5), now_s)
        taken = waiting.take(now_s)
        assert (names(taken.batch), names(taken.dropped)) == ("h", given_up)


@KINDS
def test_a_sweep_takes_out_whose_level_s_time_is_over(kind):
    levels = [LevelPolicy(timeout_s=1.0), LevelPolicy(timeout_s=1.0, is_delayed=True)]
    waiting = kind(BatchPolicy(1), BatchCost(), levels)
    for name, due, priority in (("a", math.inf, 1), ("b", 1.0, 2), ("c", math.inf, 2)):
        waiting.add(Caller(name, due, priority=priority), 0.0)

    assert names(waiting.sweep(0.9)) == ""
    assert sorted(names(waiting.sweep(1.1))) == ["a", "b"]
    assert (waiting.count, waiting.rows) == (1, 1)


@KINDS
def test_a_request_in_parts_whose_time_is_over_leaves_with_all_of_them(kind):
    levels = [LevelPolicy(), LevelPolicy(timeout_s=1.0)]
    waiting = kind(BatchPolicy(1), BatchCost(), levels)
    whole = split(*[Part("p", priority=2) for _ in range(3)])
    assert waiting.add_all(whole, 0.0)
    for _ in range(2):
        waiting.add(Caller("a", priority=1), 2.0)

    taken = waiting.take(2.0)

    assert (names(taken.batch), names(taken.dropped)) == ("a", "ppp")
    assert waiting.count == 1
