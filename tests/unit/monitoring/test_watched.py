"""One version under watch: when it alarms and when it does not, over many seeded windows."""

import numpy as np
import pytest

from headrace.monitoring.detectors import AlarmState, Signal
from headrace.monitoring.profile import build_profile
from headrace.monitoring.records import Column, PredictionRows
from headrace.monitoring.watched import (
    Rules,
    WatchedVersion,
    alarms_from_json,
    alarms_to_json,
)

FEATURES = 20
ROWS = 1_000
RULES = Rules(window_s=60.0, rows_min=ROWS)


def table(rng, rows, features=FEATURES):
    return rng.normal(0, 1, (rows, features)).astype(np.float32)


@pytest.fixture(scope="module")
def profile():
    values = table(np.random.default_rng(1), 20_000)
    columns = {f"x{i}": values[:, i] for i in range(FEATURES)}
    return build_profile(
        columns,
        {"y": values.sum(axis=1)},
        outcomes=np.full(100, 1.0),
        outcome_predictions=np.full(100, 1.1),
    )


@pytest.fixture
def watched(profile):
    return WatchedVersion(RULES, profile)


def as_rows(values, statuses=None):
    columns = {
        f"x{i}": Column(values[:, i], None if statuses is None else statuses[:, i])
        for i in range(values.shape[1])
    }
    rows = len(values)
    return PredictionRows(
        *("m", 1, 0.0, "p", np.arange(rows), np.ones(rows, np.int64), rows),
        columns,
        {"y": Column(np.nansum(values, axis=1), None)},
    )


def run(watched, windows):
    """Give each window's values; return the changes of each window."""
    changes, now_s = [], 1_000.0
    for values in windows:
        watched.fold(as_rows(values), now_s)
        now_s += RULES.window_s
        _, found = watched.close_when_due(now_s)
        changes.append([(change.signal, change.subject, change.is_alarmed) for change in found])
    return changes


def test_two_hundred_windows_without_drift_raise_no_alarm(watched):
    rng = np.random.default_rng(2)
    changes = run(watched, (table(rng, ROWS) for _ in range(200)))
    assert not any(changes)


@pytest.mark.parametrize("seed", range(10))
def test_half_a_standard_deviation_in_one_feature_is_reported_in_two_windows(watched, seed):
    rng = np.random.default_rng(seed)
    windows = [table(rng, ROWS) for _ in range(5)]
    for values in windows[2:]:
        values[:, 7] += 0.5
    changes = run(watched, windows)
    assert changes[3] == [(Signal.DRIFT, "x7", True)]
    assert not changes[4], "once per incident"


@pytest.mark.parametrize("seed", range(10))
def test_ten_percent_missing_are_reported_in_two_windows(watched, seed):
    rng = np.random.default_rng(seed)
    windows = [table(rng, ROWS) for _ in range(4)]
    for values in windows[1:]:
        values[rng.random(ROWS) < 0.1, 3] = np.nan
    changes = run(watched, windows)
    assert (Signal.MISSING, "x3", True) in changes[2]


def test_one_value_of_a_million_changes_no_verdict(profile):
    rng = np.random.default_rng(3)
    calm = [table(rng, ROWS) for _ in range(50)]
    drifting = [table(rng, ROWS) + np.float32(0.5) for _ in range(3)]
    before = run(WatchedVersion(RULES, profile), calm + drifting)
    for values in calm + drifting:
        values[rng.integers(ROWS), rng.integers(FEATURES)] = 1e6
    after = run(WatchedVersion(RULES, profile), calm + drifting)
    assert [sorted(c) for c in before] == [sorted(c) for c in after]
    assert any(before[-2])


def test_an_alarm_ends_when_the_drift_does(watched):
    rng = np.random.default_rng(4)
    windows = [table(rng, ROWS) for _ in range(8)]
    for values in windows[:3]:
        values[:, 0] += 1
    changes = run(watched, windows)
    assert changes[1] == [(Signal.DRIFT, "x0", True)]
    assert changes[5] == [(Signal.DRIFT, "x0", False)]


def test_a_window_stays_open_until_it_has_rows_enough(watched):
    rng = np.random.default_rng(5)
    watched.fold(as_rows(table(rng, ROWS - 1)), 0.0)
    assert watched.close_when_due(1e6) is None
    watched.fold(as_rows(table(rng, 1)), 1e6)
    window, _ = watched.close_when_due(1e6)
    assert window.rows == ROWS


def test_a_window_stays_open_until_it_is_old_enough(watched):
    watched.fold(as_rows(table(np.random.default_rng(6), 5 * ROWS)), 100.0)
    assert watched.close_when_due(159.0) is None
    assert watched.close_when_due(160.0) is not None


def test_a_window_that_lost_rows_is_not_judged(watched):
    rng = np.random.default_rng(7)
    for _ in range(3):
        watched.fold(as_rows(table(rng, ROWS) + np.float32(2)), 0.0)
        watched.lose(100)
        _, changes = watched.close_when_due(60.0)
        assert not changes
    assert not watched.statistics


def test_values_that_were_too_old_are_told_from_others_that_were_missing(watched):
    values = table(np.random.default_rng(8), ROWS)
    statuses = np.ones(values.shape, np.uint8)
    statuses[:100, 2] = 4
    for now_s in (0.0, 60.0):
        watched.fold(as_rows(values, statuses), now_s)
        _, changes = watched.close_when_due(now_s + 60)
    assert {(c.signal, c.subject) for c in changes} == {
        (Signal.STALE, "x2"),
        (Signal.MISSING, "x2"),
    }


def test_without_a_reference_nothing_is_judged():
    watched = WatchedVersion(RULES, None)
    changes = run(watched, [table(np.random.default_rng(9), ROWS) * 1e9 for _ in range(5)])
    assert not any(changes)


def judged(watched, ratio, labelled=500, kept=600):
    performance = watched.measure(kept, [(ratio, 1.0)] * labelled)
    return [change.is_alarmed for change in watched.judge_performance(performance)]


def test_an_error_half_again_as_large_as_in_training_is_reported(watched):
    assert judged(watched, 1.16) == []
    assert judged(watched, 1.16) == [True]
    assert [judged(watched, 1.1) for _ in range(3)] == [[], [], [False]]


def test_too_few_outcomes_are_no_evidence(watched):
    for _ in range(5):
        assert judged(watched, 3.0, labelled=49, kept=49) == []
        assert judged(watched, 3.0, labelled=299, kept=600) == []


def test_a_window_is_judged_by_its_outcomes_once(watched):
    performance = watched.measure(100, [(3.0, 1.0)] * 100)
    for _ in range(3):
        assert watched.judge_performance(performance) == []


def test_alarms_read_as_they_were_written():
    alarms = {
        (Signal.DRIFT, "a:b"): AlarmState(is_alarmed=True),
        (Signal.MISSING, "c"): AlarmState(streak=1),
        (Signal.STALE, "d"): AlarmState(),
    }
    read = alarms_from_json(alarms_to_json(alarms))
    assert read == {key: state for key, state in alarms.items() if state != AlarmState()}


def test_an_open_window_goes_on_after_a_restart(watched, profile):
    rng = np.random.default_rng(10)
    watched.fold(as_rows(table(rng, 600)), 0.0)
    later = WatchedVersion(RULES, profile, watched.alarms)
    assert later.resume(watched.open)
    later.fold(as_rows(table(rng, 400)), 30.0)
    window, _ = later.close_when_due(60.0)
    assert (window.rows, window.start_s) == (1_000, 0.0)


def test_a_window_counted_against_another_reference_does_not_go_on(watched):
    watched.fold(as_rows(table(np.random.default_rng(11), 600)), 0.0)
    assert not WatchedVersion(RULES, None).resume(watched.open)
