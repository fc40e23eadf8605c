"""What a question's rounds say: a ratio, an interval, a verdict."""

from itertools import product
from statistics import median

import pytest
from hypothesis import given
from hypothesis import strategies as st


def question(bench, target=None, figure="requests_per_s"):
    side = bench.contest.Side("anybody", bench.contest.Load("tensor"))
    return bench.contest.Question("name", "title", side, side, figure, target)


def contest(bench, first, second, target=None):
    """A contest of so many requests per second in each round."""
    rounds = [
        tuple({"requests_per_s": rate, "cpu_us": 1e6 / rate} for rate in rates)
        for rates in zip(first, second, strict=True)
    ]
    return bench.contest.Contest(question(bench, target), rounds)


def at_least(bench, bound):
    return bench.contest.Target(bound)


def test_a_ratio_is_the_median_of_the_rounds_so_that_one_odd_round_decides_nothing(bench):
    found = contest(bench, [80, 1, 82], [100, 100, 100], at_least(bench, 0.75))

    assert found.ratio == pytest.approx(0.8)
    assert found.verdict.startswith("met")


def test_what_slows_the_machine_in_a_round_is_in_both_figures_and_changes_nothing(bench):
    found = contest(bench, [80, 40, 8], [100, 50, 10])

    assert found.ratio == pytest.approx(0.8)
    assert found.interval[:2] == pytest.approx((0.8, 0.8))


@pytest.mark.parametrize(
    ("bound", "is_most", "ratio", "is_met"),
    [
        (0.8, False, 0.80, True),
        (0.8, False, 0.79, False),
        (1.2, True, 1.20, True),
        (1.2, True, 1.21, False),
    ],
)
def test_a_target_is_met_at_its_bound_and_missed_beyond(bench, bound, is_most, ratio, is_met):
    target = bench.contest.Target(bound, is_most)
    found = contest(bench, [100 * ratio] * 7, [100] * 7, target)

    assert found.verdict == ("met" if is_met else "missed")
    assert found.is_missed is not is_met


@pytest.mark.parametrize(
    ("ratios", "verdict"),
    [
        ([0.98, 0.99, 0.98, 0.99, 0.98, 0.99], "met"),
        ([0.90, 0.98, 0.98, 0.98, 0.98, 0.98], "met, barely"),
        ([0.96, 0.96, 0.96, 0.96, 0.96, 0.98], "missed, barely"),
        ([0.96, 0.96, 0.96, 0.96, 0.96, 0.96], "missed"),
    ],
)
def test_the_median_decides_and_the_interval_says_how_barely(bench, ratios, verdict):
    found = contest(bench, ratios, [1] * 6, at_least(bench, 0.97))

    assert found.verdict == verdict


def test_a_question_that_was_not_answered_misses_no_target(bench):
    of = question(bench, at_least(bench, 0.97))
    skipped = bench.contest.Contest(of, skipped="not here")
    failed = contest(bench, [1], [100], at_least(bench, 0.97))
    failed.failure = "answered wrongly"

    assert (skipped.verdict, skipped.is_missed) == ("skipped", False)
    assert (failed.verdict, failed.is_missed) == ("failed", False)
    assert contest(bench, [1], [100]).verdict == "reported"


def test_processor_time_is_compared_beside_the_figure(bench):
    assert contest(bench, [80, 80, 80], [100, 100, 100]).cpu_ratio == pytest.approx(1.25)


@pytest.mark.parametrize("n", range(1, 13))
def test_an_interval_covers_as_often_as_it_says_and_one_narrower_not_often_enough(bench, n):
    """Each value lies above the median or below it with equal chance: all ways are counted."""
    interval = bench.contest.median_interval(range(1, n + 1))
    k = interval.low

    def coverage(k):
        below = [sum(signs) for signs in product((0, 1), repeat=n)]
        return sum(k <= count <= n - k for count in below) / 2**n

    assert interval.high == n + 1 - k
    assert interval.coverage == pytest.approx(coverage(k))
    assert interval.coverage >= 0.95 or k == 1
    assert 2 * (k + 1) > n or coverage(k + 1) < 0.95


@given(values=st.lists(st.floats(0.1, 10), min_size=1, max_size=40), data=st.data())
def test_an_interval_holds_the_median_in_whatever_order_the_rounds_came(bench, values, data):
    low, high, _ = bench.contest.median_interval(values)

    assert low <= median(values) <= high
    shuffled = data.draw(st.permutations(values))
    assert bench.contest.median_interval(shuffled)[:2] == (low, high)


def test_windows_count_by_what_they_hold_and_not_one_like_the_other(bench):
    windows = [
        {"requests": 100, "requests_per_s": 100, "mean_ms": 1.0},  # a second
        {"requests": 50, "requests_per_s": 25, "mean_ms": 4.0},  # two
    ]

    found = bench.contest.together(windows, cpu_s=0.3, rows=200)

    assert found["requests_per_s"] == pytest.approx(50)
    assert found["rows_per_s"] == pytest.approx(10_000)
    assert found["mean_ms"] == pytest.approx(2.0)
    assert found["cpu_us"] == pytest.approx(2_000)
    assert found["requests_per_cpu_s"] == pytest.approx(500)
    assert set(bench.contest.FIGURES) <= set(found)


def test_the_generator_s_own_figures_are_weighed_by_time_and_known_only_where_it_ran(bench):
    one = {"requests": 100, "requests_per_s": 100, "mean_ms": 1.0}  # a second
    other = {"requests": 300, "requests_per_s": 100, "mean_ms": 1.0}  # three
    told = [
        one | {"generator_idle_share": 0.0, "generator_cpu_share": 0.8},
        other | {"generator_idle_share": 0.4, "generator_cpu_share": 0.4},
    ]

    found = bench.contest.together(told, cpu_s=1.0, rows=1)

    assert found["generator_idle_share"] == pytest.approx(0.3)
    assert found["generator_cpu_ms"] == pytest.approx(1e3 * 2.0 / 400)
    untold = bench.contest.together([one, told[1]], cpu_s=1.0, rows=1)
    assert not any(name.startswith("generator") for name in untold)
