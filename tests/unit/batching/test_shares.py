"""Whose turn it is, over many turns."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.batching.shares import Shares

QUANTA = st.integers(1, 8)


class Line:
    """Callers who wait, each for requests of rows of his own, served in turn."""

    def __init__(self, quantum, waiting, most=4_096):
        self.shares = Shares(quantum, most)
        self.waiting = {caller: list(rows) for caller, rows in waiting.items()}
        self.served = Counter()
        for caller, requests in waiting.items():
            for rows in requests:
                self.shares.came(caller, rows)

    def come(self, caller, rows):
        self.waiting.setdefault(caller, []).append(rows)
        self.shares.came(caller, rows)

    def serve(self):
        """Serve one request; return its caller."""
        callers = [caller for caller, requests in self.waiting.items() if requests]
        caller = min(callers, key=lambda caller: self.shares.find(caller).turn)
        rows, share = self.waiting[caller].pop(0), self.shares.find(caller)
        self.shares.spend(share, rows)
        self.shares.went(share, rows)
        self.served[caller] += rows
        return caller


def test_callers_of_equal_requests_take_turns_in_the_order_in_which_they_came():
    line = Line(1, {"a": [1] * 4, "b": [1] * 4, "c": [1] * 2})

    assert "".join(line.serve() for _ in range(10)) == "abcabcabab"


def test_a_larger_quantum_is_a_longer_turn():
    line = Line(3, {"a": [1] * 6, "b": [1] * 6})

    assert "".join(line.serve() for _ in range(12)) == "aaabbbaaabbb"


def test_who_took_more_than_his_turn_sits_out_until_the_others_had_as_much():
    line = Line(1, {"a": [5, 1], "b": [1] * 8})

    assert "".join(line.serve() for _ in range(8)) == "abbbbbab"


@given(QUANTA, st.lists(st.lists(st.integers(1, 20), min_size=30, max_size=30), min_size=2))
def test_those_who_wait_throughout_get_as_much_as_each_other(quantum, requests):
    line = Line(quantum, dict(enumerate(requests)))
    largest = max(map(max, requests))

    while all(line.waiting.values()):
        line.serve()
        assert max(line.served.values()) - min(line.served[c] for c in line.waiting) <= (
            quantum + largest
        )


@given(QUANTA, st.integers(1, 20))
def test_coming_and_going_gets_nobody_more_than_staying(quantum, rows):
    line = Line(quantum, {"stays": [1] * 1_000})
    for _ in range(500):
        if not line.waiting.get("comes and goes"):
            line.come("comes and goes", rows)
        line.serve()

    assert line.served["comes and goes"] <= line.served["stays"] + quantum + rows


def test_who_comes_anew_waits_for_one_turn_of_each_and_not_for_their_queues():
    line = Line(1, {"a": [1] * 100, "b": [1] * 100})
    for _ in range(50):
        line.serve()
    line.come("c", 1)

    assert "c" in {line.serve() for _ in range(3)}


def test_rows_taken_while_alone_are_hardly_held_against_anybody():
    line = Line(1, {"a": [1] * 1_000})
    for _ in range(500):
        line.serve()
    for _ in range(10):
        line.come("b", 1)

    assert Counter(line.serve() for _ in range(10))["a"] >= 4


@given(QUANTA, st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 9)), max_size=30))
def test_what_was_on_trial_can_be_undone(quantum, spendings):
    shares = Shares(quantum)
    for caller in "abc":
        shares.came(caller, 1)
    turns = {caller: shares.find(caller).turn for caller in "abc"}

    states = []
    for caller, rows in spendings:
        share = shares.find(caller)
        states.append((share, shares.state(share)))
        shares.spend(share, rows)
    for share, state in reversed(states):
        shares.restore(share, state)

    assert {caller: shares.find(caller).turn for caller in "abc"} == turns


@given(
    st.dictionaries(st.integers(0, 20), st.integers(1, 300), min_size=1),
    st.integers(0, 20),
    st.integers(1, 300),
)
def test_what_is_expected_to_go_before_is_never_too_little_and_not_twice_too_much(
    waiting, caller, rows
):
    shares = Shares()
    for other, own in waiting.items():
        shares.came(other, own)

    before = shares.rows_before(caller, rows)

    exact = sum(min(own, rows) for other, own in waiting.items() if other != caller)
    assert exact <= before <= 2 * exact


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 40)), max_size=40))
def test_rows_are_counted_out_as_they_were_counted_in(requests):
    shares = Shares()
    for caller, rows in requests:
        shares.came(caller, rows)
    for caller, rows in reversed(requests):
        shares.went(shares.find(caller), rows)

    assert (len(shares), shares.rows, shares.rows_before("x", 1_000)) == (0, 0, 0)


@pytest.mark.parametrize("rows", [1, 50])
def test_however_many_callers_come_and_go_few_are_remembered(rows):
    line = Line(1, {"stays": [1] * 3_000}, most=64)
    for number in range(2_000):
        line.come(number, rows)
        line.serve()
    while any(line.waiting.values()):
        line.serve()

    assert len(line.shares._owing) <= 64
    assert not line.shares._waiting
