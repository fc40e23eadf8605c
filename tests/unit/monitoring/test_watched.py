"""One version under watch: when it alarms and when it does not, over many seeded windows."""

import json
from dataclasses import replace
from itertools import count

import numpy as np
import pytest

from headrace.monitoring.detectors import AlarmState, Signal
from headrace.monitoring.judgement import ROLLED_UP_MAX, Judgement, Rules, measure
from headrace.monitoring.profile import RATIO_MAX, build_profile
from headrace.monitoring.records import Column, PredictionRows
from headrace.monitoring.watched import Unmatched, WatchedVersion

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
        _, found = watched.end_when_due(now_s)
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
    assert watched.end_when_due(1e6) is None
    watched.fold(as_rows(table(rng, 1)), 1e6)
    window, _ = watched.end_when_due(1e6)
    assert window.rows == ROWS


def test_a_window_stays_open_until_it_is_old_enough(watched):
    watched.fold(as_rows(table(np.random.default_rng(6), 5 * ROWS)), 100.0)
    assert watched.end_when_due(159.0) is None
    assert watched.end_when_due(160.0) is not None


def test_a_window_that_lost_rows_is_not_judged(watched):
    rng = np.random.default_rng(7)
    for _ in range(3):
        watched.fold(as_rows(table(rng, ROWS) + np.float32(2)), 0.0)
        watched.lose(100)
        _, changes = watched.end_when_due(60.0)
        assert not changes
    assert not watched.judgement.statistics


def test_values_that_were_too_old_are_told_from_others_that_were_missing(watched):
    values = table(np.random.default_rng(8), ROWS)
    statuses = np.ones(values.shape, np.uint8)
    statuses[:100, 2] = 4
    for now_s in (0.0, 60.0):
        watched.fold(as_rows(values, statuses), now_s)
        _, changes = watched.end_when_due(now_s + 60)
    assert {(c.signal, c.subject) for c in changes} == {
        (Signal.STALE, "x2"),
        (Signal.MISSING, "x2"),
    }


def test_without_a_reference_nothing_is_judged():
    watched = WatchedVersion(RULES, None)
    changes = run(watched, [table(np.random.default_rng(9), ROWS) * 1e9 for _ in range(5)])
    assert not any(changes)


STARTS = count(1.0)


def judged(watched, ratio, labelled=500, kept=600, start_s=None):
    performance = measure(kept, [(ratio, 1.0)] * labelled)
    start_s = next(STARTS) if start_s is None else start_s
    return [change.is_alarmed for change in watched.judge_error(performance, start_s)]


def test_an_error_half_again_as_large_as_in_training_is_reported(watched):
    assert judged(watched, 1.16) == []
    assert judged(watched, 1.16) == [True]
    assert [judged(watched, 1.1) for _ in range(3)] == [[], [], [False]]


def test_too_few_outcomes_are_no_evidence(watched):
    for _ in range(5):
        assert judged(watched, 3.0, labelled=49, kept=49) == []
        assert judged(watched, 3.0, labelled=299, kept=600) == []


def test_a_window_is_judged_by_its_outcomes_once(watched):
    performance = measure(100, [(3.0, 1.0)] * 100)
    for start_s in range(3):
        assert watched.judge_error(performance, start_s) == []


def test_what_is_learnt_of_older_windows_later_ends_no_alarm(watched):
    assert [judged(watched, 3.0, start_s=s) for s in (5.0, 6.0)] == [[], [True]]
    assert [judged(watched, 1.0, start_s=s) for s in (1.0, 2.0, 3.0, 4.0)] == [[]] * 4
    assert [judged(watched, 1.0, start_s=s) for s in (7.0, 8.0, 9.0)] == [[], [], [False]]


def test_outcomes_of_zero_are_counted_and_are_no_evidence(watched):
    pairs = [(3.0, 0.0)] * 80 + [(3.0, 1.0)] * 49
    performance = measure(129, pairs)
    assert (performance.labelled, performance.undefined, performance.error) == (129, 80, 2.0)
    for start_s in range(3):
        assert watched.judge_error(measure(129, pairs), start_s) == []
    assert not watched.judgement.statistics


def test_an_outcome_next_to_nothing_makes_nothing_infinite(watched):
    performance = measure(60, [(1.0, 5e-324), (-1.0, 5e-324)] * 30)
    assert (performance.error, performance.bias) == (RATIO_MAX, 0.0)
    watched.judge_error(performance, 1.0)
    assert np.isfinite(list(watched.judgement.statistics.values())).all()


def test_alarms_read_as_they_were_written():
    alarms = {
        (Signal.DRIFT, "a:b"): AlarmState(is_alarmed=True),
        (Signal.MISSING, "c"): AlarmState(streak=1),
    }
    silent = {(Signal.STALE, "d"): AlarmState()}
    judgement = Judgement("digest", {**alarms, **silent}, {(Signal.DRIFT, "a:b"): 0.5}, {}, 7.0)
    read = Judgement.from_json(json.loads(json.dumps(judgement.to_json())))
    assert read == replace(judgement, alarms=alarms)
    assert Judgement.from_json(json.loads(json.dumps(Judgement().to_json()))) == Judgement()


def test_an_open_window_goes_on_after_a_restart(watched, profile):
    rng = np.random.default_rng(10)
    watched.fold(as_rows(table(rng, 600)), 0.0)
    later = WatchedVersion(RULES, profile, watched.judgement)
    assert later.resume(watched.open)
    later.fold(as_rows(table(rng, 400)), 30.0)
    window, _ = later.end_when_due(60.0)
    assert (window.rows, window.start_s) == (1_000, 0.0)


def test_a_window_counted_against_another_reference_does_not_go_on(watched):
    watched.fold(as_rows(table(np.random.default_rng(11), 600)), 0.0)
    assert not WatchedVersion(RULES, None).resume(watched.open)
    values = table(np.random.default_rng(12), 5_000) + np.float32(50)
    retrained = build_profile({f"x{i}": values[:, i] for i in range(FEATURES)}, {"y": values[:, 0]})
    assert not WatchedVersion(RULES, retrained).resume(watched.open)


def without(values, *columns):
    rows = as_rows(values)
    return rows._replace(features={n: c for n, c in rows.features.items() if n not in columns})


def fold_and_end(watched, rows, now_s):
    watched.fold(rows, now_s)
    return watched.end_when_due(now_s + RULES.window_s)


def test_a_column_that_never_comes_is_missing(watched):
    rng = np.random.default_rng(13)
    for now_s in (0.0, 100.0):
        window, changes = fold_and_end(watched, without(table(rng, ROWS), "x3"), now_s)
    assert [(c.signal, c.subject, c.statistic) for c in changes] == [(Signal.MISSING, "x3", 1.0)]
    assert window.features["x3"].missing == ROWS


def test_rows_that_come_without_a_column_miss_its_value(watched):
    rng = np.random.default_rng(14)
    for now_s in (0.0, 100.0):
        watched.fold(without(table(rng, ROWS // 5), "x3"), now_s)
        _, changes = fold_and_end(watched, as_rows(table(rng, ROWS)), now_s)
    assert [(c.signal, c.subject) for c in changes] == [(Signal.MISSING, "x3")]
    assert changes[0].statistic == pytest.approx(1 / 6)


def test_an_output_that_never_comes_is_missing(watched):
    rng = np.random.default_rng(15)
    for now_s in (0.0, 100.0):
        rows = as_rows(table(rng, ROWS))
        rows = rows._replace(predictions={"z": rows.predictions["y"]})
        _, changes = fold_and_end(watched, rows, now_s)
    assert [(c.signal, c.subject) for c in changes] == [(Signal.PREDICTION_MISSING, "y")]


def test_names_that_only_one_side_has_are_known(watched):
    assert watched.unmatched == Unmatched()
    rows = without(table(np.random.default_rng(16), ROWS), "x1", "x2")
    rows.features["other"] = rows.features["x0"]
    watched.fold(rows, 0.0)
    assert watched.unmatched == Unmatched(("x1", "x2"), ("other",))


def sparse(rng, shift=0.0, share=0.4):
    """Values of one column, most of them missing as they were in training."""
    values = table(rng, ROWS, 1) + np.float32(shift)
    values[rng.random(ROWS) >= share] = np.nan
    return values


@pytest.fixture
def watched_sparse():
    values = sparse(np.random.default_rng(17))
    return WatchedVersion(RULES, build_profile({"x0": values[:, 0]}, {"y": np.arange(100.0)}))


def drift_changes(watched, shift, windows, share=0.4):
    rng, found = np.random.default_rng(18), []
    for _ in range(windows):
        start_s = next(STARTS) * 1_000
        _, changes = fold_and_end(watched, as_rows(sparse(rng, shift, share)), start_s)
        found.append([c.is_alarmed for c in changes if c.signal == Signal.DRIFT])
    return found


def test_a_column_with_few_values_is_judged_over_several_windows(watched_sparse):
    assert drift_changes(watched_sparse, 1.0, 4) == [[], [], [], [True]]
    assert drift_changes(watched_sparse, 0.0, 6) == [[], [], [], [], [], [False]]


def test_values_of_several_windows_wait_over_a_restart(watched_sparse):
    drift_changes(watched_sparse, 1.0, 3)
    document = json.loads(json.dumps(watched_sparse.judgement.to_json()))
    reference = watched_sparse.reference
    restarted = WatchedVersion(RULES, reference, Judgement.from_json(document))
    assert drift_changes(restarted, 1.0, 1) == [[True]]


def test_a_drift_alarm_ends_when_its_column_has_no_values_any_more(watched_sparse):
    drift_changes(watched_sparse, 1.0, 4)
    assert drift_changes(watched_sparse, 1.0, ROLLED_UP_MAX, share=0.0)[-1] == [False]
    assert (Signal.DRIFT, "x0") not in watched_sparse.judgement.statistics


def test_another_profile_ends_the_alarms_of_columns_it_does_not_have(watched):
    rng = np.random.default_rng(19)
    for now_s in (0.0, 100.0):
        fold_and_end(watched, as_rows(table(rng, ROWS) + np.float32(1)), now_s)
    values = table(rng, 5_000)
    changes = watched.set_reference(build_profile({"x0": values[:, 0]}, {"y": values[:, 0]}))
    assert {(c.signal, c.subject, c.is_alarmed) for c in changes} == {
        (Signal.DRIFT, f"x{i}", False) for i in range(1, FEATURES)
    }
    kept = {(Signal.DRIFT, "x0"), (Signal.PREDICTION_DRIFT, "y")}
    assert set(watched.judgement.alarmed) == kept
    assert not watched.judgement.statistics


def test_a_profile_that_is_gone_is_no_recovery(watched, profile):
    rng = np.random.default_rng(20)
    for now_s in (0.0, 100.0):
        fold_and_end(watched, as_rows(table(rng, ROWS) + np.float32(1)), now_s)
    before = watched.judgement
    assert watched.set_reference(None) == watched.set_reference(profile) == []
    assert watched.judgement == before
