"""Who calls, as a header says."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.batching.callers import NAME_LENGTH_MAX, NOBODY, caller_of


@pytest.mark.parametrize(
    ("metadata", "caller"),
    [
        ([], NOBODY),
        ([("x-other", "a")], NOBODY),
        ([("x-caller", "")], NOBODY),
        ([("x-caller", "a")], "a"),
        ([("x-caller", "forged"), ("x-other", "b"), ("x-caller", "by the proxy")], "by the proxy"),
        ([("x-caller", "a" * NAME_LENGTH_MAX)], "a" * NAME_LENGTH_MAX),
    ],
)
def test_the_last_of_the_headers_says_who_calls(metadata, caller):
    assert caller_of(metadata, "x-caller") == caller


@given(st.text(st.characters(exclude_categories=())) | st.binary())
def test_whatever_it_says_little_is_kept_of_it(value):
    caller = caller_of((("x-caller", value),), "x-caller")

    assert len(caller) <= NAME_LENGTH_MAX
    assert caller == caller_of((("x-caller", value),), "x-caller")


def test_long_names_that_begin_alike_are_different_callers():
    first, second = (caller_of([("k", "a" * 5_000 + last)], "k") for last in "xy")

    assert first != second
