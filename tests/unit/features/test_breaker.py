"""When a failing server is tried, and when it is left alone."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.features.breaker import (
    FAILING_S,
    FAILURES,
    PATIENCE_S,
    PROBE_LIMIT_S,
    PROBE_PERIOD_S,
    Breaker,
    patience_of,
)


def opened(now_s=0.0):
    breaker = Breaker()
    for _ in range(FAILURES):
        breaker.failed(now_s)
    assert breaker.is_open
    return breaker


def test_it_opens_after_failures_in_a_row_and_not_before():
    breaker = Breaker()
    for _ in range(FAILURES - 1):
        breaker.failed(0.0)
    assert breaker.admits(0.0)
    breaker.failed(0.0)
    assert not breaker.admits(0.0)


def test_a_success_between_makes_them_no_row():
    breaker = Breaker()
    for _ in range(10 * FAILURES):
        breaker.failed(0.0)
        breaker.succeeded()
    assert breaker.admits(0.0)


def test_slow_failures_open_it_sooner():
    breaker = Breaker()
    breaker.failed(0.0)
    breaker.failed(FAILING_S)
    assert not breaker.admits(FAILING_S)


def test_one_failure_alone_never_opens_it():
    breaker = Breaker()
    breaker.failed(0.0)
    breaker.succeeded()
    breaker.failed(1000.0)
    assert breaker.admits(1000.0)


def test_it_lets_one_probe_through_at_a_time():
    breaker = opened()
    assert not breaker.admits(PROBE_PERIOD_S / 2)
    assert breaker.admits(PROBE_PERIOD_S)
    assert not breaker.admits(PROBE_PERIOD_S * 2)


def test_a_failed_probe_is_followed_by_another_a_period_later():
    breaker = opened()
    breaker.failed(2.0, breaker.admits(1.0))
    assert not breaker.admits(2.0 + PROBE_PERIOD_S / 2)
    assert breaker.admits(2.0 + PROBE_PERIOD_S)


def test_a_late_failure_of_before_lets_no_second_probe_out():
    breaker = Breaker()
    late = breaker.admits(0.0)
    for _ in range(FAILURES):
        breaker.failed(0.0, breaker.admits(0.0))
    probe = breaker.admits(1.0)
    assert probe
    breaker.failed(1.05, late)
    assert not breaker.admits(1.05 + PROBE_PERIOD_S)
    breaker.failed(2.0, probe)
    assert breaker.admits(2.0 + PROBE_PERIOD_S)


def test_a_probe_that_was_given_up_on_lets_no_more_than_one_other_out():
    breaker = opened()
    first = breaker.admits(1.0)
    second = breaker.admits(1.0 + PROBE_LIMIT_S)
    breaker.failed(1.1 + PROBE_LIMIT_S, first)
    assert not breaker.admits(2.0 + PROBE_LIMIT_S)
    breaker.failed(2.0 + PROBE_LIMIT_S, second)
    assert breaker.admits(2.0 + PROBE_LIMIT_S + PROBE_PERIOD_S)


def test_a_probe_that_says_nothing_of_the_server_is_followed_by_another():
    breaker = opened()
    breaker.left_open(1.1, breaker.admits(1.0))
    assert breaker.is_open
    assert breaker.admits(1.1 + PROBE_PERIOD_S)


def test_an_attempt_that_says_nothing_of_the_server_is_no_failure():
    breaker = Breaker()
    for _ in range(10 * FAILURES):
        breaker.left_open(0.0, breaker.admits(0.0))
    assert not breaker.is_open
    assert not breaker.is_failing


def test_a_probe_that_is_never_heard_of_does_not_keep_it_open():
    breaker = opened()
    assert breaker.admits(1.0)
    assert not breaker.admits(1.0 + PROBE_LIMIT_S / 2)
    assert breaker.admits(1.0 + PROBE_LIMIT_S)


def test_a_success_closes_it():
    breaker = opened()
    assert breaker.admits(1.0)
    breaker.succeeded()
    assert not breaker.is_open
    assert breaker.admits(1.0)


@pytest.mark.parametrize("outage_s", [0.5, 5.0, 50.0])
@given(st.lists(st.floats(0.001, 0.2), min_size=1, max_size=20))
def test_an_outage_costs_few_attempts_and_ends_within_a_period(outage_s, gaps_s):
    """However callers are spaced, whatever fails at once."""
    breaker, now_s, attempts = Breaker(), 0.0, 0
    callers = 0
    while now_s < outage_s:
        now_s += gaps_s[callers % len(gaps_s)]
        callers += 1
        if attempt := breaker.admits(now_s):
            attempts += 1
            breaker.failed(now_s, attempt)
    assert attempts <= FAILURES + outage_s / PROBE_PERIOD_S + 1
    back_s = now_s
    while not breaker.admits(now_s):
        now_s += 0.01
    breaker.succeeded()
    assert now_s <= back_s + PROBE_PERIOD_S + 0.01


@given(st.floats(0.0001, 60))
def test_an_attempt_that_had_all_its_time_and_was_not_answered_is_a_failure(timeout_s):
    assert patience_of(timeout_s) < timeout_s
    assert patience_of(timeout_s) <= PATIENCE_S
