"""Queue, policy and admission under a virtual clock: invariants over random interleavings.

Nothing here waits: arrivals, executors' ends and callers' leaving are events in simulated time, so
that a seed is a scenario, and a failing one can be run again.
"""

import heapq
import math
import random
from collections import Counter

import pytest

from headrace.batching.codel import Codel
from headrace.batching.cost import BatchCost
from headrace.batching.fair_queue import FairQueue
from headrace.batching.places import SPARE_PLACES
from headrace.batching.policy import BatchPolicy, LevelPolicy
from headrace.batching.queue import RequestQueue

QUEUES = pytest.mark.parametrize("kind", [RequestQueue, FairQueue], ids=["plain", "fair"])
CODEL = pytest.mark.parametrize("has_codel", [False, True], ids=["", "codel"])

LINES_MAX = 2 * 2 * 3
"""Of one shape: two callers, each with requests in turn and delayed, on three levels."""


class LimitedFairQueue(FairQueue):
    """As the batcher makes it."""

    def __init__(self, *args):
        super().__init__(*args, max_queue_size=32, max_queue_bytes=64)


class Caller:
    parts = ()

    def __init__(self, number, now_s, numbers):
        self.number = number
        self.rows = numbers.choice((1, 1, 1, 2, 4))
        self.byte_count = self.rows
        self.arrival_s = now_s
        patience = numbers.choice((math.inf, 0.01, 0.05, 0.2))
        self.deadline_s = now_s + patience * numbers.uniform(0.5, 1.5)
        self.priority = numbers.choice((0, 0, 1, 2, 3))
        self.timeout_s = numbers.choice((0.0, 0.0, 0.02))
        self.caller = numbers.choice("aaab")
        self.is_shed = False
        self.batch_key = numbers.choice("xxy")
        self.place = None
        self.has_left = False

    def expired(self, now_s):
        return self.has_left or self.deadline_s <= now_s


class World:
    """One scenario: `run` plays it to its end and checks what must always hold."""

    def __init__(self, seed, kind=RequestQueue, *, has_codel=False):
        self.numbers = numbers = random.Random(seed)
        self.size = numbers.choice((1, 4, 8))
        self.policy = BatchPolicy(self.size, numbers.choice((0.0, 0.0, 0.005)))
        self.executors = numbers.choice((1, 1, 2, 3))
        self.levels = [
            LevelPolicy(
                numbers.choice((0, 3)),
                numbers.choice((math.inf, 0.03)),
                is_delayed=numbers.random() < 0.5,
                may_override=numbers.random() < 0.5,
            )
            for _ in range(numbers.choice((1, 3)))
        ]
        # Where nothing but deadlines counts, whose time is over has his turn soon, if not next.
        self.is_plain = self.levels == [LevelPolicy()] and kind is RequestQueue
        self.cost = BatchCost()
        codel = Codel(numbers.choice((0.005, 0.03)), 0.02) if has_codel else None
        self.queue = kind(self.policy, self.cost, self.levels, 1, self.executors, codel)
        self.true_cost = numbers.uniform(0.001, 0.03), numbers.uniform(0, 0.004)
        self.now_s, self.events, self.ties = 100.0, [], 0
        self.busy = 0
        self.ends_s = []
        self.wake_s = math.inf
        self.answers = Counter()
        self.waiting = set()
        self.most_lanes = self.most_waiting = 0

    def at(self, when_s, what, *about):
        self.ties += 1
        heapq.heappush(self.events, (when_s, self.ties, what, about))

    def run(self, arrivals):
        numbers, when_s = self.numbers, self.now_s
        for number in range(arrivals):
            when_s += numbers.expovariate(1 / 0.004)
            self.at(when_s, self.arrive, number)
        while self.events:
            self.now_s, _, what, about = heapq.heappop(self.events)
            what(*about)
            self.dispatch()
            self.check_size()
        assert self.answers == Counter(range(arrivals)), "each caller gets exactly one answer"
        assert not self.waiting
        assert self.queue.count == self.queue.rows == self.queue.byte_count == 0
        assert not self.queue._lanes
        assert not any(self.queue._counts)
        assert not self.queue._limits._waiting
        if isinstance(self.queue, FairQueue):
            assert not self.queue._line_ups
            assert not self.queue._held
            assert not any(map(len, self.queue._shares.values()))

    def arrive(self, number):
        caller = Caller(number, self.now_s, self.numbers)
        deadline_s = caller.deadline_s
        self.queue.bind(caller, self.now_s)
        free_in_s = 0.0
        if self.busy == self.executors:
            free_in_s = max(0.0, min(self.ends_s) - self.now_s)
        finish_s = self.queue.finish_s(caller, self.now_s, free_in_s)
        assert finish_s >= self.now_s
        if not caller.timeout_s:
            soonest_s = self.queue.soonest_s(deadline_s, self.now_s, free_in_s)
            assert soonest_s <= finish_s + 1e-9, "nobody is refused unread who would be taken"
        if finish_s > caller.deadline_s or not self.queue.add(caller, self.now_s):
            self.answers[number] += 1
            return
        self.waiting.add(caller)
        self.most_waiting = max(self.most_waiting, len(self.waiting))
        self.most_lanes = max(self.most_lanes, len(self.queue._lanes))
        caller.limit_s = self.limit_s(caller)
        if self.numbers.random() < 0.2:
            self.at(self.now_s + self.numbers.expovariate(1 / 0.01), self.leave, caller)

    def limit_s(self, caller):
        """Return when its time is over; it has just been added."""
        level = self.levels[self.queue.level_of(caller) - 1]
        if level.is_delayed:
            return caller.deadline_s
        timeout_s = level.timeout_s
        if caller.timeout_s and level.may_override:
            timeout_s = min(timeout_s, caller.timeout_s)
        return min(caller.deadline_s, self.now_s + timeout_s)

    def leave(self, caller):
        """Notice that a caller has left, at once or when its turn comes."""
        caller.has_left = True
        if self.numbers.random() < 0.5 and self.queue.remove(caller):
            self.answers[caller.number] += 1
            self.waiting.discard(caller)

    def dispatch(self):
        while self.busy < self.executors:
            taken = self.queue.take(self.now_s, self.now_s)
            for caller in taken.dropped:
                self.answers[caller.number] += 1
                self.waiting.remove(caller)
            for caller in () if self.is_plain else self.waiting - set(taken.batch):
                assert caller.limit_s >= self.now_s, "nobody waits on whose time was over"
            if not taken.batch:
                if self.queue.count:
                    assert taken.wait_s is not None, "an idle executor beside what may leave"
                    assert 0 < taken.wait_s <= self.policy.max_queue_delay_s
                    self.at(self.now_s + taken.wait_s + 1e-9, lambda: None)
                return
            self.begin(taken.batch)

    def check_size(self):
        """Check that what the queue holds grows with those who wait, not with who has waited."""
        queue = self.queue
        assert len(queue._order) <= 2 * self.most_lanes + SPARE_PLACES
        assert len(queue._limits._heap) <= 2 * self.most_waiting + SPARE_PLACES
        assert len(queue._limits._waiting) <= len(self.waiting)
        if isinstance(queue, FairQueue):
            for line_up in queue._line_ups.values():
                assert len(line_up._heap) <= 2 * LINES_MAX + SPARE_PLACES

    def begin(self, batch):
        rows = sum(caller.rows for caller in batch)
        assert len({caller.batch_key for caller in batch}) == 1
        assert rows <= self.size or len(batch) == 1
        for caller in batch:
            assert caller.deadline_s > self.now_s, "nothing is run after its deadline"
            assert not caller.has_left
            self.waiting.remove(caller)
        fixed_s, per_row_s = self.true_cost
        took_s = (fixed_s + per_row_s * rows) * self.numbers.lognormvariate(0, 0.2)
        self.busy += 1
        expected_s = self.now_s + self.cost.estimate_s(rows)
        self.ends_s.append(expected_s)
        self.at(self.now_s + took_s, self.end, batch, rows, took_s, expected_s)

    def end(self, batch, rows, took_s, expected_s):
        self.busy -= 1
        self.ends_s.remove(expected_s)
        self.cost.observe(rows, took_s)
        for caller in batch:  # with its rows, or with the error of the batch
            self.answers[caller.number] += 1


def play(kind, has_codel, seeds, arrivals=12):
    shed = 0
    for seed in seeds:
        world = World(seed, kind, has_codel=has_codel)
        try:
            world.run(arrivals)
        except AssertionError as error:
            raise AssertionError(f"scenario {seed}: {error}") from error
        shed += world.queue.shed
    assert (shed > 0) == has_codel, "a law that never does anything was not tried"


@CODEL
@QUEUES
def test_whatever_happens_each_caller_is_answered_once_in_time_and_nobody_idles(kind, has_codel):
    play(kind, has_codel, range(3_000))


@CODEL
@QUEUES
def test_the_same_holds_over_long_runs(kind, has_codel):
    play(kind, has_codel, range(10_000, 10_020), arrivals=1_000)


def test_the_same_holds_where_each_caller_may_take_up_only_a_part_of_the_queue():
    play(LimitedFairQueue, False, range(1_000), arrivals=60)


@pytest.mark.slow
@pytest.mark.timeout(600)
@CODEL
@QUEUES
def test_the_same_holds_over_a_hundred_thousand_interleavings(kind, has_codel):
    play(kind, has_codel, range(100_000, 200_000))


def goodput(load, fixed_s, per_row_s, size, slo_s):
    """Return answers in time, as a share of what full batches could have answered."""
    numbers, cost = random.Random(3), BatchCost()
    waiting = RequestQueue(BatchPolicy(size), cost)
    peak_per_s = size / (fixed_s + per_row_s * size)
    end_s = min(5.0, 25_000 / (load * peak_per_s))
    now_s = free_s = expected_s = 0.0
    good = 0
    running = []

    def finish():
        nonlocal good, running
        good += sum(caller.deadline_s >= free_s for caller in running)
        cost.observe(len(running), free_s - began_s)
        running = []

    while now_s < end_s:
        now_s += numbers.expovariate(load * peak_per_s)
        while (running and free_s <= now_s) or (not running and waiting.count):
            at_s = free_s if running else now_s
            if running:
                finish()
            batch = waiting.take(at_s).batch
            if batch:
                running, began_s = batch, at_s
                expected_s = at_s + cost.estimate_s(len(batch))
                took_s = fixed_s + per_row_s * len(batch)
                free_s = at_s + took_s * numbers.lognormvariate(0, 0.1)
        caller = Caller(0, now_s, numbers)
        caller.rows, caller.batch_key, caller.priority, caller.timeout_s = 1, "x", 0, 0.0
        caller.deadline_s = now_s + slo_s
        free_in_s = max(0.0, expected_s - now_s) if running else 0.0
        if waiting.finish_s(caller, now_s, free_in_s) <= caller.deadline_s:
            waiting.add(caller, now_s)
    return good / (peak_per_s * end_s)


@pytest.mark.parametrize("load", [1.3, 2.0, 5.0])
@pytest.mark.parametrize(
    "model",
    [
        pytest.param((0.01, 0.0005, 32, 0.1), id="large fixed cost"),
        pytest.param((0.002, 0.0007, 16, 0.03), id="cost by the row"),
        pytest.param((0.002, 0.0001, 64, 0.03), id="as a GPU"),
    ],
)
def test_under_overload_what_is_answered_in_time_stays_at_the_peak(load, model):
    assert goodput(load, *model) >= 0.95
