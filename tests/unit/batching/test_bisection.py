"""The search for those who make a batch fail finds them, soon, and ends."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.batching.bisection import CULPRITS_SURE, Bisection, attempts_max


def search(count, culprits):
    """Return who was blamed, who was answered, who was left in question, and the attempts."""
    bisection = Bisection(list(range(count)))
    blamed, answered, attempts = [], [], 0
    while part := bisection.next_part():
        attempts += 1
        if culprits.isdisjoint(part):
            answered += part
        else:
            blamed += bisection.failed(part)
    return blamed, answered, bisection.rest(), attempts


some_culprits = st.integers(2, 300).flatmap(
    lambda count: st.tuples(
        st.just(count), st.sets(st.integers(0, count - 1), min_size=1, max_size=CULPRITS_SURE)
    )
)


@given(some_culprits)
def test_exactly_the_culprits_are_blamed_and_the_others_answered(case):
    count, culprits = case

    blamed, answered, rest, _ = search(count, culprits)

    assert sorted(blamed) == sorted(culprits)
    assert sorted(answered) == sorted(set(range(count)) - culprits)
    assert rest == []


@given(some_culprits)
def test_each_culprit_costs_at_most_two_attempts_a_level(case):
    count, culprits = case

    *_, attempts = search(count, culprits)

    assert attempts <= 2 * len(culprits) * math.ceil(math.log2(count))


@given(st.integers(2, 300).flatmap(lambda n: st.tuples(st.just(n), st.sets(st.integers(0, n - 1)))))
def test_everybody_leaves_once_within_the_bound_whoever_is_to_blame(case):
    count, culprits = case

    blamed, answered, rest, attempts = search(count, culprits)

    assert sorted([*blamed, *answered, *rest]) == list(range(count))
    assert set(blamed) <= culprits
    assert culprits.isdisjoint(answered)
    assert attempts <= attempts_max(count)


@pytest.mark.parametrize("count", range(2, 17))
def test_in_a_small_batch_any_number_of_culprits_is_found(count):
    everybody = set(range(count))

    blamed, _, rest, _ = search(count, everybody)

    assert set(blamed) == everybody
    assert rest == []


def test_a_model_that_fails_whatever_it_gets_is_not_run_for_each_request():
    blamed, answered, rest, attempts = search(256, set(range(256)))

    assert attempts == 64
    assert answered == []
    assert len(blamed) + len(rest) == 256


def test_halves_of_halves_are_tried_the_largest_first():
    bisection = Bisection([0, 1, 2, 3, 4])
    tried = []
    while part := bisection.next_part():
        tried.append(list(part))
        if 1 in part:
            bisection.failed(part)

    assert tried == [[0, 1, 2], [3, 4], [0, 1], [2], [0], [1]]


def test_of_one_who_is_left_alone_by_his_batch_the_rest_is_tried_again():
    """Whoever has left his part since is not blamed for it: the part that failed is shorter."""
    bisection = Bisection(["leaving", "wrong", "right"])
    first = bisection.next_part()
    assert list(first) == ["leaving", "wrong"]

    assert list(bisection.failed(["wrong"])) == ["wrong"]
