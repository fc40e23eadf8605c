"""Judging ages: a pure function that every store shares."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from headrace.features.plan import FeatureSource, FeatureStatus, ViewSource, compile_plan
from headrace.features.store import mark_outside_max_age
from headrace.features.values import ValueType

PRESENT, NULL, NOT_FOUND, OUTSIDE = FeatureStatus
KEY = (("id", "id", ValueType.INT64),)


def plan_of(*ttls_s):
    return compile_plan(
        "service",
        "demo",
        "1",
        [
            ViewSource(f"v{i}", KEY, (FeatureSource(f"f{i}", ValueType.FLOAT),), ttl_s)
            for i, ttl_s in enumerate(ttls_s)
        ],
    )


def marked(plan, statuses, times_s, now_s, max_age_s=None):
    statuses = np.array(statuses, np.uint8)
    mark_outside_max_age(plan, statuses, np.array(times_s, float), now_s, max_age_s)
    return statuses.tolist()


def test_only_what_is_present_can_be_too_old():
    statuses = [[PRESENT, NULL, NOT_FOUND, PRESENT]]
    times_s = [[0.0, 0.0, np.nan, 95.0]]
    assert marked(plan_of(10.0), statuses, times_s, 100.0) == [[OUTSIDE, NULL, NOT_FOUND, PRESENT]]


def test_a_value_of_unknown_age_is_too_old_where_there_is_a_limit():
    assert marked(plan_of(10.0, None), [[PRESENT]] * 2, [[np.nan]] * 2, 100.0) == [
        [OUTSIDE],
        [PRESENT],
    ]


def test_a_value_from_the_future_is_not_too_old():
    assert marked(plan_of(10.0), [[PRESENT]], [[1e6]], 100.0) == [[PRESENT]]


AGES = st.integers(-100, 200)
LIMITS = st.none() | st.integers(1, 200)


@given(st.lists(st.tuples(LIMITS, st.lists(AGES, min_size=3, max_size=3)), min_size=1), LIMITS)
def test_the_smaller_limit_decides_feature_by_feature(views, max_age_s):
    plan = plan_of(*(None if ttl_s is None else float(ttl_s) for ttl_s, _ in views))
    times_s = [[1000.0 - age_s for age_s in ages] for _, ages in views]
    expected = [
        [
            OUTSIDE
            if any(limit is not None and age_s > limit for limit in (ttl_s, max_age_s))
            else PRESENT
            for age_s in ages
        ]
        for ttl_s, ages in views
    ]
    assert marked(plan, [[PRESENT] * 3] * len(views), times_s, 1000.0, max_age_s) == expected
