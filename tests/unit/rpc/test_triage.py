"""Whom an ingress that has fallen behind lets go of, and whom never."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.rpc.completion_queue.triage import (
    EXPIRED_SHARE,
    LAG_S,
    LIMIT_MAX_S,
    LIMIT_MIN_S,
    PERIOD_S,
    Triage,
)

FRESH_S = 0.1
LATE, SOON = 4 * LAG_S, LAG_S / 5


class Loop:
    """An ingress: some periods in which calls come, and their messages."""

    def __init__(self):
        self.triage = Triage()
        self.now_s = 100.0

    def go_on(self, periods, *, lag_s, lefts_s):
        """Return which share of the calls were let go of."""
        lefts_s = itertools.cycle(lefts_s)
        let_go = 0
        for _ in range(periods * 100):
            self.now_s += PERIOD_S / 100
            if self.triage.lets_go(next(lefts_s), self.now_s):
                let_go += 1
            else:
                self.triage.message_came(lag_s)
        return let_go / (periods * 100)


@pytest.fixture
def loop():
    return Loop()


def test_an_ingress_that_keeps_up_lets_nobody_go_but_those_whose_time_is_over(loop):
    assert loop.go_on(20, lag_s=SOON, lefts_s=[FRESH_S, 0.001]) == 0
    assert loop.go_on(20, lag_s=SOON, lefts_s=[FRESH_S, -0.001]) == 0.5
    assert loop.triage.limit_s == 0


def test_a_busy_loop_that_makes_nobody_late_lets_nobody_go(loop):
    assert loop.go_on(50, lag_s=LATE, lefts_s=[FRESH_S, 0.004]) == 0


def test_callers_without_any_time_cost_others_nothing_while_the_loop_keeps_up(loop):
    loop.go_on(50, lag_s=SOON, lefts_s=[-1.0, -1.0, -1.0, 0.004])

    assert not loop.triage.lets_go(0.004, loop.now_s)


def test_one_who_is_behind_lets_go_of_all_who_have_waited_for_most_of_their_time(loop):
    loop.go_on(8, lag_s=LATE, lefts_s=[-0.01, 0.02, 0.08])

    assert loop.triage.lets_go(0.9 * FRESH_S, loop.now_s)


def test_it_takes_everybody_again_as_soon_as_those_who_come_are_fresh(loop):
    loop.go_on(8, lag_s=LATE, lefts_s=[-0.01, 0.02, 0.08])
    loop.go_on(3, lag_s=LATE, lefts_s=[FRESH_S])

    assert loop.go_on(20, lag_s=LATE, lefts_s=[FRESH_S]) == 0


def test_in_the_end_nothing_is_left_of_it(loop):
    loop.go_on(30, lag_s=LATE, lefts_s=[-0.01, 0.02])
    loop.go_on(30, lag_s=SOON, lefts_s=[FRESH_S])

    assert loop.triage.limit_s == 0


def test_whoever_has_a_second_is_never_let_go_of(loop):
    loop.go_on(100, lag_s=LATE, lefts_s=[-0.01, 2.0])

    assert loop.triage.limit_s == LIMIT_MAX_S
    assert not loop.triage.lets_go(LIMIT_MAX_S, loop.now_s)


def test_a_few_who_are_late_are_no_sign(loop):
    few = [-0.01] + [FRESH_S] * round(1 / EXPIRED_SHARE)

    loop.go_on(50, lag_s=LATE, lefts_s=few)

    assert not loop.triage.lets_go(LIMIT_MIN_S, loop.now_s)


@given(
    st.lists(
        st.tuples(st.floats(0, 0.05), st.floats(-1, 10), st.floats(0, 0.02)),
        max_size=300,
    )
)
def test_whatever_comes_the_limit_stays_within_its_bounds(steps):
    triage, now_s = Triage(), 0.0
    for after_s, left_s, lag_s in steps:
        now_s += after_s
        let_go = triage.lets_go(left_s, now_s)
        assert 0 <= triage.limit_s <= LIMIT_MAX_S
        assert let_go == (left_s <= 0 or left_s < triage.limit_s)
        triage.message_came(lag_s)
