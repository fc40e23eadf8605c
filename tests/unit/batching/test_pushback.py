"""When those who are refused are told to come again."""

import math
import time

import pytest

from headrace.batching.batcher import Batcher
from headrace.batching.policy import BatchPolicy, LevelPolicy
from headrace.batching.pushback import RETRY_STEPS_S, UNKNOWN_S, retry_step_s
from headrace.batching.queued import QueuedRequest
from headrace.errors import Overloaded


@pytest.mark.parametrize(
    ("wait_s", "step_s"), [(0.0, UNKNOWN_S), (0.001, 0.025), (0.05, 0.05), (0.051, 0.1), (99, 6.4)]
)
def test_it_is_the_next_step_after_what_waits_has_been_run(wait_s, step_s):
    assert retry_step_s(wait_s) == step_s
    assert step_s in RETRY_STEPS_S


ONE_LEVEL = (LevelPolicy(),)


class Caller(QueuedRequest):
    def __init__(self, *, due_in_s=math.inf, priority=0):
        super().__init__(
            *(1, "x"),
            deadline_s=time.time() + due_in_s,
            arrival_s=time.perf_counter(),
            byte_count=1,
        )
        self.priority = priority

    def expired(self, now_s):
        return self.deadline_s <= now_s

    def fail(self, error):
        pass


def refusal(batcher, **more):
    with pytest.raises(Overloaded) as refused:
        batcher.put(Caller(**more))
    return refused.value


def full(room, *, batch_s=0.1, executors=1, levels=ONE_LEVEL):
    """Make one that is full, whose batches of 4 take so long."""
    batcher = Batcher(BatchPolicy(4), max_queue_size=room, executors=executors, levels=levels)
    for _ in range(20 if batch_s else 0):
        batcher._cost.observe(4, batch_s)
    for _ in range(room):
        batcher.put(Caller())
    return batcher


@pytest.mark.parametrize(
    ("room", "more", "after_s"),
    [
        (64, {"batch_s": 0.001}, 0.025),
        (64, {}, 3.2),
        (64, {"executors": 4}, 0.8),
        (1_000, {}, 6.4),
        (64, {"batch_s": 0}, UNKNOWN_S),
    ],
)
def test_who_finds_the_queue_full_is_told_how_long_that_takes(room, more, after_s):
    batcher = full(room, **more)

    assert refusal(batcher).retry_after_s == after_s
    assert batcher.refuses(math.inf).retry_after_s == after_s


def test_so_is_who_would_be_too_late():
    batcher = full(100)

    batcher._max_queue_size += 100

    assert refusal(batcher, due_in_s=1.5).retry_after_s == 3.2


def test_when_the_queue_has_shrunk_it_is_said_with_the_next_batch():
    batcher = full(40)
    assert refusal(batcher).retry_after_s == 1.6

    for _ in range(30):
        batcher.leave(batcher._queue._lanes["x"].entries[-1][-1])
    batcher.take()
    batcher._max_queue_size = 0

    assert refusal(batcher).retry_after_s == 0.2


def test_who_finds_his_level_full_lets_others_be_looked_at_unread():
    batcher = full(2, levels=(LevelPolicy(max_queue_size=2),))
    batcher._max_queue_size = 100

    refusal(batcher)

    assert (batcher.refused_full, batcher.pressure > 0) == (1, True)
