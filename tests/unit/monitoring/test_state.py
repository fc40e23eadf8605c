"""What the monitor keeps: still there after a restart, and bounded."""

import sqlite3

import numpy as np
import pytest

from headrace.errors import StartupError
from headrace.monitoring.counts import ColumnCounts, WindowCounts
from headrace.monitoring.state import FILENAME, MonitorState, OutcomeCounts


@pytest.fixture
def state(tmp_path):
    state = MonitorState(tmp_path)
    yield state
    state.close()


def window(start_s):
    counts = {"x": ColumnCounts(np.array([1, 2, 3]))}
    return WindowCounts(start_s, start_s + 1, 6, 0, counts, {})


def test_everything_is_there_after_a_restart(tmp_path):
    state = MonitorState(tmp_path)
    of = state.add_version("homes", 2)
    state.put_alarms(of, {"drift:x": [True, 0]})
    state.put_window(of, window(1.0), is_open=False)
    state.put_performance(of, 1.0, {"kept": 1})
    state.put_window(of, window(2.0), is_open=True)
    state.add_predictions(of, 1.0, [("p", 1, 0, 5.0)])
    state.open_incident(of, "drift", "x", 9.0, 0.3, 0.1)
    state.add_notice("body")
    state.put_source("gateway", 10, 1)
    state.close()

    again = MonitorState(tmp_path)
    (version,) = again.versions()
    assert version == (of, "homes", 2, {"drift:x": [True, 0]})
    first, second = again.windows(of, 10)
    assert (first.is_open, first.counts.start_s) == (False, 1.0)
    assert again.performance(of, 1.0) == {"kept": 1}
    assert again.performances(of, 9) == [(1.0, {"kept": 1})]
    assert second.is_open
    assert second.counts.features["x"].bins.tolist() == [1, 2, 3]
    assert again.incidents(of, 5)[0].resolved_s is None
    assert list(again.notices()) == [(1, "body")]
    assert again.source("gateway") == (10, 1)
    assert again.join_outcomes([("p", 1, 0, 6.0)])[0] == OutcomeCounts(joined=1)
    again.close()


def test_an_outcome_is_joined_once_and_another_value_does_not_replace_it(state):
    of = state.add_version("m", 1)
    state.add_predictions(of, 1.0, [("p", 1, 0, 5.0), ("p", 1, 1, 6.0)])
    outcomes = [("p", 1, 0, 5.5), ("p", 1, 0, 5.5), ("p", 1, 0, 7.0), ("q", 1, 0, 1.0)]
    counts, touched = state.join_outcomes(outcomes)
    assert counts == OutcomeCounts(joined=1, duplicate=1, conflicting=1, unknown=1)
    assert touched == {(of, 1.0)}
    assert state.labelled(of, 1.0) == (2, [(5.0, 5.5)])


def test_the_oldest_windows_predictions_go_first_and_go_whole(state):
    of = state.add_version("m", 1)
    for start_s in (1.0, 2.0, 3.0):
        state.add_predictions(of, start_s, [("p", int(start_s), row, 0.0) for row in range(10)])
    assert state.prune_predictions(keep=25, oldest_s=0.0) == 20
    assert state.labelled(of, 1.0)[0] == 0
    assert state.prune_predictions(keep=25, oldest_s=3.0) == 10
    assert state.labelled(of, 3.0)[0] == 10


def test_only_the_last_windows_are_kept(state):
    of = state.add_version("m", 1)
    for start_s in range(10):
        state.put_window(of, window(float(start_s)), is_open=False)
    state.prune_windows(of, 3)
    assert [w.counts.start_s for w in state.windows(of, 99)] == [7.0, 8.0, 9.0]


def test_an_incident_is_resolved_once(state):
    of = state.add_version("m", 1)
    opened = state.open_incident(of, "drift", "x", 1.0, 0.3, 0.1)
    assert state.resolve_incident(of, "drift", "x", 2.0) == opened
    assert state.resolve_incident(of, "drift", "x", 3.0) is None
    assert state.incidents(of, 1)[0].resolved_s == 2.0


def test_a_version_that_is_forgotten_leaves_nothing(state):
    of = state.add_version("m", 1)
    state.put_window(of, window(1.0), is_open=False)
    state.add_predictions(of, 1.0, [("p", 1, 0, 5.0)])
    state.forget_version(of)
    assert state.versions() == []
    assert state.windows(of, 9) == []
    assert state.labelled(of, 1.0) == (0, [])


def test_a_folder_that_another_monitor_uses_is_refused(state, tmp_path):
    with pytest.raises(StartupError, match="locked"):
        MonitorState(tmp_path)


def test_a_file_of_another_format_is_refused(tmp_path):
    database = sqlite3.connect(tmp_path / FILENAME)
    database.execute("PRAGMA user_version = 99")
    database.commit()
    database.close()
    with pytest.raises(StartupError, match="format 99"):
        MonitorState(tmp_path)


def test_a_file_that_is_none_is_refused(tmp_path):
    (tmp_path / FILENAME).write_bytes(b"x" * 4_096)
    with pytest.raises(StartupError, match="not a database"):
        MonitorState(tmp_path)


def test_only_the_sources_heard_of_last_are_kept(state):
    for i in range(10):
        state.put_source(f"s{i}", i, 0)
    state.put_source("s0", 99, 0)
    state.prune_sources(3)
    assert state.source("s0") == (99, 0)
    assert [state.source(f"s{i}") is None for i in (1, 7, 8, 9)] == [True, True, False, False]
