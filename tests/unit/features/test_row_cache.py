"""Rows kept for a while: never another's, never too old, never too many."""

import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.features.cells import DecodedGroup
from headrace.features.plan import FeatureStatus
from headrace.features.row_cache import FIRST_ROWS, RowCache, concatenate


def rows_of(values, statuses=None):
    """One float column, whose values are the keys, and event times alike."""
    column = np.array(values, np.float32).reshape(-1, 1)
    texts = np.array([[str(value)] for value in values], np.object_).reshape(-1, 1)
    times = np.array(values, np.float64).reshape(-1, 1)
    return DecodedGroup([(slice(0, 1), column), (slice(1, 2), texts)], statuses, times)


def values_of(rows):
    return [] if rows is None else rows.columns[0][1][:, 0].tolist()


def test_what_was_put_is_found_in_the_order_asked_for():
    cache = RowCache(10.0, 100)
    cache.put([1, 2, 3], rows_of([1, 2, 3]), 0.0)
    places, rows = cache.get([3, 9, 1], 5.0)
    assert places.tolist() == [0, 2]
    assert values_of(rows) == [3, 1]
    assert rows.columns[1][1][:, 0].tolist() == ["3", "1"]
    assert rows.event_times_s[:, 0].tolist() == [3.0, 1.0]
    assert rows.statuses.tolist() == [[FeatureStatus.PRESENT] * 2] * 2


def test_a_row_is_served_until_its_age_and_no_longer():
    cache = RowCache(10.0, 100)
    cache.put([1], rows_of([1]), 0.0)
    assert values_of(cache.get([1], 10.0)[1]) == [1]
    assert cache.get([1], 10.001)[1] is None


def test_statuses_are_kept():
    cache = RowCache(10.0, 100)
    cache.put([1, 2], rows_of([1, 2], np.array([[0, 2], [1, 0]], np.uint8)), 0.0)
    assert cache.get([2, 1], 0.0)[1].statuses.tolist() == [[1, 0], [0, 2]]


def test_a_row_that_was_read_later_is_not_overwritten_by_one_that_took_longer():
    cache = RowCache(10.0, 100)
    cache.put([1], rows_of([7]), 2.0)
    cache.put([1], rows_of([6]), 1.0)
    assert values_of(cache.get([1], 2.0)[1]) == [7]


def test_a_row_that_was_written_is_served_no_more():
    cache = RowCache(10.0, 100)
    cache.put([1, 2], rows_of([1, 2]), 0.0)
    assert cache.forget([1, 9], 1.0) == 1
    assert values_of(cache.get([1, 2], 1.0)[1]) == [2]
    assert cache.forget([1], 1.0) == 0
    cache.put([1], rows_of([5]), 1.5)
    assert values_of(cache.get([1], 2.0)[1]) == [5]


def test_what_was_being_read_when_it_was_written_is_not_kept():
    cache = RowCache(10.0, 100)
    cache.forget([1], 1.0)
    cache.put([1, 2], rows_of([1, 2]), 0.5)
    assert values_of(cache.get([1, 2], 1.0)[1]) == [2]


def test_nothing_read_before_it_was_cleared_is_served():
    cache = RowCache(10.0, 100)
    cache.put([1], rows_of([1]), 0.0)
    cache.clear(1.0)
    cache.put([2], rows_of([2]), 0.5)
    cache.put([3], rows_of([3]), 1.5)
    assert values_of(cache.get([1, 2, 3], 2.0)[1]) == [3]


def test_what_is_handed_out_is_a_copy():
    cache = RowCache(10.0, 100)
    cache.put([1], rows_of([1]), 0.0)
    cache.get([1], 0.0)[1].columns[0][1][:] = 9
    assert values_of(cache.get([1], 0.0)[1]) == [1]


def test_when_it_is_full_the_first_goes_first():
    cache = RowCache(10.0, 3)
    for key in range(5):
        cache.put([key], rows_of([key]), 0.0)
    assert len(cache) == 3
    assert values_of(cache.get([0, 1, 2, 3, 4], 0.0)[1]) == [2, 3, 4]


def test_more_rows_than_it_holds_leave_the_last():
    cache = RowCache(10.0, 3)
    cache.put(list(range(10)), rows_of(range(10)), 0.0)
    assert values_of(cache.get(list(range(10)), 0.0)[1]) == [7, 8, 9]


@pytest.mark.parametrize(
    "tell",
    [
        pytest.param(lambda cache: cache.forget([2], 5.0), id="of a row"),
        pytest.param(lambda cache: cache.clear(5.0), id="of all"),
    ],
)
def test_one_who_tells_late_of_an_earlier_write_takes_nothing_back(tell, monkeypatch):
    monkeypatch.setattr("headrace.features.row_cache.WRITTEN_SLOTS", 1)
    cache = RowCache(10.0, 100)
    tell(cache)

    cache.forget([1], 4.0)
    cache.put([2], rows_of([2]), 4.5)

    assert cache.get([2], 5.0)[1] is None


def test_it_grows_and_keeps_what_it_has():
    many = 4 * FIRST_ROWS + 1
    cache = RowCache(10.0, many)
    for first in range(0, many, 100):
        keys = list(range(first, min(first + 100, many)))
        cache.put(keys, rows_of(keys), 0.0)
    assert values_of(cache.get(list(range(many)), 0.0)[1]) == list(range(many))


def test_rows_behind_rows_have_everybodys_statuses():
    some = rows_of([1], np.array([[2, 2]], np.uint8))
    both = concatenate(some, rows_of([5, 6]))
    assert values_of(both) == [1, 5, 6]
    assert both.statuses.tolist() == [[2, 2], *[[FeatureStatus.PRESENT] * 2] * 2]


def test_a_row_there_is_no_room_for_does_not_leave_its_older_value():
    cache = RowCache(10.0, 2)
    cache.put([5, 0], rows_of([50, 0]), 0.0)
    cache.put([0, 1, 2, 3], rows_of([9, 1, 2, 3]), 1.0)
    assert cache.get([0, 5], 1.0)[1] is None
    assert values_of(cache.get([2, 3], 1.0)[1]) == [2, 3]


STEPS = st.lists(
    st.tuples(
        st.booleans(),
        st.lists(st.integers(0, 12), min_size=1, max_size=8, unique=True),
        st.integers(0, 12).map(lambda quarters: quarters / 4),  # exact: an age is a difference
    ),
    max_size=40,
)


@given(STEPS, st.integers(1, 8))
def test_it_agrees_with_a_plain_dictionary(steps, max_rows):
    """Whatever it still has, it has as a dictionary of (value, time) would."""
    cache, model, now_s, serial = RowCache(2.0, max_rows), {}, 0.0, 0
    for is_put, keys, gap_s in steps:
        now_s += gap_s
        if is_put:
            values = [serial + i for i in range(len(keys))]
            serial += len(keys)
            cache.put(keys, rows_of(values), now_s)
            model.update(zip(keys, [(value, now_s) for value in values], strict=True))
        else:
            places, rows = cache.get(keys, now_s)
            got = dict(zip([keys[i] for i in places], values_of(rows), strict=True))
            for key, value in got.items():
                assert model[key][0] == value
                assert now_s - model[key][1] <= 2.0
        assert len(cache) <= max_rows


def test_threads_get_their_own_rows():
    cache, wrong = RowCache(1e9, 50), []

    def worker(seed):
        random = np.random.default_rng(seed)
        for _ in range(400):
            keys = random.permutation(120)[:20].tolist()
            places, rows = cache.get(keys, 0.0)
            if values_of(rows) != [keys[i] for i in places]:
                wrong.append(keys)
            cache.put(keys, rows_of(keys), 0.0)

    threads = [threading.Thread(target=worker, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert wrong == []
