"""The monitor: late outcomes, restarts, profiles that change, a disk that is full."""

import json
import sqlite3

import numpy as np
import pytest
import structlog

from headrace.monitoring.judgement import Rules
from headrace.monitoring.monitor import RETIRED_S, VERSIONS_MAX, WINDOWS_KEPT, Monitor
from headrace.monitoring.outcomes import OUTCOMES_PER_TICK, WINDOW_COST
from headrace.monitoring.profile import build_profile
from headrace.monitoring.records import Column, PredictionRows
from headrace.monitoring.report import report
from headrace.monitoring.state import MonitorState
from headrace.monitoring.version import WINDOWS_SHOWN

ROWS = 60
PROFILE = build_profile(
    {"x": np.arange(100.0)},
    {"y": np.full(100, 10.0)},
    outcomes=np.full(10, 10.0),
    outcome_predictions=np.full(10, 11.0),
)


RULES = Rules(window_s=1, rows_min=ROWS)


def rows(number, values=None, model="m"):
    values = np.full(ROWS, 10.0) if values is None else values
    count = len(values)
    return PredictionRows(
        *(model, 1, 0.0, "p", np.arange(count) + number, np.ones(count, np.int64), count),
        {"x": Column(values, None)},
        {"y": Column(np.full(count, 10.0), None)},
    )


@pytest.fixture
def told():
    return []


@pytest.fixture
def monitor(told):
    return Monitor(RULES, MonitorState(None), lambda *_: PROFILE, lambda _, body: told.append(body))


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


def test_many_windows_outcomes_at_once_are_summed_up_some_at_a_time(monitor):
    now_s = predict(monitor, 100)
    monitor.join(outcomes(range(100), value=10.5))
    found = []
    for _ in range(3):
        monitor.tick(now_s)
        found.append(len(known(monitor, now_s)))
    at_most = OUTCOMES_PER_TICK // (WINDOW_COST + ROWS) + 1
    assert found[0] == at_most
    assert at_most < found[1] <= 2 * at_most
    assert found[2] == 100


def test_each_version_has_its_turn_however_many_outcomes_another_gets():
    monitor = Monitor(RULES, MonitorState(None), lambda *_: PROFILE)
    for window in range(200):
        monitor.fold(rows(window * ROWS, model="a"), 10.0 * window)
        monitor.tick(10.0 * window + 5)
    monitor.fold(rows(1_000_000, model="b"), 3_000.0)
    monitor.tick(3_005.0)
    monitor.join([*outcomes(range(200), value=10.5), ("p", 1_000_000, 0, 10.5)])
    monitor.tick(3_010.0)
    monitor.tick(3_011.0)
    assert report(monitor, 3_012.0)["versions"][1]["performance"]["windows"]


def test_a_window_is_judged_once_however_its_outcomes_trickle_in(monitor, told):
    now_s = predict(monitor, 3)
    for i in range(ROWS):
        monitor.join([("p", i, 0, 20.0)])
        monitor.tick(now_s)
    assert told == []


def test_outcomes_find_rows_of_a_request_that_was_answered_in_parts(monitor):
    first, second = rows(0), rows(0)
    of_one = {"request_numbers": np.array([7]), "request_rows": np.array([ROWS])}
    monitor.fold(first._replace(**of_one), 0.0)
    monitor.fold(second._replace(**of_one, first_rows=np.array([ROWS])), 0.0)

    found = monitor.join([("p", 7, row, 10.5) for row in (0, ROWS - 1, ROWS, 2 * ROWS - 1)])

    assert found.joined == 4


def test_outcomes_of_an_open_window_wait_for_its_end(monitor):
    monitor.fold(rows(0), 0.0)
    monitor.join(outcomes([0], value=20.0))
    monitor.tick(0.5)
    assert known(monitor, 0.5) == []
    monitor.tick(2.0)
    assert known(monitor, 2.0)[0]["labelled"] == ROWS


def test_outcomes_that_came_just_before_a_restart_are_judged_after_it(tmp_path):
    state = MonitorState(tmp_path)
    now_s = predict(monitor := Monitor(RULES, state, lambda *_: PROFILE), 110)
    monitor.join(outcomes(range(110), value=20.0))
    monitor.tick(now_s)
    state.close()
    told = []
    monitor = restarted(tmp_path, now_s, told)
    for _ in range(3):
        monitor.tick(now_s)
    assert len(known(monitor, now_s)) == 110
    assert len(told) <= 1, "judged once"


def restarted(folder, now_s, told=None, profile=PROFILE):
    notify = None if told is None else lambda _, body: told.append(body)
    return Monitor(RULES, MonitorState(folder), lambda *_: profile, notify, now_s=now_s)


def profile_of(values):
    return build_profile({"x": values}, {"y": np.full(100, 10.0)})


NORMAL = np.random.default_rng(0).normal(0, 1, 5_000)


def drift(monitor, windows, shift, start_s=0.0):
    """Fold and end windows of 1,000 rows; return the time."""
    rng = np.random.default_rng(1)
    for window in range(windows):
        now_s = start_s + 10.0 * window
        monitor.fold(rows(int(now_s) * 1_000, rng.normal(shift, 1, 1_000)), now_s)
        monitor.tick(now_s + 5)
    return start_s + 10.0 * windows


@pytest.mark.parametrize(
    ("shift", "later_s", "verdict"), [(0.0, 0.0, "ok"), (3.0, 0.0, "alarm"), (0.0, 9e3, "quiet")]
)
def test_a_restart_changes_no_verdict(tmp_path, shift, later_s, verdict):
    state = MonitorState(tmp_path)
    monitor = Monitor(RULES, state, lambda *_: profile_of(NORMAL))
    now_s = drift(monitor, 3, shift) + later_s
    before = report(monitor, now_s)["versions"][0]
    state.close()
    after = report(restarted(tmp_path, now_s, profile=profile_of(NORMAL)), now_s)["versions"][0]
    assert before["verdict"] == verdict
    assert {**after, "rows": 0} == {**before, "rows": 0}


def test_a_window_does_not_go_on_against_a_profile_written_while_the_monitor_was_away(tmp_path):
    state = MonitorState(tmp_path)
    monitor = Monitor(RULES, state, lambda *_: profile_of(NORMAL))
    monitor.fold(rows(0, NORMAL[:50]), 0.0)
    monitor.tick(0.5)
    state.close()
    monitor = restarted(tmp_path, 10.0, profile=profile_of(NORMAL + 50))
    (record,) = monitor.versions.values()
    assert record.watched.open is None
    assert [window.counts.rows for window in record.windows] == [50]
    assert not any(window.is_open for window in monitor._state.windows(record.id, 9))


def test_a_profile_replaced_in_place_ends_the_window_and_judges_the_next():
    profile = profile_of(NORMAL)
    monitor = Monitor(RULES, MonitorState(None), lambda *_: profile, lambda _, body: None)
    drift(monitor, 1, 0.0)
    monitor.fold(rows(500_000, NORMAL[:30]), 20.0)
    profile = profile_of(NORMAL + 50)
    monitor.tick(20.5)
    drift(monitor, 3, 50.0, start_s=30.0)
    version = report(monitor, 70.0)["versions"][0]
    assert [window["rows"] for window in version["windows"]] == [1_000, 30, 1_000, 1_000, 1_000]
    (column,) = version["features"]
    assert column["drift_history"][:2] == [None, None], "they are in the old profile's bins"
    assert max(map(abs, column["drift_history"][2:])) < 0.05
    assert version["alarms"] == []


def test_an_alarm_of_a_column_that_the_new_profile_lacks_is_ended_and_told():
    profile, told = profile_of(NORMAL), []
    monitor = Monitor(RULES, MonitorState(None), lambda *_: profile, lambda _, b: told.append(b))
    drift(monitor, 2, 3.0)
    profile = build_profile({}, {"y": np.full(100, 10.0)})
    monitor.tick(30.0)
    version = report(monitor, 31.0)["versions"][0]
    assert version["alarms"] == []
    assert all(incident["resolved"] for incident in version["incidents"])
    assert len(told) == 2 * len(version["incidents"]) > 0


def test_a_profile_of_other_names_is_an_alarm_and_is_said():
    profile = build_profile({"other": NORMAL}, {"z": np.full(100, 10.0)})
    monitor = Monitor(RULES, MonitorState(None), lambda *_: profile)
    with structlog.testing.capture_logs() as lines:
        drift(monitor, 3, 0.0)
    (line,) = [line for line in lines if line["event"] == "profile_and_rows_differ"]
    assert (line["only_in_profile"], line["only_in_rows"]) == (("other", "z"), ("x", "y"))
    version = report(monitor, 40.0)["versions"][0]
    assert version["verdict"] == "alarm"
    assert version["unmatched"] == {"in_profile": ["other", "z"], "in_rows": ["x", "y"]}


def test_an_open_window_keeps_its_predictions_and_what_has_no_place_is_counted():
    rules = Rules(window_s=60, rows_min=ROWS)
    monitor = Monitor(rules, MonitorState(None), lambda *_: PROFILE, kept_max=1_000)
    kept = []
    for i in range(4):
        monitor.fold(rows(i * 600, np.full(600, 10.0)), float(i))
        monitor.tick(i + 0.5)
        kept.append(monitor.outcomes.kept)
    assert kept == [600, 1_000, 1_000, 1_000]
    assert monitor.outcomes.not_kept == 4 * 600 - 1_000
    monitor.tick(100.0)
    monitor.tick(101.0)
    monitor.fold(rows(9_000, np.full(600, 10.0)), 102.0)
    assert (monitor.outcomes.kept, monitor.outcomes.not_kept) == (600, 1_400)


def test_windows_go_before_there_is_no_place_for_new_ones():
    monitor = Monitor(RULES, MonitorState(None), lambda *_: PROFILE, kept_max=ROWS * 20)
    predict(monitor, 100)
    assert monitor.outcomes.not_kept == 0
    assert monitor.outcomes.kept <= ROWS * 20


class Full:
    """Makes a state's method fail, as on a disk that is full."""

    def __init__(self, monkeypatch, of, name):
        self.is_full = False
        method = getattr(of, name)

        def fail(*arguments, **more):
            if self.is_full:
                raise sqlite3.OperationalError("database or disk is full")
            return method(*arguments, **more)

        monkeypatch.setattr(of, name, fail)


@pytest.mark.parametrize(
    "name", ["put_window", "put_judgement", "open_incident", "add_notice", "commit"]
)
def test_an_alarm_that_could_not_be_written_is_told_when_it_can(monkeypatch, name):
    state, told = MonitorState(None), []
    monitor = Monitor(RULES, state, lambda *_: profile_of(NORMAL), lambda _, b: told.append(b))
    full = Full(monkeypatch, state, name)
    drift(monitor, 1, 3.0)
    full.is_full = True
    drift(monitor, 1, 3.0, start_s=10.0)
    assert told == []
    full.is_full = False
    monitor.tick(20.0)
    (record,) = monitor.versions.values()
    alarmed = {(str(s), name) for s, name in record.watched.judgement.alarmed}
    assert ("drift", "x") in alarmed
    assert {(i.signal, i.subject) for i in monitor.incidents(record)} == alarmed
    assert len(told) == len(alarmed)
    assert [window.counts.rows for window in record.windows] == [1_000, 1_000]


def test_one_version_that_cannot_be_judged_keeps_no_other_from_its_window():
    def find(model, _version):
        if model == "a" and is_broken:
            raise RuntimeError("broken")
        return PROFILE

    is_broken = False
    monitor = Monitor(RULES, MonitorState(None), find)
    for model in "abc":
        monitor.fold(rows(0, model=model), 0.0)
    is_broken = True
    monitor.tick(5.0)
    ended = {key[0]: len(record.windows) for key, record in monitor.versions.items()}
    assert ended == {"a": 0, "b": 1, "c": 1}


def test_predictions_that_could_not_be_written_are_counted_rows_all_the_same(monkeypatch):
    state = MonitorState(None)
    monitor = Monitor(RULES, state, lambda *_: PROFILE)
    Full(monkeypatch, state.kept, "add").is_full = True
    monitor.fold(rows(0), 0.0)
    (record,) = monitor.versions.values()
    assert record.watched.open.rows == ROWS
    assert monitor.outcomes.not_kept == ROWS


def test_a_monitor_without_traffic_writes_nothing():
    state = MonitorState(None)
    monitor = Monitor(RULES, state, lambda *_: PROFILE)
    predict(monitor, 2)
    monitor.fold(rows(9_000), 30.0)
    monitor.tick(30.5)
    before = state._db.total_changes
    for i in range(20):
        monitor.tick(30.5 + i / 100)
    assert state._db.total_changes == before


def test_the_alarms_of_a_quiet_version_stay_until_it_is_out_of_service():
    told = []
    monitor = Monitor(
        *(RULES, MonitorState(None), lambda *_: profile_of(NORMAL), lambda _, b: told.append(b))
    )
    now_s = drift(monitor, 2, 3.0)
    monitor.fold(rows(0), now_s)
    opened = len(told)
    monitor.tick(now_s + 9_000)
    version = report(monitor, now_s + 9_000)["versions"][0]
    assert version["verdict"] == "quiet"
    assert len(version["alarms"]) == opened > 0
    monitor.tick(now_s + RETIRED_S + 10)
    version = report(monitor, now_s + RETIRED_S + 10)["versions"][0]
    assert (version["alarms"], version["open_window"]) == ([], None)
    types = [json.loads(body)["type"] for body in told[opened:]]
    assert types == ["io.headrace.recovered"] * opened


def test_an_error_found_long_after_the_last_row_is_an_alarm_for_a_week(monitor):
    now_s = predict(monitor, 2) + 2 * RETIRED_S
    monitor.tick(now_s)
    monitor.join(outcomes([0, 1], value=20.0))
    monitor.tick(now_s)
    alarms = [{"signal": "error", "column": "y"}]
    assert report(monitor, now_s)["versions"][0]["alarms"] == alarms
    monitor.tick(now_s + RETIRED_S / 2)
    assert report(monitor, now_s)["versions"][0]["alarms"] == alarms
    monitor.tick(now_s + RETIRED_S + 1)
    assert report(monitor, now_s)["versions"][0]["alarms"] == []


def test_made_up_names_push_out_no_version_that_has_a_profile():
    monitor = Monitor(RULES, MonitorState(None), lambda model, _: PROFILE if model == "m" else None)
    monitor.fold(rows(0), 0.0)
    with structlog.testing.capture_logs() as lines:
        for i in range(VERSIONS_MAX + 20):
            monitor.fold(rows(i * ROWS, model=f"made up {i}"), 1.0 + i)
    assert len(monitor.versions) == VERSIONS_MAX
    assert ("m", 1) in monitor.versions
    assert [line["event"] for line in lines].count("version_forgotten") == 21


def test_where_the_reference_error_is_zero_it_is_said_that_none_is_judged():
    ones = np.ones(10)
    profile = build_profile({}, {"y": ones}, outcomes=ones, outcome_predictions=ones)
    monitor = Monitor(RULES, MonitorState(None), lambda *_: profile)
    with structlog.testing.capture_logs() as lines:
        monitor.fold(rows(0), 0.0)
    assert [line["error_is_judged"] for line in lines] == [False]
