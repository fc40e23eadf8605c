"""What the monitor keeps: still there after a restart, and bounded."""

import sqlite3

import numpy as np
import pytest

from headrace.errors import StartupError
from headrace.monitoring.counts import UNKNOWN_REFERENCE, ColumnCounts, WindowCounts
from headrace.monitoring.kept import OutcomeCounts
from headrace.monitoring.state import FILENAME, MonitorState


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
    state.put_judgement(of, {"alarms": {"drift:x": [True, 0]}})
    state.put_last_rows(of, 2.5)
    state.put_window(of, window(1.0), is_open=False)
    state.kept.put_performance(of, 1.0, {"kept": 1})
    state.put_window(of, window(2.0), is_open=True)
    state.kept.add(of, 1.0, [("p", 1, 0, 5.0)])
    state.open_incident(of, "drift", "x", 9.0, 0.3, 0.1)
    state.add_notice("body")
    state.put_source("gateway", 10, 1)
    state.close()

    again = MonitorState(tmp_path)
    (version,) = again.versions()
    assert version == (of, "homes", 2, {"alarms": {"drift:x": [True, 0]}}, 2.5)
    first, second = again.windows(of, 10)
    assert (first.is_open, first.counts.start_s) == (False, 1.0)
    assert again.kept.performance(of, 1.0) == {"kept": 1}
    assert again.kept.performances(of, 9) == [(1.0, {"kept": 1})]
    assert second.is_open
    assert second.counts.features["x"].bins.tolist() == [1, 2, 3]
    assert again.incidents(of, 5)[0].resolved_s is None
    assert list(again.notices()) == [(1, "body")]
    assert again.source("gateway") == (10, 1)
    assert again.kept.join([("p", 1, 0, 6.0)]) == OutcomeCounts(joined=1)
    again.close()


def test_an_outcome_is_joined_once_and_another_value_does_not_replace_it(state):
    of = state.add_version("m", 1)
    state.kept.add(of, 1.0, [("p", 1, 0, 5.0), ("p", 1, 1, 6.0)])
    outcomes = [("p", 1, 0, 5.5), ("p", 1, 0, 5.5), ("p", 1, 0, 7.0), ("q", 1, 0, 1.0)]
    assert state.kept.join(outcomes) == OutcomeCounts(
        joined=1, duplicate=1, conflicting=1, unknown=1
    )
    assert state.kept.dirty(of, 9) == [1.0]
    assert state.kept.count(of, 1.0) == (2, 1)
    assert state.kept.labelled(of, 1.0) == [(5.0, 5.5)]


def test_the_oldest_windows_predictions_go_first_and_go_whole(state):
    of = state.add_version("m", 1)
    for start_s in (1.0, 2.0, 3.0):
        state.kept.add(of, start_s, [("p", int(start_s), row, 0.0) for row in range(10)])
    state.kept.prune(25, 0.0, ())
    state.kept.remove(1_000)
    assert (state.kept.total, state.kept.count(of, 1.0)[0]) == (20, 0)
    state.kept.prune(25, 3.0, ())
    state.kept.remove(1_000)
    assert (state.kept.total, state.kept.count(of, 3.0)[0]) == (10, 10)


def test_an_open_window_keeps_its_predictions_however_many_and_however_old(state):
    of = state.add_version("m", 1)
    for start_s in (1.0, 2.0):
        state.kept.add(of, start_s, [("p", int(start_s), row, 0.0) for row in range(10)])
    state.kept.prune(5, 9.0, {(of, 1.0)})
    state.kept.remove(1_000)
    assert (state.kept.count(of, 1.0)[0], state.kept.count(of, 2.0)[0]) == (10, 0)


def test_many_predictions_are_removed_some_at_a_time(state):
    of = state.add_version("m", 1)
    state.kept.add(of, 1.0, [("p", 1, row, 0.0) for row in range(100)])
    state.kept.prune(0, 0.0, ())
    left = []
    for _ in range(4):
        state.kept.remove(30)
        left.append(state.kept.total)
    assert left == [70, 40, 10, 0]
    assert state.kept.join([("p", 1, 99, 0.0)]).unknown == 1


def test_a_window_that_is_being_removed_is_not_summed_up(state):
    of = state.add_version("m", 1)
    state.kept.add(of, 1.0, [("p", 1, row, 0.0) for row in range(10)])
    state.kept.prune(0, 0.0, ())
    state.kept.remove(5)
    state.kept.join([("p", 1, row, 1.0) for row in range(10)])
    assert state.kept.dirty(of, 9) == []


def test_after_a_rollback_the_count_is_that_of_what_is_there(state):
    of = state.add_version("m", 1)
    state.kept.add(of, 1.0, [("p", 1, 0, 5.0)])
    state.commit()
    state.kept.add(of, 1.0, [("p", 1, 1, 5.0)])
    state.rollback()
    assert state.kept.total == 1


def test_open_incidents_outlast_the_last_ones_that_are_kept(state):
    of = state.add_version("m", 1)
    opened = state.open_incident(of, "drift", "x", 0.0, 0.3, 0.1)
    for i in range(10):
        state.open_incident(of, "missing", "x", float(i), 0.3, 0.1)
        state.resolve_incident(of, "missing", "x", float(i))
    state.prune_incidents(of, 3)
    kept = [incident.id for incident in state.incidents(of, 99)]
    assert (len(kept), kept[-1]) == (4, opened)


def test_nobody_else_may_read_what_models_said(state, tmp_path):
    state.add_version("m", 1)
    state.commit()
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o600}


FORMAT_1 = """
CREATE TABLE model_version (
  id INTEGER PRIMARY KEY, model TEXT NOT NULL, version INTEGER NOT NULL,
  alarms TEXT NOT NULL DEFAULT '{}', UNIQUE (model, version));
CREATE TABLE window (
  of INTEGER NOT NULL, start_s REAL NOT NULL, is_open INTEGER NOT NULL, counts TEXT NOT NULL,
  PRIMARY KEY (of, start_s)) WITHOUT ROWID;
CREATE TABLE performance (
  of INTEGER NOT NULL, start_s REAL NOT NULL, body TEXT NOT NULL,
  PRIMARY KEY (of, start_s)) WITHOUT ROWID;
CREATE TABLE prediction (
  prefix TEXT NOT NULL, number INTEGER NOT NULL, row INTEGER NOT NULL, of INTEGER NOT NULL,
  start_s REAL NOT NULL, value REAL NOT NULL, outcome REAL,
  PRIMARY KEY (prefix, number, row)) WITHOUT ROWID;
INSERT INTO model_version VALUES (1, 'homes', 2, '{"drift:x": [true, 0]}');
INSERT INTO window VALUES (1, 7.0, 1, '{"start_s": 7.0, "end_s": 8.0, "rows": 0, "rows_lost": 0,
  "features": {}, "predictions": {}}');
INSERT INTO prediction VALUES ('p', 1, 0, 1, 7.0, 5.0, 6.0), ('p', 1, 1, 1, 7.0, 5.0, NULL);
INSERT INTO performance VALUES (1, 6.0, '{"error": Infinity}'), (1, 7.0, '{"error": 0.5}');
PRAGMA user_version = 1;
"""


def test_a_file_of_the_format_before_is_carried_over(tmp_path):
    database = sqlite3.connect(tmp_path / FILENAME)
    database.executescript(FORMAT_1)
    database.close()
    for _ in range(2):  # the second time it is of this format
        state = MonitorState(tmp_path)
        (version,) = state.versions()
        assert version == (1, "homes", 2, {"alarms": {"drift:x": [True, 0]}}, 7.0)
        assert state.windows(1, 9)[0].counts.reference == UNKNOWN_REFERENCE
        assert (state.kept.count(1, 7.0), state.kept.dirty(1, 9)) == ((2, 1), [7.0])
        assert state.kept.performances(1, 9) == [(7.0, {"error": 0.5})]
        state.close()


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
    state.kept.add(of, 1.0, [("p", 1, 0, 5.0)])
    state.forget_version(of)
    assert state.versions() == []
    assert state.windows(of, 9) == []
    state.kept.remove(9)
    assert (state.kept.total, state.kept.labelled(of, 1.0)) == (0, [])


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
