"""Whether a call that is over was left, or had no time left."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.batching.leaving import NEAR_S, ran_out

times_s = st.floats(0, 1e6)


@pytest.mark.parametrize(
    ("left_s", "waited_s", "expected"),
    [
        (math.inf, 5.0, False),
        (1.0, 0.2, False),
        (0.02, 0.2, False),
        (0.005, 0.2, True),
        (0.0, 0.2, True),
        (-3.0, 0.2, True),
        # Of 5,001 ms gRPC tells the server 5,010; of 100.1 s, 101.
        (0.009, 5.001, True),
        (0.9, 100.1, True),
        (2.0, 100.1, False),
    ],
)
def test_a_call_that_ends_about_when_its_time_does_has_run_out_of_it(left_s, waited_s, expected):
    assert ran_out(left_s, waited_s) is expected


def grpc_s(timeout_ms):
    """Return what C-core tells a server of a timeout, in seconds: three digits, rounded up."""
    unit = 1
    while timeout_ms > 999 * unit:
        unit *= 10
    return -(-timeout_ms // unit) * unit / 1000


@given(st.integers(1, 1_000_000))
def test_no_timeout_as_grpc_rounds_it_is_taken_for_leaving(timeout_ms):
    waited_s = timeout_ms / 1000

    assert ran_out(grpc_s(timeout_ms) - waited_s, waited_s)


@given(times_s, times_s)
def test_whose_time_is_over_has_run_out_of_it_however_long_he_waited(late_s, waited_s):
    assert ran_out(-late_s, waited_s)


@given(times_s, st.floats(0, 0.9))
def test_who_leaves_with_a_tenth_of_his_time_before_him_has_left(total_s, share):
    waited_s = total_s * share

    assert ran_out(total_s - waited_s, waited_s) is (total_s - waited_s <= NEAR_S)
