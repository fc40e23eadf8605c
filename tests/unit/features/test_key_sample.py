"""Which keys are sampled: the same ones always, and as many as asked for."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.features.key_sample import key_hashes, sampled_rows, threshold_of

INT64 = st.integers(-(2**63), 2**63 - 1)
SHARES = st.floats(1e-6, 1.0)


def texts(values):
    column = np.empty(len(values), np.object_)
    column[:] = values
    return column


KEYS = st.lists(st.tuples(INT64, st.binary(max_size=20)), min_size=1, max_size=30)


@given(KEYS, SHARES, st.randoms())
def test_a_key_is_sampled_or_not_whoever_shares_its_batch(keys, share, random):
    shuffled = random.sample(keys, len(keys))
    threshold = threshold_of(share)

    def sampled(keys):
        numbers, names = zip(*keys, strict=True)
        places = sampled_rows([np.array(numbers, np.int64), texts(names)], threshold)
        return {keys[i] for i in places.tolist()}

    alone = {key for key in keys if sampled([key])}
    assert sampled(keys) == sampled(shuffled) == alone


@given(KEYS, SHARES, SHARES)
def test_a_larger_share_keeps_what_a_smaller_one_keeps(keys, one, other):
    columns = [np.array([number for number, _ in keys], np.int64)]
    less, more = (sampled_rows(columns, threshold_of(of)).tolist() for of in sorted((one, other)))

    assert set(less) <= set(more)


@given(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1))
def test_integers_hash_by_value_whatever_their_width(numbers):
    narrow, wide = (np.array(numbers, dtype) for dtype in (np.int32, np.int64))

    np.testing.assert_array_equal(key_hashes([narrow]), key_hashes([wide]))


@given(KEYS)
def test_a_share_of_one_keeps_everything_and_nothing_is_written_to(keys):
    column = np.array([number for number, _ in keys], np.int64)
    before = column.copy()

    assert len(sampled_rows([column], threshold_of(1.0))) == len(keys)
    np.testing.assert_array_equal(column, before)


@pytest.mark.parametrize(
    "columns",
    [
        pytest.param([np.arange(200_000)], id="counted up"),
        pytest.param([np.arange(200_000) << 32], id="high bits only"),
        pytest.param([np.arange(200_000) * 1_000_000], id="round numbers"),
        pytest.param([np.arange(-100_000, 100_000)], id="around zero"),
        pytest.param([texts([f"user-{i}".encode() for i in range(200_000)])], id="text"),
        pytest.param([np.repeat(np.arange(447), 448)[:200_000], np.arange(200_000)], id="two"),
    ],
)
def test_about_the_share_asked_for_is_sampled_of_keys_of_any_pattern(columns):
    counts = [len(sampled_rows(columns, threshold_of(share))) for share in (0.01, 0.25)]

    for count, share in zip(counts, (0.01, 0.25), strict=True):  # within five standard deviations
        assert abs(count - 200_000 * share) < 5 * (200_000 * share * (1 - share)) ** 0.5


def test_the_decision_is_the_same_in_every_process_and_release():
    columns = [np.array([0, 1, 42, -1, 2**40]), texts([b"", b"a", b"caf\xc3\xa9", b"\xff", b"x"])]

    assert [f"{word:016x}" for word in key_hashes(columns).tolist()] == EXPECTED


EXPECTED = [
    "7724a50f51882595",
    "5a94d99526090c91",
    "e5c1f6c6d75994e5",
    "1f11a54aeef40943",
    "4cb3fd7193600271",
]
