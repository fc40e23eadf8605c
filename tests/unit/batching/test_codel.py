"""When a queue stands, and whom that costs his place."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.batching.codel import Codel
from headrace.batching.standing import Standing


def limits(waits, target_s=0.05, interval_s=0.1):
    """Tell the law of waits at times; return how long may be waited from then on."""
    law = Codel(target_s, interval_s)
    return [law.limit_s(now_s, wait_s) for now_s, wait_s in waits]


@pytest.mark.parametrize(
    ("waits", "expected"),
    [
        pytest.param([(0.0, 9.0)], math.inf, id="one long wait is a burst"),
        pytest.param([(0.0, 0.06), (0.09, 0.06)], math.inf, id="not for an interval yet"),
        pytest.param([(0.0, 0.06), (0.1, 0.06)], 0.05, id="for an interval"),
        pytest.param([(0.0, 0.04), (0.1, 0.06)], math.inf, id="since the last time only"),
        pytest.param([(0.0, 0.06), (0.1, 0.06), (0.2, 0.04)], math.inf, id="it is over"),
        pytest.param([(0.0, 0.06), (0.05, 0.0), (0.1, 0.06)], math.inf, id="emptied once"),
        pytest.param([(5.0, 0.06), (1.0, 0.06), (1.1, 0.06)], 0.05, id="a clock set back"),
    ],
)
def test_a_queue_stands_when_the_oldest_has_waited_too_long_for_an_interval(waits, expected):
    assert limits(waits)[-1] == expected


@given(st.lists(st.tuples(st.floats(0, 0.2), st.floats(0, 0.2)), max_size=50))
def test_nobody_is_given_up_while_the_oldest_was_served_in_time_within_the_interval(steps):
    now_s, waits = 0.0, []
    for pause_s, wait_s in steps:
        now_s += pause_s
        waits.append((now_s, wait_s))

    for i, limit_s in enumerate(limits(waits)):
        since_s = waits[i][0] - 0.1
        recent = [wait_s for at_s, wait_s in waits[: i + 1] if at_s > since_s]
        if min(recent) < 0.05:
            assert limit_s == math.inf
        else:
            assert limit_s >= 0.05


def test_the_oldest_are_given_up_until_nobody_has_waited_too_long():
    standing = Standing(Codel(0.05, 0.1))
    for number in range(10):
        standing.came(number, f"{number}", number * 0.01)
    given_up = []

    assert list(standing.overdue(0.06, stays=True)) == []
    standing.came(10, "10", 0.12)
    for one in standing.overdue(0.16, stays=True):
        standing.left(int(one))
        given_up.append(one)

    assert given_up == list("0123456789")


def test_who_has_left_is_no_longer_the_oldest():
    standing = Standing(Codel(0.05, 0.1))
    standing.came(1, "old", 0.0)
    standing.came(2, "new", 0.1)
    list(standing.overdue(0.06, stays=True))
    standing.left(1)

    assert list(standing.overdue(0.12, stays=True)) == []  # and the queue does not stand
    assert list(standing.overdue(0.2, stays=True)) == []


def test_a_queue_that_is_emptied_each_time_does_not_stand_however_long_was_waited():
    standing = Standing(Codel(0.05, 0.1))
    standing.came(1, "old", 0.0)

    assert [list(standing.overdue(now_s, stays=False)) for now_s in (1.0, 2.0, 3.0)] == [[]] * 3
