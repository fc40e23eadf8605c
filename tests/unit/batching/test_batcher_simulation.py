"""The batcher, split requests and the carrying of batches under a virtual clock: what always holds.

All of it is the real thing but for the clock, the threads and the model: a seed is a scenario, in
which arrivals, ends of batches and callers' leaving are events in simulated time. Executors take
turns in the test's own thread; one that would sleep leaves `take` instead, and goes on in it when
it is woken.
"""

import heapq
import itertools
import math
import random
import threading
from bisect import bisect_right
from queue import Empty
from types import SimpleNamespace

import numpy as np
import pytest
import structlog

from headrace import carrying
from headrace.batching import batcher as batcher_module
from headrace.batching.batcher import Batcher
from headrace.batching.codel import Codel
from headrace.batching.places import SPARE_PLACES
from headrace.batching.policy import BatchPolicy, LevelPolicy
from headrace.carrying import BatchCarrier
from headrace.errors import BackendError, ServingError
from headrace.request import Answering, Request
from headrace.split_request import SplitRequest
from headrace.tensors import CheckedInputs, Signature, TensorSpec

X, Y = TensorSpec("x", "INT64", (-1, 1)), TensorSpec("y", "INT64", (-1, 1))
ROWS_MAX = 40
ONE_COLUMN = ((1,),)
"""Of the two shapes in which callers send their rows."""


class Rests(Exception):
    """A simulated thread would sleep now."""

    def __init__(self, timeout_s):
        self.timeout_s = timeout_s


class Clock:
    """What the modules under test believe to be `time`, and which thread runs."""

    def __init__(self):
        self.now_s, self.thread, self.is_timing_out = 0.0, 0, False

    def time(self):
        return self.now_s

    perf_counter = time

    def get_ident(self):
        return self.thread

    def Lock(self):
        return threading.Lock()


class Tokens:
    """As `SimpleQueue`, for threads that do not sleep."""

    def __init__(self):
        self.count = 0

    def put(self, _):
        self.count += 1

    def get(self, timeout=None):
        if self.count:
            self.count -= 1
        elif CLOCK.is_timing_out:
            raise Empty
        else:
            raise Rests(timeout)


CLOCK = Clock()


@pytest.fixture(autouse=True)
def virtual(monkeypatch):
    monkeypatch.setattr(batcher_module, "time", CLOCK)
    monkeypatch.setattr(batcher_module, "threading", CLOCK)
    monkeypatch.setattr(batcher_module, "SimpleQueue", Tokens)
    monkeypatch.setattr(carrying, "time", CLOCK)
    with structlog.testing.capture_logs():
        yield


class Caller(Request):
    """Sends rows that nobody else sends, and keeps what it is told for `check_end`."""

    __slots__ = (
        "answers",
        "has_begun",
        "has_left",
        "is_poison",
        "limit_s",
        "number",
        "tell",
        "values",
    )

    def __init__(self, number, numbers, size, tell):
        rows = numbers.choice((1, 1, 1, 2, 4, size, ROWS_MAX if numbers.random() < 0.3 else 1))
        self.values = list(range(number * ROWS_MAX, number * ROWS_MAX + rows))
        self.is_poison = numbers.random() < 0.05
        if self.is_poison:
            self.values[numbers.randrange(rows)] = -1
        raw = np.array(self.values, np.int64).tobytes()
        patience_s = numbers.choice((math.inf, math.inf, 0.01, 0.05, 0.2))
        super().__init__(
            CheckedInputs(rows, (raw,), numbers.choice((ONE_COLUMN, ONE_COLUMN, ((1, 1),)))),
            CLOCK.now_s + patience_s * numbers.uniform(0.5, 1.5),
            CLOCK.now_s,
            rows,
        )
        self.number = number
        self.priority = numbers.choice((0, 0, 1, 2, 3))
        self.timeout_s = numbers.choice((0.0, 0.0, 0.0, 0.02))
        self.caller = numbers.choice("aaab")
        self.has_left = self.has_begun = False
        self.limit_s = math.inf
        self.answers, self.tell = [], tell

    def expired(self, now_s):
        return self.has_left or self.deadline_s <= now_s

    def answer(self, batch, start, prediction_id):
        self.answers.append(batch.outputs[0].rows(start, start + self.rows).ravel().tolist())
        self.tell(self)

    def fail(self, error):
        self.answers.append(error)
        self.tell(self)


class Model:
    """Returns what it is given; fails when a row is negative. Counts its runs."""

    inputs, outputs, is_remote = (X,), (Y,), False
    runs = 0

    def infer(self, inputs):
        self.runs += 1
        if (inputs["x"] < 0).any():
            raise BackendError("negative")
        return [inputs["x"]]


class Observer:
    """Of what would be metrics and records."""

    def __init__(self):
        self.take_numbers = lambda _count: 0

    def failed(self, count):
        pass

    def answered(self, batch, carried):
        pass


class World:
    """One scenario: `run` plays it to its end and checks what must always hold."""

    INTERVAL_S = 0.02

    def __init__(self, seed, *, is_fair=False, has_codel=False):
        self.numbers = numbers = random.Random(seed)
        self.size = numbers.choice((1, 4, 8))
        self.policy = BatchPolicy(self.size, numbers.choice((0.0, 0.0, 0.004, 0.04)))
        executors, self.overlapping = numbers.choice((1, 1, 2, 3)), numbers.choice((0, 0, 1, 2))
        self.executors = range(executors + self.overlapping)
        self.levels = [
            LevelPolicy(
                numbers.choice((0, 12)),
                numbers.choice((math.inf, 0.03)),
                is_delayed=numbers.random() < 0.5,
                may_override=numbers.random() < 0.5,
            )
            for _ in range(numbers.choice((1, 3)))
        ]
        CLOCK.now_s, CLOCK.thread, CLOCK.is_timing_out = 100.0, -1, False
        self.places, self.bytes = numbers.choice((8, 64, 1_000)), numbers.choice((80, 1_000))
        self.batcher = Batcher(
            self.policy,
            max_queue_size=self.places,
            max_queue_bytes=self.bytes,
            levels=self.levels,
            executors=executors,
            overlapping=self.overlapping,
            is_fair=is_fair,
            codel=Codel(numbers.choice((0.005, 0.03)), self.INTERVAL_S) if has_codel else None,
        )
        self.signature = Signature("m", [X], [Y], self.size, ROWS_MAX)
        self.model, observer = Model(), Observer()
        self.carrier = BatchCarrier(
            model=Answering("m", "1", self.signature),
            backend=self.model,
            metrics=observer,
            observer=observer,
            id_prefix="p",
            join=None,
            store=None,
            feature_timeout_s=1.0,
            max_feature_age_s=None,
            buckets=None,
        )
        self.true_cost = numbers.uniform(0.001, 0.03), numbers.uniform(0, 0.002)
        self.events, self.ties = [], itertools.count()
        self.resting = {}  # by executor: until when, at most
        self.idle_at_s = -math.inf
        self.callers = []
        self.shed_beside_idle = self.shed_begun = self.told_late = 0
        self.displaced = self.displaced_begun = 0
        # Where nothing but deadlines counts, whose time is over has his turn soon, if not next.
        self.has_limits = is_fair or self.levels != [LevelPolicy()]
        self.taken_s = []
        self.most_lanes = self.most_waiting = 0
        self.runs = 0

    def at(self, when_s, what, *about):
        heapq.heappush(self.events, (when_s, next(self.ties), what, about))

    def run(self, arrivals):
        when_s = CLOCK.now_s
        for executor in self.executors:
            self.go_on(executor)
        for number in range(arrivals):
            when_s += self.numbers.expovariate(1 / 0.004)
            self.at(when_s, self.arrive, number)
        while self.events:
            when_s, _, what, about = heapq.heappop(self.events)
            if len(self.resting) > self.overlapping:
                self.idle_at_s = when_s
            CLOCK.now_s = when_s
            what(*about)
            self.wake()
            self.check_idle()
            self.check_size()
        self.check_end(arrivals)

    def arrive(self, number):
        caller = Caller(number, self.numbers, self.size, self.told)
        self.callers.append(caller)
        before = self.waiting_before(caller)
        error = self.batcher.refuses(caller.deadline_s, caller.byte_count)
        if error is None:
            try:
                self.put(caller)
            except ServingError as refused:
                error = refused
        queue = self.batcher._queue
        self.most_waiting = max(self.most_waiting, len(self.batcher))
        self.most_lanes = max(self.most_lanes, len(queue._lanes))
        if "requests are already waiting" in str(error):
            parts = -(-caller.rows // self.size)
            byte_count = caller.byte_count if parts == 1 else caller.rows * 8
            assert len(before) + parts > self.places or sum(before) + byte_count > self.bytes, (
                "nobody is refused for the sake of a lower level"
            )
        if error is not None:
            caller.fail(error)
        elif self.numbers.random() < 0.2:
            when_s = CLOCK.now_s + self.numbers.expovariate(1 / 0.01)
            self.at(when_s, self.leave, caller, self.numbers.random() < 0.5)

    def waiting_before(self, caller):
        """Return the sizes of those who wait at a caller's level or higher, or have begun."""
        queue = self.batcher._queue
        level = queue.level_of(caller)
        return [
            request.byte_count
            for lane in queue._lanes.values()
            for own, *_, request in queue._entries(lane)
            if own <= level or self.callers[request.number].has_begun
        ]

    def limit_of(self, caller):
        """Return when the time of one is over that is put now."""
        limit_s, level = math.inf, self.levels[self.batcher._queue.level_of(caller) - 1]
        if not level.is_delayed:
            limit_s = level.timeout_s
            if caller.timeout_s:
                limit_s = min(limit_s, caller.timeout_s)
        return min(caller.deadline_s, CLOCK.now_s + limit_s)

    def put(self, caller):
        """Put it as `ServedModel` does."""
        caller.limit_s = self.limit_of(caller)
        if caller.rows <= self.size:
            self.batcher.put(caller)
            return
        self.batcher.judge(caller, -(-caller.rows // self.size))
        split = SplitRequest(caller, self.signature, self.batcher, caller.number, "p")
        try:
            self.batcher.put_all(split.parts)
        except ServingError:
            split.end()
            raise

    def leave(self, caller, is_noticed):
        """Notice that a caller has left, at once or when its turn comes."""
        caller.has_left = True
        if is_noticed:
            caller.leave()

    def told(self, caller):
        was_busy = CLOCK.now_s - self.idle_at_s >= self.INTERVAL_S - 1e-9
        self.shed_beside_idle += caller.is_shed and not was_busy
        self.displaced += caller.is_displaced
        self.displaced_begun += caller.is_displaced and caller.has_begun
        self.shed_begun += caller.is_shed and caller.has_begun
        if self.has_limits and not caller.has_begun:  # one that runs ends with its batch
            after = bisect_right(self.taken_s, caller.limit_s)
            self.told_late += any(taken_s < CLOCK.now_s for taken_s in self.taken_s[after:])

    def go_on(self, executor):
        """Let an executor take, as its thread would."""
        CLOCK.thread = executor
        self.batcher.overlaps = self.numbers.random() < 0.5
        try:
            batch = self.batcher.take()
        except Rests as rests:
            self.rest(executor, math.inf if rests.timeout_s is None else rests.timeout_s)
            return
        assert batch, "only a closed batcher hands out nothing"
        self.taken_s.append(CLOCK.now_s)
        self.check_batch(batch)
        rows = sum(request.rows for request in batch)
        fixed_s, per_row_s = self.true_cost
        took_s = (fixed_s + per_row_s * rows) * self.numbers.lognormvariate(0, 0.2)
        self.at(CLOCK.now_s + took_s, self.end, executor, batch, took_s)

    def rest(self, executor, timeout_s):
        self.resting[executor] = until_s = CLOCK.now_s + timeout_s
        if len(self.resting) > self.overlapping:
            self.idle_at_s = CLOCK.now_s
        if timeout_s < math.inf:
            assert 0 < timeout_s <= self.policy.max_queue_delay_s
            self.at(until_s + 1e-9, self.time_out, executor, until_s)

    def end(self, executor, batch, took_s):
        before = self.model.runs
        self.carrier.carry(batch)
        # The search for who made it fail takes its time too.
        self.at(CLOCK.now_s + took_s * (self.model.runs - before - 1), self.go_on, executor)

    def time_out(self, executor, until_s):
        if self.resting.get(executor) == until_s:
            self.resume(executor, is_timing_out=True)

    def wake(self):
        """Let those who rest go on, one for each token, whichever is the fastest."""
        while self.batcher._tokens.count:
            self.resume(self.numbers.choice(list(self.resting)))

    def resume(self, executor, *, is_timing_out=False):
        del self.resting[executor]
        CLOCK.is_timing_out = is_timing_out
        self.batcher._wait(None)
        CLOCK.is_timing_out = False
        self.go_on(executor)

    def check_batch(self, batch):
        self.runs += 1
        assert len({request.batch_key for request in batch}) == 1
        assert sum(request.rows for request in batch) <= self.size
        for request in batch:
            assert request.deadline_s > CLOCK.now_s, "nothing is run after its deadline"
            assert not request.expired(CLOCK.now_s), "no part is run after its whole has ended"
            self.callers[request.number].has_begun = True

    def check_idle(self):
        if not self.resting or not len(self.batcher):
            return
        queue = self.batcher._queue
        has_full = self.batcher.overlaps and queue.rows + queue.rows / queue.count > self.size
        if len(self.resting) <= self.overlapping and not has_full:
            return  # all but those who would carry a full batch beside others are busy
        delay_s = self.policy.max_queue_delay_s
        assert delay_s, "an idle executor beside what may leave"
        until_s = min(self.resting.values())
        assert until_s <= CLOCK.now_s + delay_s, "somebody wakes when a delay is over"
        for lane in self.batcher._queue._lanes.values():
            assert lane.rows < self.size, "an idle executor beside a full batch"

    def check_size(self):
        """Check that what the queue holds grows with those who wait, not with who has waited."""
        queue = self.batcher._queue
        assert len(self.batcher) <= self.places
        assert queue.byte_count <= self.bytes
        assert len(queue._order) <= 2 * self.most_lanes + SPARE_PLACES
        assert len(queue._limits._heap) <= 2 * self.most_waiting + SPARE_PLACES
        assert len(queue._limits._waiting) <= len(self.batcher)

    def check_end(self, arrivals):
        assert len(self.callers) == arrivals
        for caller in self.callers:
            assert len(caller.answers) == 1, "each caller gets exactly one answer"
            answer = caller.answers[0]
            assert isinstance(answer, ServingError) or answer == caller.values, "of its own rows"
            assert isinstance(answer, ServingError) or not caller.is_poison
            assert "internal" not in str(answer)
        assert not self.shed_begun, "nobody is shed of whom a part has run"
        assert not self.displaced_begun, "nobody makes room of whom a part has run"
        assert not self.told_late, "whose time is over is told when a batch is taken next"
        assert not self.shed_beside_idle, "nobody is shed where an executor had nothing to do"
        queue = self.batcher._queue
        assert queue.count == queue.rows == queue.byte_count == 0
        assert not queue._lanes
        assert not any(queue._counts)
        assert queue._room is None or queue._room.is_empty
        assert not self.batcher._untold
        assert not self.batcher._running
        assert self.batcher._idle == len(self.resting) == len(self.executors)
        assert queue._standing is None or not queue._standing._came
        if self.batcher._queue.is_impartial:
            return
        assert not queue._line_ups
        assert not queue._held
        assert not any(map(len, queue._shares.values()))


def play(seeds, arrivals, **kind):
    seen = SimpleNamespace(shed=0, displaced=0, whole=0, bisected=0, runs=0)
    for seed in seeds:
        world = World(seed, **kind)
        try:
            world.run(arrivals)
        except AssertionError as error:
            raise AssertionError(f"scenario {seed}: {error}") from error
        seen.shed += world.batcher.shed
        seen.displaced += world.displaced
        seen.bisected += world.model.runs > world.runs
        seen.whole += any(
            caller.rows > world.size and caller.answers == [caller.values]
            for caller in world.callers
        )
    assert (seen.shed > 0) == kind["has_codel"], "a law that never does anything was not tried"
    assert seen.displaced
    assert seen.bisected
    assert seen.whole


KINDS = pytest.mark.parametrize(
    "kind",
    [
        pytest.param({"is_fair": is_fair, "has_codel": has_codel}, id=f"{queue}{law}")
        for is_fair, queue in [(False, "plain"), (True, "fair")]
        for has_codel, law in [(False, ""), (True, " codel")]
    ],
)


@KINDS
def test_whatever_happens_each_caller_gets_one_answer_its_own_rows_and_nobody_idles(kind):
    play(range(1_000), 16, **kind)


@KINDS
def test_the_same_holds_over_long_runs(kind):
    play(range(10_000, 10_010), 500, **kind)


@pytest.mark.slow
@pytest.mark.timeout(1_200)
@KINDS
def test_the_same_holds_over_a_hundred_thousand_interleavings_of_all_kinds(kind):
    play(range(100_000, 125_000), 16, **kind)
