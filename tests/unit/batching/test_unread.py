"""What a batcher says of a request of which only the deadline is known: never too much."""

import math
import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from headrace.batching.batcher import READ_OF_LATE, Batcher
from headrace.batching.policy import BatchPolicy, LevelPolicy
from headrace.errors import DeadlineExceeded, Overloaded

BATCH_S = 0.1
"""What a batch is known to take in these tests, about."""

ONE_LEVEL = (LevelPolicy(),)


class Caller:
    parts = ()

    def __init__(self, rows=1, *, due_in_s=math.inf, key="x", size=1, timeout_s=0.0, priority=0):
        self.rows, self.batch_key, self.byte_count = rows, key, size
        self.deadline_s = time.time() + due_in_s
        self.arrival_s = time.perf_counter()
        self.timeout_s, self.priority = timeout_s, priority
        self.place, self.has_left = None, False

    def expired(self, now_s):
        return self.has_left or self.deadline_s <= now_s

    def drop(self):
        pass


def make(size=4, *, room=1_000, levels=ONE_LEVEL, known=True, bytes_max=1 << 62):
    batcher = Batcher(
        BatchPolicy(size), max_queue_size=room, max_queue_bytes=bytes_max, levels=levels
    )
    for _ in range(20 if known else 0):
        batcher._cost.observe(size, BATCH_S)
    return batcher


def put(batcher, *callers):
    for caller in callers:
        batcher.put(caller)


def is_taken(batcher, caller):
    try:
        batcher.put(caller)
    except (Overloaded, DeadlineExceeded):
        return False
    return True


def busy(count, *, due_in_s=60.0, **options):
    """Make a batcher whose one executor has a batch and before which so many wait."""
    batcher = make(**options)
    put(batcher, Caller(4))
    batcher.take()
    put(batcher, *[Caller(due_in_s=due_in_s) for _ in range(count)])
    return batcher


def refusals(batcher, count, due_in_s=math.inf, size=1):
    """Look at so many calls; say how many were refused."""
    return sum(batcher.refuses(time.time() + due_in_s, size) is not None for _ in range(count))


def test_nobody_is_refused_unread_while_everybody_is_taken():
    batcher = busy(8, room=8)

    assert refusals(batcher, 100) == 0
    assert refusals(batcher, 100, due_in_s=0.01) == 0


def test_a_full_queue_refuses_unread_once_it_has_refused_and_counts_them():
    batcher = busy(500, room=500)
    assert not is_taken(batcher, Caller())

    assert refusals(batcher, 10) == 10

    assert batcher.refused_full == 11
    assert "already waiting" in str(batcher.refuses(math.inf))


def test_a_queue_full_of_bytes_refuses_unread_what_does_not_fit():
    batcher = busy(8, bytes_max=10)
    assert not is_taken(batcher, Caller(size=9))

    assert refusals(batcher, 1, size=3) == 1
    assert refusals(batcher, 1, size=2) == 0


def test_room_is_room_at_once():
    batcher = busy(500, room=500)
    assert not is_taken(batcher, Caller())
    batcher.take()

    assert refusals(batcher, 10) == 0
    assert is_taken(batcher, Caller())


@pytest.mark.parametrize("room", [1, 16, 100, 500])
def test_callers_who_have_left_make_room_as_soon_as_without_a_look(room):
    batcher = busy(0, room=room)
    leaving = [Caller() for _ in range(room)]
    put(batcher, *leaving)
    assert not is_taken(batcher, Caller())
    for caller in leaving:
        caller.has_left = True

    read = 0
    for _ in range(room):
        if batcher.refuses(math.inf) is None:
            read += 1
            if is_taken(batcher, Caller()):
                break

    assert read == 1
    assert batcher.refused_full <= max(1, room // 16) + 1


def test_it_looks_no_longer_when_batches_leave_without_a_refusal():
    batcher = busy(500, room=500)
    assert not is_taken(batcher, Caller())
    assert batcher.pressure

    batcher.take()
    batcher.take()

    assert not batcher.pressure


def test_who_would_be_too_late_is_refused_unread_but_for_one_in_so_many():
    batcher = busy(80)  # twenty batches: two seconds
    assert not is_taken(batcher, Caller(due_in_s=1.5))
    before = batcher.refused_late

    refused = refusals(batcher, 10 * READ_OF_LATE, due_in_s=1.5)

    assert refused == 10 * (READ_OF_LATE - 1)
    assert batcher.refused_late == before + refused
    assert refusals(batcher, 20, due_in_s=50) == 0
    assert refusals(batcher, 20) == 0


def test_a_timeout_that_was_named_once_keeps_all_others_from_being_judged_unread():
    batcher = busy(80)
    assert not is_taken(batcher, Caller(due_in_s=1.5))
    assert is_taken(batcher, Caller(due_in_s=1.5, timeout_s=0.45))  # it overtakes the others

    assert refusals(batcher, 50, due_in_s=1.5) == 0


def test_where_priorities_or_shapes_decide_nobody_is_judged_by_his_deadline():
    levels = busy(80, levels=(LevelPolicy(), LevelPolicy()))
    shapes = busy(80)
    put(shapes, Caller(key="y"))
    for batcher in (levels, shapes):
        assert not is_taken(batcher, Caller(due_in_s=1.5, priority=2))

        assert refusals(batcher, 50, due_in_s=1.5) == 0


def test_what_stops_or_has_passed_is_left_to_the_queue_to_say():
    batcher = busy(500, room=500)
    assert not is_taken(batcher, Caller())

    assert batcher.refuses(time.time() - 1) is None
    batcher.close()
    assert batcher.refuses(math.inf) is None


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["ask", "ask", "ask", "take", "leave"]),
        st.integers(1, 6),
        st.sampled_from([0.02, 0.11, 0.3, 0.8, 2.0, math.inf]),
        st.integers(1, 30),
    ),
    max_size=60,
)


@given(
    steps=STEPS,
    size=st.sampled_from([0, 1, 4, 16]),
    room=st.sampled_from([1, 5, 40]),
    bytes_max=st.sampled_from([60, 1_000]),
    levels=st.sampled_from([1, 2]),
    keys=st.sampled_from(["x", "xy"]),
)
@example(  # the last one finds the queue full, and room where somebody has left
    steps=[
        ("put", 1, 0.3, 28),
        ("put", 1, 0.11, 28),
        ("leave", 1, 0.0, 0),
        ("put", 1, 0.11, 5),
    ],
    size=0,
    room=40,
    bytes_max=60,
    levels=1,
    keys="x",
)
def test_nobody_is_refused_unread_who_would_have_been_taken(
    steps, size, room, bytes_max, levels, keys
):
    batcher = make(size or 1, room=room, bytes_max=bytes_max, levels=(LevelPolicy(),) * levels)
    waiting = []
    for what, rows, due_in_s, byte_count in steps:
        if what == "take":
            batch = batcher._queue.take(time.time()).batch  # `take` would wait for one that lives
            if batch:
                batcher._note_running(0, sum(caller.rows for caller in batch))
        elif what == "leave" and waiting:
            waiting.pop(rows % len(waiting)).has_left = True
        else:
            caller = Caller(
                min(rows, size or 1),
                due_in_s=due_in_s,
                key=keys[rows % len(keys)],
                size=byte_count,
                priority=rows % 3,
            )
            batcher.pressure = 2
            since, count = batcher._refused_since_sweep, len(batcher)
            error = batcher.refuses(caller.deadline_s)
            batcher._refused_since_sweep = since  # as if it had not looked
            if is_taken(batcher, caller):
                # Full of more bytes than it had told of, the queue let go of somebody who had left.
                has_made_room = len(batcher) <= count
                assert error is None or (has_made_room and "deadline" in str(error))
                waiting.append(caller)
