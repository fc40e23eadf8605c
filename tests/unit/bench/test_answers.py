"""Replies are judged each by its own answer."""

import struct

import bench_modules
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

answers = bench_modules.load("answers").answers
Answers = answers.Answers

NUMBERS = st.floats(-1e6, 1e6, width=32)


def packed(*values):
    return struct.pack(f"<{len(values)}f", *values)


@given(
    expected=st.lists(st.binary(min_size=1, max_size=6), min_size=1, max_size=5),
    got=st.lists(st.binary(max_size=12), max_size=40),
)
def test_bytes_must_end_the_message_exactly(expected, got):
    judge = Answers(expected)

    for number, message in enumerate(got):
        judge.check(number, message)

    assert judge.wrong() == [
        number
        for number, message in enumerate(got)
        if message[-len(expected[number % len(expected)]) :] != expected[number % len(expected)]
    ]


@given(
    rows=st.lists(st.lists(NUMBERS, min_size=1, max_size=3), min_size=1, max_size=5),
    spoiled=st.lists(st.booleans(), min_size=1, max_size=50),
    at_a_time=st.integers(1, 7),
)
def test_numbers_that_are_off_are_found_wherever_they_are(rows, spoiled, at_a_time):
    """Of whatever width; in whatever portions they are compared."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(answers, "AT_A_TIME", at_a_time)
        judge = Answers([packed(*row) for row in rows], tolerance=1e-3)

        for number, is_spoiled in enumerate(spoiled):
            row = [value * 1.0001 for value in rows[number % len(rows)]]
            if is_spoiled:
                row[number % len(row)] += 1 + abs(row[number % len(row)])
            judge.check(number, b"what comes before" + packed(*row))

        assert judge.wrong() == [number for number, is_bad in enumerate(spoiled) if is_bad]


def test_a_message_that_is_too_short_is_wrong_and_what_is_not_a_number_may_be_expected():
    judge = Answers([packed(1.0, np.nan)], tolerance=1e-3)

    judge.check(0, packed(1.0))
    judge.check(1, packed(1.0, np.nan))
    judge.check(2, packed(1.0, 2.0))

    assert judge.wrong() == [0, 2]


def test_nothing_to_compare_with_is_refused():
    with pytest.raises(ValueError, match="needs an answer"):
        Answers([b"x", b""])
    with pytest.raises(ValueError, match="FP32"):
        Answers([b"xyz"], tolerance=0.1)
