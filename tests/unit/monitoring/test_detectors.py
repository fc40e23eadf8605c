"""What is drift and what is chance."""

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.monitoring.counts import ColumnCounter
from headrace.monitoring.detectors import (
    AlarmState,
    Signal,
    Threshold,
    psi_excess,
    rate_excesses,
    rows_needed,
    step,
)
from headrace.monitoring.profile import describe_column

RNG = np.random.default_rng(7)
TRAINING = RNG.normal(0, 1, 20_000)
REFERENCE = describe_column(TRAINING)


def excess(values, reference=REFERENCE):
    return psi_excess(reference, ColumnCounter(reference).count(np.asarray(values), None))


def test_without_drift_the_excess_is_zero_on_average():
    found = [excess(RNG.normal(0, 1, 1_000)) for _ in range(300)]
    assert abs(np.mean(found)) < 0.001


@pytest.mark.parametrize(("shift", "psi"), [(0.1, 0.01), (0.3, 0.09), (0.5, 0.24), (1.0, 0.9)])
def test_a_shift_shows_as_about_its_square(shift, psi):
    """Source: the symmetric Kullback-Leibler divergence of two normals is δ²; bins lose some."""
    found = np.mean([excess(RNG.normal(shift, 1, 5_000)) for _ in range(20)])
    assert found == pytest.approx(psi, rel=0.15)


def test_one_absurd_value_moves_the_index_no_more_than_any_other():
    values = RNG.normal(0, 1, 1_000)
    moved = np.append(values[1:], 1e6)
    assert abs(excess(values) - excess(moved)) < 0.002


def test_missing_values_are_not_in_the_index():
    values = RNG.normal(0, 1, 1_000)
    with_missing = np.append(values, np.full(500, np.nan))
    assert excess(values) == excess(with_missing)


def test_where_nothing_can_be_compared_there_is_no_index():
    assert excess([np.nan]) is None
    assert excess([1.0], describe_column(np.ones(100))) is None
    assert excess([1.0], describe_column(np.full(100, np.nan))) is None


def test_a_new_level_is_drift():
    reference = describe_column(np.array(["a", "b"] * 500, dtype=object))
    same = np.array([b"a", b"b"] * 500, dtype=object)
    new = np.array([b"a", b"c"] * 500, dtype=object)
    assert excess(same, reference) < 0.01
    assert excess(new, reference) > 1


@given(
    st.lists(st.integers(0, 1000), min_size=10, max_size=10),
    st.integers(0, 100),
    st.integers(0, 100),
)
def test_the_index_is_finite_for_all_counts(bins, below, above):
    counts = ColumnCounter(REFERENCE).empty()
    counts.bins += np.array(bins)
    counts.below, counts.above = below, above
    found = psi_excess(REFERENCE, counts)
    assert found is None or math.isfinite(found)


def test_rates_are_told_against_those_of_training():
    reference = describe_column(np.append(TRAINING[:900], np.full(100, np.nan)))
    values = np.append(np.zeros(60), np.append(np.full(30, np.nan), np.full(10, 1e6)))
    rates = rate_excesses(reference, ColumnCounter(reference).count(values, None))
    assert rates[Signal.MISSING] == pytest.approx(0.3 - 0.1)
    assert rates[Signal.OUT_OF_RANGE] == pytest.approx(0.1)


def test_enough_rows_are_fifty_for_each_bin():
    assert rows_needed(REFERENCE) == 500
    words = describe_column(np.array([str(i) for i in range(100)], dtype=object))
    assert rows_needed(words) == 500


THRESHOLD = Threshold(enter=0.2, leave=0.1, enter_windows=2, leave_windows=3)


def run(statistics):
    state, states = AlarmState(), []
    for statistic in statistics:
        state = step(THRESHOLD, state, statistic)
        states.append(state.is_alarmed)
    return states


@pytest.mark.parametrize(
    ("statistics", "alarmed"),
    [
        ([0.3], [False]),
        ([0.3, 0.3], [False, True]),
        ([0.3, 0.15, 0.3], [False, False, False]),
        ([0.3, 0.3, 0.15, 0.15, 0.15, 0.15], [False, True, True, True, True, True]),
        ([0.3, 0.3, 0.0, 0.0, 0.0], [False, True, True, True, False]),
        ([0.3, 0.3, 0.0, 0.0, 0.3, 0.0, 0.0], [False, True, True, True, True, True, True]),
    ],
)
def test_an_alarm_begins_and_ends_after_its_windows_in_a_row(statistics, alarmed):
    assert run(statistics) == alarmed


@given(st.lists(st.floats(-1, 1), max_size=50))
def test_between_two_changes_there_are_enough_windows(statistics):
    states = [False, *run(statistics)]
    changes = [i for i in range(1, len(states)) if states[i] != states[i - 1]]
    for earlier, later in pairwise(changes):
        assert later - earlier >= (3 if states[earlier] else 2)
