"""What a quota lets in, and what it remembers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.batching.quotas import Quotas

STEPS = st.lists(
    st.tuples(st.floats(0, 2), st.integers(1, 50), st.sampled_from(["serve", "serve", "refund"])),
    max_size=60,
)


def test_a_burst_is_let_in_at_once_and_then_one_row_at_the_rate():
    quotas = Quotas(rate_per_s=10, burst=3)
    waits_s = []
    for _ in range(5):
        waits_s.append(quotas.wait_s("a", 100.0))
        quotas.charge("a", 1, 100.0)

    assert waits_s == pytest.approx([0, 0, 0, 0.1, 0.2])
    assert waits_s[:3] == [0, 0, 0]
    assert quotas.wait_s("a", 100.3) == pytest.approx(0, abs=1e-9)


def test_a_request_larger_than_the_bucket_is_let_in_and_paid_for_afterwards():
    quotas = Quotas(rate_per_s=10, burst=3)

    assert quotas.wait_s("a", 0.0) == 0
    quotas.charge("a", 103, 0.0)

    assert quotas.wait_s("a", 0.0) == pytest.approx(10.1)


def test_one_callers_debts_are_no_others():
    quotas = Quotas(rate_per_s=1, burst=1)
    quotas.charge("a", 1_000, 0.0)

    assert quotas.wait_s("b", 0.0) == 0


def test_an_idle_caller_saves_no_more_than_a_burst():
    quotas = Quotas(rate_per_s=10, burst=3)
    quotas.charge("a", 1, 0.0)
    for _ in range(3):
        assert quotas.wait_s("a", 1e6) == 0
        quotas.charge("a", 1, 1e6)

    assert quotas.wait_s("a", 1e6) > 0


def test_what_is_refunded_may_be_asked_for_again():
    quotas = Quotas(rate_per_s=10, burst=3)
    quotas.charge("a", 3, 0.0)
    quotas.refund("a", 2)

    assert quotas.wait_s("a", 0.0) == 0


@given(STEPS, st.floats(0.5, 100), st.integers(1, 100))
def test_whatever_is_asked_the_rate_holds_but_for_a_burst_and_one_request(steps, rate, burst):
    quotas, now_s, served, largest = Quotas(rate, burst), 0.0, 0, 0
    for pause_s, rows, what in steps:
        now_s += pause_s
        if quotas.wait_s("a", now_s) == 0:
            quotas.charge("a", rows, now_s)
            if what == "refund":
                quotas.refund("a", rows)
            else:
                served, largest = served + rows, max(largest, rows)

    # But for what sums may be off by.
    assert served <= (burst + rate * (now_s + 1e-5) + largest) * (1 + 1e-9)


@given(STEPS, st.floats(0.5, 100), st.integers(1, 100))
def test_who_waits_as_long_as_he_is_told_is_let_in(steps, rate, burst):
    quotas, now_s = Quotas(rate, burst), 0.0
    for pause_s, rows, _ in steps:
        now_s += pause_s
        now_s += quotas.wait_s("a", now_s) + 1e-9
        assert quotas.wait_s("a", now_s) == 0
        quotas.charge("a", rows, now_s)


def test_however_many_callers_come_few_are_remembered_and_those_who_owe_most():
    quotas = Quotas(rate_per_s=1, burst=1, most=64)
    quotas.charge("owes", 10_000, 0.0)
    for number in range(5_000):
        quotas.charge(f"once {number}", 1, number / 1_000)

    assert len(quotas) <= 64
    assert quotas.wait_s("owes", 5.0) > 9_000


def test_forgetting_those_who_owe_nothing_changes_nothing():
    remembers, forgets = Quotas(10, 2, most=1_000), Quotas(10, 2, most=8)
    for number in range(200):
        caller, now_s = number % 50, number * 0.2  # each after ten seconds, long paid off
        assert forgets.wait_s(caller, now_s) == remembers.wait_s(caller, now_s)
        for quotas in (remembers, forgets):
            quotas.charge(caller, 2, now_s)
