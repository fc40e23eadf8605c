"""Reference profiles: bins of what training saw, kept as text, read with suspicion."""

import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from headrace.errors import ProfileError
from headrace.monitoring.profile import (
    LEVELS_MAX,
    RATIO_MAX,
    CategoricalReference,
    NumericReference,
    ReferenceProfile,
    as_numbers,
    build_profile,
    describe_column,
)

NUMBERS = hnp.arrays(
    np.float64,
    st.integers(1, 200),
    elements=st.one_of(
        st.floats(-1e6, 1e6), st.sampled_from([0.0, 1.0, np.nan]), st.floats(-1e300, 1e300)
    ),
)


@given(NUMBERS)
def test_every_row_of_training_is_in_one_bin_or_missing(values):
    column = describe_column(values)
    assert column.rows == len(values)
    assert column.missing == np.isnan(values).sum()


@given(NUMBERS)
def test_the_outermost_edges_are_the_least_and_the_greatest_value(values):
    column = describe_column(values)
    present = values[~np.isnan(values)]
    if len(present):
        least, greatest = as_numbers(np.array([present.min(), present.max()]))
        assert (column.edges[0], column.edges[-1]) == (least, greatest)


def test_distinct_values_fill_ten_bins_alike():
    column = describe_column(np.random.default_rng(0).permutation(10_000).astype(float))
    assert column.counts == (1000,) * 10


def test_a_frequent_value_has_a_bin_of_its_own():
    values = np.concatenate([np.zeros(500), np.linspace(1, 2, 250), np.full(250, 7.0)])
    column = describe_column(values)
    counts = dict(zip(column.edges[1:], column.counts, strict=True))
    assert counts[0.0] == 500
    assert counts[7.0] == 250


def test_a_frequent_value_in_the_middle_is_alone_in_its_bin():
    values = np.concatenate([np.linspace(0, 1, 300), np.full(400, 5.0), np.linspace(6, 7, 300)])
    column = describe_column(values)
    assert dict(zip(column.edges[1:], column.counts, strict=True))[5.0] == 400


def test_whole_numbers_have_a_bin_each_and_none_between():
    values = np.repeat([1.0, 2.0, 3.0, 4.0], [300, 300, 300, 100])
    assert describe_column(values).counts == (300, 300, 300, 100)


def test_a_constant_column_has_one_bin():
    assert describe_column(np.full(50, 3.0)).counts == (50,)


def test_a_column_without_any_value_is_described_all_the_same():
    assert describe_column(np.full(50, np.nan)).missing == 50


def test_text_is_counted_by_level_and_rare_levels_together():
    values = [f"level {i}" for i in range(LEVELS_MAX + 5)] + ["level 0", None]
    column = describe_column(np.array(values, dtype=object))
    assert isinstance(column, CategoricalReference)
    assert (column.levels[0], column.counts[0]) == ("level 0", 2)
    assert (len(column.levels), column.other, column.missing) == (LEVELS_MAX, 5, 1)


def test_truth_values_are_zero_and_one():
    column = describe_column(np.array([True, False, True]))
    assert column == describe_column(np.array([1.0, 0.0, 1.0]))


@pytest.mark.parametrize(
    "values", [[1.5, 2.5, None], [np.float32(1.5), 2.5, np.nan], [True, False, pd.NA]]
)
def test_numbers_among_missing_values_are_numbers(values):
    column = describe_column(np.array(values, dtype=object))
    assert isinstance(column, NumericReference)
    assert (sum(column.counts), column.missing) == (2, 1)


def test_text_among_missing_values_is_counted_by_level():
    column = describe_column(np.array(["a", np.nan, pd.NA, None, "a"], dtype=object))
    assert (column.levels, column.counts, column.missing) == (("a",), (2,), 3)


def test_numbers_too_large_for_a_float32_are_counted_all_the_same():
    assert sum(describe_column(np.array([-1e300, 0.0, 1e300])).counts) == 3


def test_equal_profiles_have_equal_digests_and_others_do_not():
    values = np.arange(20.0)
    profile = build_profile({"x": values}, {"y": values})
    assert ReferenceProfile.from_json(profile.to_json()).digest == profile.digest
    assert build_profile({"x": values + 1}, {"y": values}).digest != profile.digest


@given(NUMBERS)
def test_a_profile_reads_as_it_was_written(values):
    words = np.array(["a", "b", None] * len(values), dtype=object)
    profile = build_profile({"x": values, "word": words}, {"y": values})
    assert ReferenceProfile.from_json(profile.to_json()) == profile


def test_the_reference_error_is_the_median_relative_one():
    profile = build_profile(
        {},
        {"y": np.ones(3)},
        outcomes=np.array([100.0, 100.0, 100.0, 0.0]),
        outcome_predictions=np.array([101.0, 110.0, 150.0, 5.0]),
    )
    assert profile.error == pytest.approx(0.1)


def test_an_outcome_next_to_nothing_does_not_make_the_reference_error_infinite():
    profile = build_profile(
        {}, {"y": [1.0]}, outcomes=np.array([5e-324]), outcome_predictions=np.array([1.0])
    )
    assert profile.error == RATIO_MAX
    assert ReferenceProfile.from_json(profile.to_json()) == profile


PROFILE = build_profile({"x": np.arange(20.0)}, {"y": np.arange(20.0)})
NUMERIC = {"kind": "numeric", "edges": [0, 1], "counts": [1], "missing": 0}


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"headrace_profile": 2}, "expected format 1"),
        ({"prediction": "z"}, "no predictions of 'z'"),
        ({"error": float("1e999")}, "reference error"),
        ({"features": {"x": {"kind": "numeric"}}}, "missing"),
        ({"features": {"x": {"kind": "image"}}}, "neither numeric nor categorical"),
        ({"features": []}, "not a profile"),
        ({"error": 10**400}, "not a profile"),
        ({"features": {"x": {**NUMERIC, "edges": [0, 10**400]}}}, "not a profile"),
        ({"features": {"x": {**NUMERIC, "counts": [10**400]}}}, "counts"),
    ],
)
def test_what_is_no_profile_is_refused_with_the_reason(change, complaint):
    document = {**json.loads(PROFILE.to_json()), **change}
    with pytest.raises(ProfileError, match=complaint):
        ReferenceProfile.from_json(json.dumps(document))


@pytest.mark.parametrize(
    ("edges", "counts"),
    [
        ((1.0, 0.0), (5,)),
        ((0.0, float("nan")), (5,)),
        ((0.0, 1.0), (5, 5)),
        ((0.0, 1.0), (-1,)),
        ((0.0,), ()),
        ((0.0, 1.0), (True,)),
    ],
)
def test_bins_that_cannot_be_are_refused(edges, counts):
    with pytest.raises(ProfileError):
        NumericReference(edges, counts, 0)


@given(st.text() | st.recursive(st.integers() | st.text(), lambda x: st.lists(x)).map(json.dumps))
def test_no_text_does_anything_but_read_or_be_refused(text):
    with pytest.raises(ProfileError):
        ReferenceProfile.from_json(text)


def test_a_profile_without_predictions_is_refused():
    with pytest.raises(ProfileError, match="no predictions"):
        build_profile({"x": [1.0]}, {})


def test_a_column_of_two_dimensions_is_refused():
    with pytest.raises(ProfileError, match="shape"):
        describe_column(np.zeros((3, 2)))
