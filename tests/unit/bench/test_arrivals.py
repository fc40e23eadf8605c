"""When the open loop's requests are due."""

import math

import bench_modules
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

arrivals = bench_modules.load("arrivals").arrivals
Step = arrivals.Step

STEPS = st.lists(st.builds(Step, st.floats(0, 2_000), st.floats(0, 5)), min_size=1, max_size=4)


@given(steps=STEPS, seed=st.integers(0, 2**32))
def test_as_many_are_due_in_each_step_as_its_rate_says_in_order(steps, seed):
    times_s = arrivals.poisson(steps, seed)

    assert (np.diff(times_s) >= 0).all()
    begin_s = 0.0
    for rate_per_s, seconds in steps:
        inside = ((times_s >= begin_s) & (times_s < begin_s + seconds)).sum()
        mean = rate_per_s * seconds
        assert abs(inside - mean) <= 8 * math.sqrt(mean) + 10  # one in billions
        begin_s += seconds
    assert (times_s <= begin_s).all()


@given(steps=STEPS)
def test_even_times_are_as_many_as_fit_the_first_at_once(steps):
    times_s = arrivals.even(steps)

    assert len(times_s) == sum(math.ceil(rate * seconds - 1e-9) for rate, seconds in steps)
    assert (np.diff(times_s) >= -1e-9).all()


def test_the_same_seed_is_the_same_load_and_another_is_not():
    steps = [Step(100, 2)]

    assert arrivals.poisson(steps, 7).tolist() == arrivals.poisson(steps, 7).tolist()
    assert arrivals.poisson(steps, 7).tolist() != arrivals.poisson(steps, 8).tolist()


def test_gaps_vary_as_much_as_their_mean_as_an_exponential_does():
    gaps_s = np.diff(arrivals.poisson([Step(1_000, 50)], 3))

    assert gaps_s.std() / gaps_s.mean() == pytest.approx(1.0, abs=0.03)
    assert (gaps_s > 3 * gaps_s.mean()).mean() == pytest.approx(math.exp(-3), rel=0.1)
