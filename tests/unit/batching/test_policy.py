"""Which waiting requests make a batch, and how long it waits for more."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.batching.policy import BatchPolicy, Dispatch

EAGER = BatchPolicy(max_batch_size=8)
PATIENT = BatchPolicy(max_batch_size=8, max_queue_delay_s=0.005)
CHOOSY = BatchPolicy(max_batch_size=8, max_queue_delay_s=0.005, preferred_batch_sizes=(4, 6))
HASTY = BatchPolicy(max_batch_size=8, preferred_batch_sizes=(4,))
STATIC = BatchPolicy(max_batch_size=8, allowed_batch_sizes=(2, 4, 8))
SINGLE = BatchPolicy(max_batch_size=0, max_queue_delay_s=0.005)


@pytest.mark.parametrize(
    ("policy", "rows", "oldest_wait_s", "expected"),
    [
        pytest.param(EAGER, [1], 0, Dispatch(1), id="without a delay nobody waits"),
        pytest.param(EAGER, [3, 2, 1], 0, Dispatch(3), id="everything that fits leaves together"),
        pytest.param(EAGER, [5, 4], 0, Dispatch(1), id="what does not fit stays"),
        pytest.param(EAGER, [8, 1], 0, Dispatch(1), id="the largest request travels alone"),
        pytest.param(EAGER, [4, 4, 1], 0, Dispatch(2), id="a batch stops when it is full"),
        pytest.param(PATIENT, [1], 0, Dispatch(0, 0.005), id="a lone request waits the delay"),
        pytest.param(PATIENT, [3, 2], 0.002, Dispatch(0, 0.003), id="counted from the oldest"),
        pytest.param(PATIENT, [3, 2], 0.005, Dispatch(2), id="a partial batch leaves in the end"),
        pytest.param(PATIENT, [4, 4], 0, Dispatch(2), id="a full batch does not wait"),
        pytest.param(PATIENT, [5, 4], 0, Dispatch(1), id="nor one that nothing more fits into"),
        pytest.param(CHOOSY, [3, 1], 0, Dispatch(2), id="a preferred size does not wait"),
        pytest.param(CHOOSY, [4, 2, 1], 0, Dispatch(2), id="the largest preferred size wins"),
        pytest.param(CHOOSY, [3, 2], 0, Dispatch(0, 0.005), id="another size waits"),
        pytest.param(CHOOSY, [3, 2], 0.005, Dispatch(2), id="but not beyond the delay"),
        pytest.param(CHOOSY, [4, 1], 0.005, Dispatch(2), id="what is overdue leaves with all"),
        pytest.param(CHOOSY, [4, 2, 2], 0, Dispatch(3), id="a full batch is not made smaller"),
        pytest.param(CHOOSY, [4, 1, 4], 0, Dispatch(2), id="nor one that nothing more fits in"),
        pytest.param(HASTY, [4, 1], 0, Dispatch(2), id="without a delay no size is preferred"),
        pytest.param(STATIC, [1, 1, 1, 1, 1], 0, Dispatch(4), id="what fits a size goes alone"),
        pytest.param(STATIC, [3, 1, 3], 0, Dispatch(3), id="unless the rest is worth filling up"),
        pytest.param(STATIC, [3, 2], 0, Dispatch(2), id="what fits no size is filled up"),
        pytest.param(STATIC, [1], 0, Dispatch(1), id="be it alone"),
        pytest.param(STATIC, [4, 1, 4], 0, Dispatch(1), id="the next one would not fit"),
        pytest.param(SINGLE, [1, 1], 0, Dispatch(1), id="a model without batches runs one by one"),
    ],
)
def test_decision(policy, rows, oldest_wait_s, expected):
    decision = policy.decide(rows, oldest_wait_s)

    assert decision.count == expected.count
    assert decision.wait_s == pytest.approx(expected.wait_s)


@given(
    rows=st.lists(st.integers(1, 8), min_size=1, max_size=40),
    delay_s=st.sampled_from([0.0, 0.005]),
    preferred=st.sets(st.integers(1, 8), max_size=3),
    waited_s=st.floats(0, 0.02),
)
def test_a_batch_is_never_empty_for_ever_nor_over_its_maximum(rows, delay_s, preferred, waited_s):
    policy = BatchPolicy(8, delay_s, tuple(sorted(preferred)))

    decision = policy.decide(rows, waited_s)

    assert sum(rows[: decision.count]) <= 8
    assert decision.count >= 1 or 0 < decision.wait_s <= delay_s
    assert policy.decide(rows, delay_s).count >= 1


@given(
    rows=st.lists(st.integers(1, 16), min_size=1, max_size=20),
    sizes=st.sets(st.integers(1, 15), max_size=4),
)
def test_with_allowed_sizes_no_more_rows_are_run_than_if_everything_went(rows, sizes):
    allowed = (*sorted(sizes), 16)
    policy = BatchPolicy(16, allowed_batch_sizes=allowed)

    def run_for(rows):
        return min(size for size in allowed if size >= rows)

    count = policy.decide(rows, 0).count
    everything = BatchPolicy(16).decide(rows, 0).count

    left = sum(rows[count:everything])
    assert count >= 1
    assert run_for(sum(rows[:count])) + left <= run_for(sum(rows[:everything]))


@given(
    rows=st.lists(st.integers(1, 8), min_size=1, max_size=40),
    preferred=st.sets(st.integers(1, 8), max_size=3),
    delay_s=st.sampled_from([0.0, 0.005]),
)
def test_preferred_sizes_make_no_batch_smaller_that_is_full_or_overdue(rows, preferred, delay_s):
    fits = BatchPolicy(8).decide(rows, 0).count
    policy = BatchPolicy(8, delay_s, tuple(sorted(preferred)))

    assert policy.decide(rows, delay_s).count == fits
    if len(rows) > fits or sum(rows) == 8:
        assert policy.decide(rows, 0).count == fits


def test_a_long_queue_is_read_only_as_far_as_one_batch_reaches():
    def endless():
        for _ in range(9):
            yield 1
        pytest.fail("read on")

    assert EAGER.decide(endless(), 0).count == 8
