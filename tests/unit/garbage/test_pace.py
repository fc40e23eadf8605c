"""Garbage is looked for in small pieces, and what is large waits until nobody else does."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.garbage.pace import (
    BUSY_FACTOR,
    BUSY_PERIOD_S,
    IDLE_PERIOD_S,
    RECENT_OBJECTS,
    WHOLE_OBJECTS,
    YOUNG_OBJECTS,
    YOUNG_PERIOD_S,
    Pace,
    Work,
)


def due(pace, *, now_s=0.0, young=0, is_idle=False, has_loaded=False):
    return pace.due(now_s=now_s, young=young, is_idle=is_idle, has_loaded=has_loaded)


def with_survivors(count, kept=0):
    pace = Pace(kept, 0.0)
    pace.done(Work.YOUNG, now_s=0.0, left=count)
    return pace


def with_set_aside(count, kept=0):
    pace = Pace(kept, 0.0)
    pace.done(Work.RECENT, now_s=0.0, left=count)
    return pace


@pytest.mark.parametrize("is_idle", [False, True])
@pytest.mark.parametrize(
    ("young", "now_s", "work"),
    [
        (0, 1e9, None),
        (YOUNG_OBJECTS - 1, 0.0, None),
        (YOUNG_OBJECTS, 0.0, Work.YOUNG),
        (1, YOUNG_PERIOD_S - 1, None),
        (1, YOUNG_PERIOD_S, Work.YOUNG),
        (RECENT_OBJECTS, 0.0, Work.RECENT),  # a burst; what is left of it goes the same way
    ],
)
def test_new_objects_are_looked_at_when_they_are_many_or_have_been_there_long(
    young, now_s, work, is_idle
):
    assert due(Pace(0, 0.0), young=young, now_s=now_s, is_idle=is_idle) is work


@pytest.mark.parametrize(
    ("survivors", "now_s", "is_idle", "work"),
    [
        (RECENT_OBJECTS - 1, 1.0, False, None),
        (RECENT_OBJECTS, 1.0, False, Work.RECENT),
        (1, IDLE_PERIOD_S, False, None),
        (1, IDLE_PERIOD_S, True, Work.RECENT),
        (1, BUSY_PERIOD_S, False, Work.RECENT),
        (0, BUSY_PERIOD_S, True, None),
    ],
)
def test_survivors_wait_for_an_idle_moment_and_not_for_ever(survivors, now_s, is_idle, work):
    assert due(with_survivors(survivors), now_s=now_s, is_idle=is_idle) is work


@pytest.mark.parametrize(
    ("set_aside", "kept", "is_idle", "work"),
    [
        (WHOLE_OBJECTS - 1, 0, True, None),
        (WHOLE_OBJECTS, 0, True, Work.WHOLE),
        (WHOLE_OBJECTS, 0, False, None),
        (WHOLE_OBJECTS * BUSY_FACTOR, 0, False, Work.WHOLE),
        (WHOLE_OBJECTS, 8 * WHOLE_OBJECTS, True, None),  # an eighth of all that is there
        (2 * WHOLE_OBJECTS, 8 * WHOLE_OBJECTS, True, Work.WHOLE),
    ],
)
def test_everything_is_looked_at_once_much_has_been_set_aside(set_aside, kept, is_idle, work):
    assert due(with_set_aside(set_aside, kept), is_idle=is_idle) is work


@pytest.mark.parametrize("is_idle", [False, True])
def test_a_loaded_model_is_set_aside_at_once(is_idle):
    assert due(Pace(0, 0.0), is_idle=is_idle, has_loaded=True) is Work.RECENT


def test_survivors_of_collections_of_the_interpreters_own_count_too():
    pace = with_survivors(RECENT_OBJECTS - 10)
    pace.survived(9)
    assert due(pace, now_s=1.0) is None
    pace.survived(1)
    assert due(pace, now_s=1.0) is Work.RECENT


def test_after_a_whole_look_counting_begins_anew():
    pace = with_set_aside(WHOLE_OBJECTS)
    pace.done(Work.WHOLE, now_s=1.0, left=7)
    assert due(pace, now_s=1.0, is_idle=True) is None
    assert (pace.kept, pace.set_aside, pace.survivors) == (7, 0, 0)


@given(
    st.lists(st.tuples(st.integers(0, 30_000), st.booleans(), st.booleans()), max_size=300),
    st.integers(0, 1_000_000),
)
def test_garbage_is_bounded_whatever_happens(looks, kept):
    """Everything that is made is garbage as late as can be: once it is where nobody looks soon."""
    pace, young = Pace(kept, 0.0), 0
    for number, (made, is_idle, has_loaded) in enumerate(looks):
        young += made
        now_s = number * 0.1
        work = due(pace, now_s=now_s, young=young, is_idle=is_idle, has_loaded=has_loaded)
        if work is not None:
            left = {
                Work.YOUNG: young,
                Work.RECENT: pace.survivors + young,
                Work.WHOLE: pace.kept,
            }[work]
            pace.done(work, now_s=now_s, left=left)
            young = 0
        assert young < YOUNG_OBJECTS
        assert pace.survivors < RECENT_OBJECTS
        # Beyond the bound by no more than one look at the recent ones can add.
        bound = BUSY_FACTOR * max(WHOLE_OBJECTS, pace.kept / 4)
        assert pace.set_aside < bound + RECENT_OBJECTS + 30_000
