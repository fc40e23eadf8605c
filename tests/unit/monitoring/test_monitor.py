"""Outcomes that come late: long after their window, all at once, and still judged."""

import numpy as np
import pytest

from headrace.monitoring.monitor import MEASURED_PER_TICK, WINDOWS_KEPT, WINDOWS_SHOWN, Monitor
from headrace.monitoring.profile import build_profile
from headrace.monitoring.records import Column, PredictionRows
from headrace.monitoring.report import report
from headrace.monitoring.state import MonitorState
from headrace.monitoring.watched import Rules

ROWS = 60
PROFILE = build_profile(
    {"x": np.arange(100.0)},
    {"y": np.full(100, 10.0)},
    outcomes=np.full(10, 10.0),
    outcome_predictions=np.full(10, 11.0),
)


def rows(number):
    values = np.full(ROWS, 10.0)
    numbers = np.arange(ROWS) + number
    return PredictionRows(
        *("m", 1, 0.0, "p", numbers, np.ones(ROWS, np.int64), ROWS),
        {"x": Column(values, None)},
        {"y": Column(values, None)},
    )


@pytest.fixture
def told():
    return []


@pytest.fixture
def monitor(told):
    return Monitor(
        Rules(window_s=1, rows_min=ROWS),
        MonitorState(None),
        lambda *_: PROFILE,
        lambda _, body: told.append(body),
    )


def predict(monitor, windows):
    for window in range(windows):
        monitor.fold(rows(window * ROWS), 10.0 * window)
        monitor.tick(10.0 * window + 5)
    return 10.0 * windows


def outcomes(windows, value):
    return [("p", window * ROWS + i, 0, value) for window in windows for i in range(ROWS)]


def known(monitor, now_s):
    return report(monitor, now_s)["versions"][0]["performance"]["windows"]


def test_outcomes_of_windows_that_are_shown_no_more_are_judged(monitor, told):
    now_s = predict(monitor, WINDOWS_SHOWN + 20)
    monitor.join(outcomes([0, 1], value=20.0))
    monitor.tick(now_s)
    assert [window["labelled"] for window in known(monitor, now_s)] == [ROWS, ROWS]
    assert any("performance.degraded" in body for body in told)


def test_outcomes_of_windows_that_are_kept_no_more_are_judged(monitor, told):
    now_s = predict(monitor, WINDOWS_KEPT + 5)
    monitor.join(outcomes([0, 1], value=20.0))
    monitor.tick(now_s)
    assert any("performance.degraded" in body for body in told)


def test_many_windows_outcomes_at_once_are_measured_some_at_a_time(monitor):
    now_s = predict(monitor, 2 * MEASURED_PER_TICK)
    monitor.join(outcomes(range(2 * MEASURED_PER_TICK), value=10.5))
    monitor.tick(now_s)
    assert len(known(monitor, now_s)) == MEASURED_PER_TICK
    monitor.tick(now_s)
    assert len(known(monitor, now_s)) == 2 * MEASURED_PER_TICK


def test_a_window_is_judged_once_however_its_outcomes_trickle_in(monitor, told):
    now_s = predict(monitor, 3)
    for i in range(ROWS):
        monitor.join([("p", i, 0, 20.0)])
        monitor.tick(now_s)
    assert told == []


def test_outcomes_of_an_open_window_wait_for_its_end(monitor):
    monitor.fold(rows(0), 0.0)
    monitor.join(outcomes([0], value=20.0))
    monitor.tick(0.5)
    assert known(monitor, 0.5) == []
    monitor.tick(2.0)
    assert known(monitor, 2.0)[0]["labelled"] == ROWS
