"""Batches that begin beside others: full ones only, as long as they wait for something else."""

import math
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from headrace.batching.batcher import Batcher
from headrace.batching.policy import BatchPolicy
from headrace.errors import Overloaded


def caller(name, rows=1, deadline_s=math.inf):
    return SimpleNamespace(
        name=name,
        rows=rows,
        batch_key="shape",
        byte_count=1,
        parts=(),
        arrival_s=time.perf_counter(),
        deadline_s=deadline_s,
        priority=0,
        timeout_s=0.0,
        place=None,
        expired=lambda now_s: deadline_s <= now_s,
    )


def names(batch):
    return [request.name for request in batch]


def make(overlapping=1):
    batcher = Batcher(BatchPolicy(4), max_queue_size=100, overlapping=overlapping)
    batcher.overlaps = True
    return batcher


def rests(batcher):
    """Wait until somebody who would take has looked, found nothing for himself, and sleeps."""
    deadline_s = time.monotonic() + 5
    while not batcher._idle:
        assert time.monotonic() < deadline_s, "nobody rests"
        time.sleep(0.001)


def put(batcher, *requests):
    for request in requests:
        batcher.put(request)


@pytest.fixture
def first():
    with ThreadPoolExecutor(1) as thread:
        yield thread


@pytest.fixture
def second():
    with ThreadPoolExecutor(1) as thread:
        yield thread


def test_a_full_batch_begins_beside_another(first, second):
    batcher = make()
    put(batcher, *map(caller, "abcdefgh"))

    assert names(first.submit(batcher.take).result(5)) == list("abcd")
    assert names(second.submit(batcher.take).result(5)) == list("efgh")


def test_a_batch_that_could_grow_waits_until_it_is_full(first, second):
    batcher = make()
    put(batcher, *map(caller, "abcdefg"))
    first.submit(batcher.take).result(5)
    beside = second.submit(batcher.take)
    rests(batcher)
    assert not beside.done()

    put(batcher, caller("h"))

    assert names(beside.result(5)) == list("efgh")


def test_a_batch_is_full_when_another_request_like_its_own_would_not_fit(first, second):
    batcher = make()
    put(batcher, caller("a", 3), caller("b", 3))

    assert names(first.submit(batcher.take).result(5)) == ["a"]
    assert names(second.submit(batcher.take).result(5)) == ["b"]


def test_whoever_is_free_takes_what_could_grow(first, second):
    batcher = make()
    put(batcher, *map(caller, "abcdef"))
    assert names(first.submit(batcher.take).result(5)) == list("abcd")
    beside = second.submit(batcher.take)

    assert names(first.submit(batcher.take).result(5)) == list("ef")
    put(batcher, *map(caller, "ghij"))
    assert names(beside.result(5)) == list("ghij")


def test_no_batch_begins_beside_one_that_keeps_the_processor_busy(first, second):
    batcher = make()
    batcher.overlaps = False
    put(batcher, *map(caller, "abcdefgh"))
    first.submit(batcher.take).result(5)
    beside = second.submit(batcher.take)
    rests(batcher)

    assert not beside.done()
    assert names(first.submit(batcher.take).result(5)) == list("efgh")
    batcher.close()
    assert beside.result(5) is None


def test_no_more_begin_beside_than_there_are_to_be(first, second):
    batcher = make(overlapping=0)
    put(batcher, *map(caller, "abcdefgh"))
    first.submit(batcher.take).result(5)
    beside = second.submit(batcher.take)
    rests(batcher)

    assert not beside.done()
    batcher.close()
    assert names(beside.result(5)) == list("efgh")


def test_closing_hands_out_what_could_have_grown_to_all(first, second):
    batcher = make()
    put(batcher, *map(caller, "abcde"))
    first.submit(batcher.take).result(5)
    beside = second.submit(batcher.take)

    batcher.close()

    assert names(beside.result(5)) == ["e"]
    assert first.submit(batcher.take).result(5) is None


@pytest.mark.parametrize("overlaps", [False, True])
def test_what_waits_is_expected_to_be_over_sooner_if_batches_overlap(overlaps, first):
    batcher = make()
    batcher.overlaps = overlaps
    for _ in range(4):  # a full batch takes 0.05 s; the last one is under way
        put(batcher, *map(caller, "abcd"))
        time.sleep(0.05)
        first.submit(batcher.take).result(5)
    put(batcher, *map(caller, range(96)))  # 1.2 s of work, if one batch follows the other

    hurried = caller("hurried", deadline_s=time.time() + 1.1)

    if overlaps:
        batcher.put(hurried)
    else:
        with pytest.raises(Overloaded):
            batcher.put(hurried)
