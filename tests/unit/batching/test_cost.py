"""How long a batch takes, learned from those that have finished."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.batching.cost import BatchCost


def seen(batches):
    cost = BatchCost()
    for rows, seconds in batches:
        cost.observe(rows, seconds)
    return cost


def test_nothing_is_expected_before_anything_was_seen():
    cost = BatchCost()

    assert cost.bound_s(64) == 0


def test_fixed_part_and_part_per_row_are_told_apart():
    numbers = random.Random(1)
    rows = [numbers.randint(1, 64) for _ in range(400)]

    cost = seen([(n, 0.002 + 0.0001 * n) for n in rows])

    assert cost.estimate_s(1) == pytest.approx(0.0021, rel=0.05)
    assert cost.estimate_s(64) == pytest.approx(0.0084, rel=0.05)


def test_one_size_alone_says_how_long_that_size_takes():
    cost = seen([(8, 0.004)] * 50)

    assert cost.estimate_s(8) == pytest.approx(0.004)


def test_what_is_known_of_other_sizes_outlasts_a_time_with_one_size_only():
    cost = seen([(n, 0.001 + 0.0002 * n) for n in [1, 32] * 100] + [(1, 0.0012)] * 100)

    assert cost.estimate_s(32) == pytest.approx(0.0074, rel=0.2)


def test_a_model_that_slows_down_five_times_is_believed_within_a_second_of_work():
    cost = seen([(4, 0.05)] * 100)
    passed_s = 0.0
    while passed_s < 1.0:
        cost.observe(4, 0.25)
        passed_s += 0.25

    assert cost.bound_s(4) > 0.18


@pytest.mark.parametrize("times", [20, 250, 10_000])
def test_however_many_times_slower_a_model_becomes_it_is_believed_after_three_batches(times):
    cost = seen([(4, 0.0002)] * 1_000 + [(4, 0.0002 * times)] * 3)

    assert cost.estimate_s(4) == pytest.approx(0.0002 * times, rel=0.1)


def test_one_slow_batch_among_many_is_soon_forgotten():
    cost = seen([(4, 0.005)] * 100 + [(4, 1.0)] + [(4, 0.005)] * 20)

    assert cost.estimate_s(4) < 0.01


def test_a_pause_that_all_executors_see_is_hardly_seen():
    cost = BatchCost(side_by_side=4)
    for seconds in [0.005] * 200 + [1.0] * 4 + [0.005]:
        cost.observe(4, seconds)

    assert cost.estimate_s(4) < 0.02


def test_a_model_that_hung_is_believed_to_be_well_again_after_a_few_batches():
    cost = seen([(1, 1.0)] * 50 + [(1, 0.002)] * 25)

    assert cost.bound_s(1) < 0.05


def test_nineteen_of_twenty_batches_take_no_longer_than_the_bound():
    numbers = random.Random(2)
    cost, within, count = BatchCost(), 0, 4_000
    for number in range(count + 500):
        rows = numbers.randint(1, 32)
        seconds = (0.003 + 0.0002 * rows) * numbers.lognormvariate(0, 0.2)
        within += number >= 500 and seconds <= cost.bound_s(rows)
        cost.observe(rows, seconds)

    assert 0.90 <= within / count <= 0.99


def test_a_batch_that_failed_fast_says_nothing_of_how_long_an_answer_takes():
    cost = seen([(4, 0.05), (8, 0.06)] * 50)
    before = cost.estimate_s(4), cost.hoped_s(4), cost.bound_s(4)

    for _ in range(1_000):
        cost.observe_failed(8, 0.0002)

    assert (cost.estimate_s(4), cost.hoped_s(4), cost.bound_s(4)) == before


def test_one_that_failed_slowly_says_how_long_others_wait():
    cost = seen([(4, 0.05)] * 50)

    for _ in range(5):
        cost.observe_failed(4, 1.0)

    assert cost.estimate_s(4) > 0.5


def test_when_it_fails_fast_after_that_others_may_hope():
    cost = seen([(4, 0.05)] * 50)
    for _ in range(5):
        cost.observe_failed(4, 1.0)

    cost.observe_failed(4, 0.0002)

    assert cost.hoped_s(4) < 0.001
    cost.observe(4, 0.05)
    assert cost.hoped_s(4) == pytest.approx(0.05)


def test_nothing_is_expected_of_a_model_that_has_only_failed():
    cost = BatchCost()

    cost.observe_failed(4, 1.0)

    assert cost.bound_s(4) == 0


@given(
    st.lists(st.tuples(st.integers(1, 1024), st.floats(1e-6, 10)), min_size=1, max_size=60),
    st.floats(0, 20),
)
def test_estimates_are_finite_grow_with_the_rows_and_are_kept_by_rows_within(batches, seconds):
    cost = seen(batches)

    assert 0 <= cost.estimate_s(1) <= cost.estimate_s(2) <= cost.bound_s(1024) < float("inf")
    assert 1.0 <= cost.margin <= 4.0
    rows = cost.rows_within(seconds)
    assert rows == 0 or cost.bound_s(rows) <= seconds * (1 + 1e-9)
