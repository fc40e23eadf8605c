"""Room for higher priority levels, in a queue that lower ones have filled."""

import math
import time
from operator import attrgetter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from one_executor import Clock

from headrace.batching import batcher as batcher_module
from headrace.batching.batcher import Batcher
from headrace.batching.fair_queue import FREE_SHARE
from headrace.batching.policy import BatchPolicy, LevelPolicy
from headrace.batching.queued import QueuedRequest
from headrace.errors import InvalidRequest, Overloaded

TWO = (LevelPolicy(), LevelPolicy())

byte_count = attrgetter("byte_count")


class Caller(QueuedRequest):
    def __init__(self, priority, *, size=1, caller="", rows=1, parts=()):
        super().__init__(
            rows, "x", deadline_s=math.inf, arrival_s=time.perf_counter(), byte_count=size
        )
        self.priority, self.caller, self.error = priority, caller, None
        self._parts = parts

    @property
    def parts(self):
        return self._parts

    def expired(self, now_s):
        return False

    def fail(self, error):
        self.error = error


def make(room=4, *, levels=TWO, bytes_max=1 << 62, is_fair=False):
    return Batcher(
        BatchPolicy(4),
        max_queue_size=room,
        max_queue_bytes=bytes_max,
        levels=levels,
        default_level=len(levels),
        is_fair=is_fair,
    )


@pytest.fixture
def clock(monkeypatch):
    """What the batcher believes to be `time`."""
    clock = Clock(1_000.0)
    monkeypatch.setattr(batcher_module, "time", clock)
    return clock


def put(batcher, *callers):
    for caller in callers:
        batcher.put(caller)
    return callers


def many(count, priority, **more):
    return [Caller(priority, **more) for _ in range(count)]


def rest(batcher):
    """Take all who wait."""
    batcher.close()
    taken = []
    while (batch := batcher.take()) is not None:
        taken += batch
    return taken


@pytest.mark.parametrize("is_fair", [False, True])
def test_a_flood_of_a_lower_level_takes_no_room_from_a_higher_one(is_fair):
    batcher = make(100, is_fair=is_fair)
    for caller in many(200, 2):
        try:
            batcher.put(caller)
        except Overloaded:
            break

    urgent = put(batcher, *many(70, 1))

    assert len(batcher) <= 100
    assert rest(batcher)[:70] == list(urgent)


def test_who_came_last_of_the_lowest_level_makes_room_and_hears_that_it_is_overload():
    batcher = make(4, levels=TWO + TWO)
    low = put(batcher, Caller(3), Caller(4), Caller(4), Caller(2))
    put(batcher, Caller(1))

    assert [type(caller.error) for caller in low] == [type(None)] * 2 + [Overloaded, type(None)]
    assert "higher priority" in str(low[2].error)
    assert (batcher.dropped, batcher.shed) == (1, 0)

    put(batcher, Caller(1), Caller(1))

    assert [caller.error is None for caller in low] == [False, False, False, True]


def test_no_level_takes_room_from_itself_or_a_higher_one():
    batcher = make(4)
    high = put(batcher, *many(4, 1))

    for priority in (1, 2):
        with pytest.raises(Overloaded):
            batcher.put(Caller(priority))

    assert rest(batcher) == list(high)


def test_whoever_is_refused_for_another_reason_displaces_nobody():
    levels = (LevelPolicy(max_queue_size=1), LevelPolicy())
    batcher = make(4, levels=levels)
    put(batcher, Caller(1), *many(3, 2))

    with pytest.raises(Overloaded):
        batcher.put(Caller(1))

    assert len(rest(batcher)) == 4


def test_bytes_make_room_as_requests_do():
    batcher = make(100, bytes_max=10)
    low = put(batcher, *many(5, 2, size=2))
    put(batcher, Caller(1, size=3))

    assert [caller.error is None for caller in low] == [True, True, True, False, False]
    assert batcher._queue.byte_count == 9
    with pytest.raises(Overloaded):
        batcher.put(Caller(1, size=8))
    assert len(batcher) == 4, "what would not fit in any case displaces nobody"


def test_the_parts_of_a_request_make_room_together_and_are_given_it_together():
    batcher = make(6)
    whole = []
    whole += many(3, 2, parts=whole)
    batcher.judge(whole[0], 3)
    batcher.put_all(whole)
    single = put(batcher, *many(3, 2))
    urgent = many(4, 1)

    batcher.judge(Caller(1, size=4), 4)
    batcher.put_all(urgent)
    batcher.take()

    assert all(caller.error is not None for caller in single)
    assert all(part.error is not None for part in whole)


def test_parts_that_would_not_fit_anyhow_displace_nobody():
    batcher = make(6)
    put(batcher, Caller(1), *many(5, 2))

    with pytest.raises(Overloaded):
        batcher.judge(Caller(1), 6)
    with pytest.raises(Overloaded):
        batcher.put_all(many(6, 1))

    assert len(rest(batcher)) == 6


def test_nobody_is_refused_unread_while_the_highest_level_has_room():
    batcher = make(64)
    put(batcher, *many(64, 2))
    with pytest.raises(Overloaded):
        batcher.put(Caller(2))
    assert batcher.pressure

    assert [batcher.refuses(math.inf) for _ in range(10)] == [None] * 10

    put(batcher, *many(64, 1))
    unread = 0
    for _ in range(32):
        if batcher.refuses(math.inf) is not None:
            unread += 1
        else:
            with pytest.raises(Overloaded):
                batcher.put(Caller(1))
    assert unread > 16


class TestCallersTakeTurns:
    """As above, where each caller has a share of the queue."""

    def test_a_callers_own_lower_ones_make_room_first(self):
        batcher = make(100, is_fair=True)
        own, others = many(60, 2, caller="a"), many(20, 2, caller="b")
        put(batcher, *own, *others)
        put(batcher, *many(40, 1, caller="a"))

        assert sum(caller.error is not None for caller in own) == 36, "there was room for four"
        assert all(caller.error is None for caller in others)

    def test_there_is_always_room_for_one_more_caller_at_the_flooded_level(self):
        batcher = make(100, is_fair=True)
        for priority, caller in [(2, "a"), (1, "b")]:
            for one in many(100, priority, caller=caller):
                try:
                    batcher.put(one)
                except Overloaded:
                    break

        put(batcher, Caller(2, caller="c"))

    def test_a_caller_has_no_more_than_his_share_of_his_own_level(self):
        batcher = make(100, is_fair=True)
        with pytest.raises(Overloaded):
            put(batcher, *many(100, 1, caller="a"))

        assert len(batcher) == 80


def test_who_has_been_begun_makes_room_for_nobody():
    batcher = Batcher(BatchPolicy(1), max_queue_size=6, levels=TWO, default_level=2)
    whole = []
    whole += many(6, 2, parts=whole)
    batcher.put_all(whole)
    assert batcher.take() == whole[:1]

    put(batcher, Caller(1))
    with pytest.raises(Overloaded):
        batcher.put(Caller(1))

    assert all(part.error is None for part in whole)
    assert len(rest(batcher)) == 6
    assert batcher._queue._room.is_empty


def test_who_has_been_begun_and_was_put_behind_the_others_makes_room_for_nobody_either(clock):
    delayed = LevelPolicy(timeout_s=0.01, is_delayed=True)
    levels = (LevelPolicy(), delayed)
    batcher = Batcher(BatchPolicy(2), max_queue_size=4, levels=levels, default_level=2)
    whole = []
    whole += many(4, 2, parts=whole)
    batcher.put_all(whole)
    assert batcher.take() == whole[:2]
    clock.now_s += 0.02
    (first,) = put(batcher, Caller(1))
    assert batcher.take() == [first], "beside which there was room for a part whose time is over"

    put(batcher, *many(2, 1))
    with pytest.raises(Overloaded):
        batcher.put(Caller(1))

    assert all(part.error is None for part in whole)


def test_who_was_put_behind_the_others_counts_as_the_last_to_have_come(clock):
    delayed = LevelPolicy(timeout_s=0.01, is_delayed=True)
    batcher = make(3, levels=(LevelPolicy(), delayed))
    early = put(batcher, Caller(2))
    clock.now_s += 0.02
    late = put(batcher, *many(2, 2, rows=4))
    assert batcher.take() == list(late[:1])

    put(batcher, *many(2, 1))

    assert (early[0].error is None, late[1].error is None) == (False, True)


def test_who_makes_room_is_told_to_come_again_when_those_who_wait_have_been_run():
    batcher = make(8)
    put(batcher, Caller(2, rows=4))
    batcher.take()
    batcher._learn((time.perf_counter() - 1.0, 4, 0.0))  # a second for a batch
    low = put(batcher, *many(8, 2, rows=4))
    put(batcher, Caller(1))

    assert low[-1].error.retry_after_s > 1


@given(
    steps=st.lists(
        st.tuples(
            st.sampled_from(["put", "put", "put", "parts", "take", "leave"]),
            st.integers(1, 3),
            st.integers(1, 5),
            st.sampled_from("aab"),
        ),
        max_size=80,
    ),
    room=st.sampled_from([1, 4, 9]),
    bytes_max=st.sampled_from([6, 20, 1_000]),
    own_limit=st.sampled_from([0, 2]),
    is_fair=st.booleans(),
)
def test_a_higher_level_is_refused_only_when_it_has_filled_the_queue_itself(
    steps, room, bytes_max, own_limit, is_fair
):
    levels = (LevelPolicy(), LevelPolicy(max_queue_size=own_limit), LevelPolicy())
    batcher = make(room, levels=levels, bytes_max=bytes_max, is_fair=is_fair)
    waiting, begun = [], set()
    for what, level, size, name in steps:
        if what == "take" and waiting:
            for one in batcher.take():
                waiting.remove(one)
                begun.update(map(id, one.parts))
        elif what == "leave" and waiting:
            assert batcher.leave(waiting.pop(size % len(waiting)))
        elif what in ("put", "parts"):
            parts = []
            parts += many(1 if what == "put" else size, level, size=size, caller=name)
            if what == "parts":
                for part in parts:
                    part._parts = parts
            rank = [each for each in waiting if each.priority <= level or id(each) in begun]
            free, free_bytes = room - len(rank), bytes_max - sum(map(byte_count, rank))
            of_level = [each for each in waiting if each.priority == level]
            own = [each for each in rank if each.caller == name]
            own_of_level = [each for each in of_level if each.caller == name]
            is_judged = False
            try:
                if what == "put":
                    batcher.put(parts[0])
                else:
                    batcher.judge(Caller(level, size=size * len(parts), caller=name), len(parts))
                    is_judged = True
                    batcher.put_all(parts)
            except (Overloaded, InvalidRequest):
                assert not is_judged
                assert all(other.error is None for other in waiting)
                assert (
                    len(parts) > free
                    or size * len(parts) > free_bytes
                    or (level == 2 and own_limit and len(of_level) + len(parts) > own_limit)
                    or (is_fair and len(own) >= FREE_SHARE * free)
                    or (is_fair and sum(map(byte_count, own)) > FREE_SHARE * free_bytes)
                    or (
                        is_fair
                        and level == 2
                        and own_limit
                        and len(own_of_level) >= FREE_SHARE * (own_limit - len(of_level))
                    )
                )
            else:
                waiting += parts
                batcher._tell(1_000)
                gone = [other for other in waiting if other.error is not None]
                assert all(other.priority > level for other in gone)
                waiting = [other for other in waiting if other.error is None]
        assert len(batcher) == len(waiting) <= room
        assert batcher._queue.byte_count == sum(one.byte_count for one in waiting) <= bytes_max
    assert sorted(map(id, rest(batcher))) == sorted(map(id, waiting))
    assert batcher._queue._room.is_empty
