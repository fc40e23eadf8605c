"""Counting: exact, mergeable, and nothing is lost between the bins."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from headrace.monitoring.counts import ColumnCounter, ColumnCounts, WindowCounts
from headrace.monitoring.profile import (
    CategoricalReference,
    NumericReference,
    describe_column,
)

VALUES = hnp.arrays(
    np.float32,
    st.integers(1, 100),
    elements=st.floats(width=32, allow_nan=True, allow_infinity=True),
)
REFERENCE = describe_column(np.random.default_rng(1).normal(0, 1e3, 1_000))


def as_tuple(counts):
    return json.dumps(counts.to_json())


@given(VALUES)
def test_every_value_is_counted_once(values):
    assert ColumnCounter(REFERENCE).count(values, None).rows == len(values)


@given(VALUES, st.integers(0, 100))
def test_two_halves_add_up_to_the_whole(values, cut):
    counter = ColumnCounter(REFERENCE)
    both = counter.count(values[:cut], None)
    both.add(counter.count(values[cut:], None))
    assert as_tuple(both) == as_tuple(counter.count(values, None))


@given(hnp.arrays(np.float64, st.integers(1, 200), elements=st.floats(-1e6, 1e6)))
def test_what_trained_the_model_falls_into_the_bins_it_was_counted_in(values):
    reference = describe_column(values)
    counts = ColumnCounter(reference).count(values, None)
    assert counts.bins.tolist() == list(reference.counts)
    assert (counts.below, counts.above) == (0, 0)


def test_missing_infinite_and_out_of_range_values_are_told_apart():
    values = np.array([np.nan, np.inf, -np.inf, -1e9, 1e9, 1e9, 0.0])
    counts = ColumnCounter(REFERENCE).count(values, None)
    assert (counts.missing, counts.invalid, counts.below, counts.above) == (1, 2, 1, 2)


def test_a_value_that_the_store_did_not_have_is_missing_whatever_the_model_got_instead():
    statuses = np.array([1, 2, 3, 4, 1], np.uint8)
    counts = ColumnCounter(REFERENCE).count(np.zeros(5), statuses)
    assert (counts.missing, counts.stale, counts.present) == (3, 1, 2)


def test_levels_are_counted_and_new_ones_are_out_of_range():
    reference = describe_column(np.array(["a", "a", "b"], dtype=object))
    counts = ColumnCounter(reference).count(np.array([b"b", b"a", b"z"], dtype=object), None)
    assert (counts.bins.tolist(), counts.above) == ([1, 1], 1)


def test_truth_values_are_counted_as_training_counted_them():
    reference = describe_column(np.array([True, False, True]))
    counts = ColumnCounter(reference).count(np.array([False, False, True]), None)
    assert counts.bins.tolist() == [2, 1]


KINDS = {
    "numbers": ([0.1, 0.2, 0.3, 0.6, 0.7], ["f4", "f8"]),
    "half": ([0.1, 0.2, 0.3, 0.6, 0.7], ["f2"]),
    "integers": ([0, 1, 2, 16_777_217], ["i4", "i8", "u8", "f4", "f8"]),
    "truth": ([False, True], ["?", "i1", "f2", "f4", "f8"]),
}


@pytest.mark.parametrize(
    ("trained", "live", "values"),
    [
        (trained, live, values)
        for values, kinds in KINDS.values()
        for trained in (*kinds, "f8", "O")
        for live in kinds
    ],
)
def test_the_same_values_fall_into_the_same_bins_whatever_their_datatype(trained, live, values):
    values = np.array(values * 20)
    reference = describe_column(values.astype(trained))
    counts = ColumnCounter(reference).count(values.astype(live), None)
    assert counts.bins.tolist() == list(reference.counts)
    assert counts.present == counts.bins.sum()


@given(
    hnp.arrays(np.float32, st.integers(1, 200), elements=st.floats(-1e6, 1e6, width=32)),
    st.booleans(),
)
def test_training_in_double_precision_changes_no_bin(values, noisy):
    trained = values.astype(np.float64)
    if noisy:  # what is rounded to these very numbers on the wire
        trained = trained * (1 + 2.0**-26)
    reference = describe_column(trained)
    counts = ColumnCounter(reference).count(trained.astype(np.float32), None)
    assert counts.bins.tolist() == list(reference.counts)
    assert (counts.below, counts.above) == (0, 0)


def test_a_profile_with_truth_values_as_levels_counts_them_as_numbers_too():
    reference = CategoricalReference(("True", "False"), (2, 1), 0, 0)
    for values in ([True, False, True], [1.0, 0.0, 1.0]):
        assert ColumnCounter(reference).count(np.array(values), None).bins.tolist() == [2, 1]


def test_bins_of_double_precision_edges_keep_frequent_values_apart():
    below = np.nextafter(0.1, 0)
    reference = NumericReference((0.0, below, 0.1, 1.0), (5, 90, 5), 0)
    counts = ColumnCounter(reference).count(np.array([0.05, 0.1, 0.1, 0.5], np.float32), None)
    assert counts.bins.tolist() == [1, 2, 1]


def test_a_missing_number_is_missing_where_training_had_text():
    reference = describe_column(np.array(["a", "b"], dtype=object))
    assert ColumnCounter(reference).count(np.array([np.nan, np.nan]), None).missing == 2


def test_without_a_reference_rows_are_counted_all_the_same():
    counts = ColumnCounter(None).count(np.array([1.0, np.nan, np.inf, 2.0]), None)
    assert (counts.present, counts.missing, counts.invalid) == (2, 1, 1)
    assert ColumnCounter(None).count(np.array([b"a"], dtype=object), None).present == 1


def test_text_where_training_had_numbers_is_invalid():
    assert ColumnCounter(REFERENCE).count(np.array([b"a", b"b"], dtype=object), None).invalid == 2


def test_integers_are_counted_like_the_numbers_they_are():
    counts = ColumnCounter(REFERENCE).count(np.array([0, 2**40], np.int64), None)
    assert (counts.present, counts.above) == (2, 1)


@given(VALUES)
def test_a_window_reads_as_it_was_written(values):
    values = values[np.isfinite(values)]
    window = WindowCounts(1.0, 2.0, len(values), 3)
    window.features["x"] = ColumnCounter(REFERENCE).count(values, None)
    window.predictions["y"] = ColumnCounter(None).count(values, None)
    document = json.loads(json.dumps(window.to_json()))
    assert WindowCounts.from_json(document).to_json() == window.to_json()


def test_a_window_that_lost_more_than_one_percent_is_degraded():
    assert WindowCounts(0, 1, 990, 11).is_degraded
    assert not WindowCounts(0, 1, 990, 10).is_degraded
    assert not WindowCounts(0, 1).is_degraded


def test_counts_of_no_rows_are_empty():
    assert ColumnCounter(REFERENCE).empty().rows == 0
    assert ColumnCounts(np.zeros(3, np.int64)).rows == 0
