"""Whose time is over, and what is kept of those whose is not."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.batching.limits import Limits

TIMES = st.integers(0, 20)


@given(
    steps=st.lists(
        st.one_of(
            st.tuples(st.just("came"), TIMES),
            st.tuples(st.just("left"), st.integers(0, 30)),
            st.tuples(st.just("over"), TIMES),
        )
    )
)
def test_each_is_named_once_when_its_time_is_over_unless_it_left(steps):
    limits, waiting = Limits(), {}
    for number, (what, given_) in enumerate(steps):
        if what == "came":
            limits.came(number, given_, f"n{number}")
            waiting[number] = given_
        elif what == "left":
            limits.left([given_])
            waiting.pop(given_, None)
        else:
            over = sorted(n for n, limit_s in waiting.items() if limit_s < given_)
            assert sorted(limits.over(given_)) == sorted(f"n{n}" for n in over)
            for number_ in over:
                del waiting[number_]


def test_one_that_comes_again_has_the_same_time():
    limits = Limits()
    limits.came(7, 1.0, "a")
    limits.left([7])
    limits.came(7, 1.0, "a")

    assert [limits.over(now_s) for now_s in (1.0, 1.1, 2.0)] == [[], ["a"], []]


@pytest.mark.parametrize("stay", [0, 100])
def test_nothing_is_kept_of_those_who_left(stay):
    limits = Limits()
    for number in range(stay):
        limits.came(number, 1e9 + number, number)
    for number in range(stay, 5_000):
        limits.came(number, 1e9 - number, number)
        limits.left([number])

    assert len(limits._waiting) == stay
    assert len(limits._heap) < 2 * stay + 100
    assert limits.over(2e9) == list(range(stay))
