"""What was served against an offline store that is a list of rows, and a definition to hold to."""

from itertools import chain

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.features.logged_plan import logged_plan
from headrace.features.plan import FeatureSource, FeatureStatus, ViewSource, compile_plan
from headrace.features.skew import FeatureTally, OfflineColumn, compare
from headrace.features.skew_file import SkewFolder, to_columns
from headrace.features.skew_reader import chunks, scan
from headrace.features.skew_record import SkewRecord, SkewSource
from headrace.features.skew_values import Tolerance
from headrace.features.values import ValueType as V

NAN = float("nan")
KEY = (("id", "user_id", V.INT64),)  # the view calls it id, requests user_id
PLAN = compile_plan(
    "service",
    "demo",
    "1",
    [
        ViewSource("stats", KEY, (FeatureSource("a", V.DOUBLE), FeatureSource("b", V.STRING))),
        ViewSource("other", KEY, (FeatureSource("c", V.INT64),)),
    ],
)
SOURCE = SkewSource("m", "1", "f00d", PLAN)
PRESENT, NULL, NOT_FOUND, OUTSIDE = FeatureStatus


class History:
    """An offline store: per view and key, rows of an event time and values; None is null."""

    def __init__(self, rows):
        self.rows = rows
        self.asked = []

    def read(self, view, features, keys, times_us):
        (kind, ids) = keys["id"]
        assert kind is V.INT64
        self.asked.append((view, len(ids)))
        found = [self._at(view, i, time_us / 1e6) for i, time_us in zip(ids, times_us.tolist())]
        columns = {}
        for feature in features:
            values = np.empty(len(ids), object)
            values[:] = [row.get(feature) for row in found]
            columns[feature] = OfflineColumn(values, np.array([v is not None for v in values]))
        return columns

    def ttl_s(self, view):
        return None

    def _at(self, view, key, time_s):
        known = [row for row in self.rows.get((view, key), ()) if row[0] <= time_s]
        return max(known, key=lambda row: row[0])[1] if known else {}


def served(*rows):
    """Make a log's rows: (key, request time, {feature: value or (value, status)}, event times)."""
    count = len(rows)
    values, statuses = [], np.full((3, count), NOT_FOUND, np.uint8)
    for i, feature in enumerate(PLAN.features):
        column = np.full(count, None if feature.dtype.kind == "O" else 0, feature.dtype)
        for at, (_, _, given_values, _) in enumerate(rows):
            value = given_values.get(feature.name)
            value, status = value if isinstance(value, tuple) else (value, PRESENT)
            if value is not None:
                column[at] = value
            if value is not None or status is NULL:
                statuses[i, at] = status
        values.append(column)
    records = [
        SkewRecord(
            source=SOURCE,
            keys={"user_id": np.array([key])},
            values=[column[[at]] for column in values],
            statuses=statuses[:, [at]],
            event_times_s=np.array([[times.get("stats", NAN)], [times.get("other", NAN)]]),
            places=np.array([0]),
            first_number=at,
            request_rows=[1],
            time_s=time_s,
            byte_count=0,
        )
        for at, (key, time_s, _, times) in enumerate(rows)
    ]
    return to_columns(records)


def tallied(columns, history, tolerance=None):
    import pyarrow as pa

    plan = logged_plan(PLAN)
    tallies = {of: FeatureTally(of.name, plan.views[of.view].name) for of in plan.features}
    table = pa.Table.from_batches([columns.batch])
    compare(plan, table, history, tolerance or Tolerance(), tallies)
    return {tally.feature: tally for tally in tallies.values()}


def verdict(tally):
    return {
        name: getattr(tally, name)
        for name in ("differing", "missing_online", "missing_offline", "late")
        if getattr(tally, name)
    }


OLD, NEW = (100.0, {"a": 1.0, "b": "x"}), (200.0, {"a": 2.0, "b": "x"})
FUTURE = (400.0, {"a": 3.0, "b": "x"})


@pytest.mark.parametrize(
    ("values", "event_time_s", "expected"),
    [
        pytest.param({"a": 2.0}, 200.0, {}, id="the newest row"),
        pytest.param({"a": 1.0}, 100.0, {"late": 1}, id="an older row, as it was"),
        pytest.param({"a": 1.5}, 100.0, {"differing": 1}, id="an older row, otherwise"),
        pytest.param({"a": 1.0}, 200.0, {"differing": 1}, id="the newest row's time, old value"),
        pytest.param({"a": 1.0}, NAN, {"differing": 1}, id="nobody knows how old"),
        pytest.param({"a": 1.0}, 50.0, {"differing": 1}, id="older than anything offline"),
        pytest.param({}, NAN, {"missing_online": 1}, id="not online"),
        pytest.param({"a": (2.0, OUTSIDE)}, 200.0, {"missing_online": 1}, id="too old online"),
        pytest.param({"a": (1.0, OUTSIDE)}, 100.0, {"late": 1}, id="late and too old"),
        pytest.param({"a": NAN}, 200.0, {"missing_online": 1}, id="not a number"),
        pytest.param({"a": (None, NULL)}, 200.0, {"missing_online": 1}, id="null online only"),
        pytest.param({"a": (None, NULL)}, 50.0, {"late": 1}, id="null, as it was"),
        pytest.param({}, 50.0, {"missing_online": 1}, id="a feature that was never written"),
        pytest.param({"a": 1.0}, -1e15, {"differing": 1}, id="a damaged event time"),
        pytest.param({"a": 3.0}, 400.0, {"differing": 1}, id="from the future"),
    ],
)
def test_what_was_served_is_told_apart(values, event_time_s, expected):
    history = History({("stats", 1): [OLD, NEW, FUTURE]})

    tally = tallied(served((1, 300.0, values, {"stats": event_time_s})), history)["a"]

    assert verdict(tally) == expected
    assert tally.compared == tally.rows == 1
    assert tally.mismatch_share == (0 if set(expected) <= {"late"} else 1)


def test_a_value_that_only_the_online_store_has_is_missing_offline():
    tally = tallied(served((9, 300.0, {"a": 1.0}, {"stats": 1.0})), History({}))["a"]

    assert verdict(tally) == {"missing_offline": 1}
    assert tally.example.online == 1.0
    assert tally.example.offline is None


def test_a_value_that_has_become_null_since_is_late():
    history = History({("stats", 1): [OLD, (200.0, {"a": None})]})

    tally = tallied(served((1, 300.0, {"a": 1.0}, {"stats": 100.0})), history)["a"]

    assert (tally.compared, verdict(tally)) == (1, {"late": 1})


def test_what_is_missing_on_both_sides_is_not_compared():
    tally = tallied(served((9, 300.0, {}, {})), History({}))["a"]

    assert (tally.rows, tally.compared, tally.mismatch_share, verdict(tally)) == (1, 0, 0, {})


def test_only_rows_that_differ_are_asked_for_again():
    history = History({("stats", 1): [OLD, NEW], ("stats", 2): [OLD, NEW]})
    rows = served(
        (1, 300.0, {"a": 2.0, "b": "x"}, {"stats": 200.0}),
        (2, 300.0, {"a": 1.0, "b": "x"}, {"stats": 100.0}),
    )

    tallied(rows, history)

    assert history.asked == [("stats", 2), ("stats", 1), ("other", 2)]


def test_an_event_time_between_microseconds_still_finds_its_row():
    at_s = 1_700_000_000.1234564  # rounded down in the log
    history = History({("stats", 1): [(at_s, {"a": 1.0}), (at_s + 60, {"a": 2.0})]})

    tally = tallied(served((1, at_s + 90, {"a": 1.0}, {"stats": at_s})), history)["a"]

    assert verdict(tally) == {"late": 1}


def test_distances_are_of_rows_that_both_have_and_that_are_not_late():
    history = History({("stats", key): [OLD, NEW] for key in range(4)})
    rows = served(
        (0, 300.0, {"a": 2.0}, {"stats": 200.0}),
        (1, 300.0, {"a": 5.0}, {"stats": 200.0}),
        (2, 300.0, {"a": 1.0}, {"stats": 100.0}),
        (3, 300.0, {}, {}),
    )

    tally = tallied(rows, history)["a"]

    assert (tally.mean_distance, tally.max_distance) == (1.5, 3.0)
    assert tally.example == ("f00d0000000001/0", {"user_id": 1}, 5.0, 2.0)


class Forgetful(History):
    """An offline store that does not show rows of more than 150 seconds."""

    def ttl_s(self, view):
        return 150.0

    def _at(self, view, key, time_s):
        known = [row for row in self.rows.get((view, key), ()) if 0 <= time_s - row[0] <= 150]
        return max(known, key=lambda row: row[0])[1] if known else {}


@pytest.mark.parametrize(
    ("rows", "event_time_s", "expected"),
    [
        pytest.param([OLD], 100.0, {"missing_offline": 1}, id="beyond the offline TTL, not late"),
        pytest.param([OLD, NEW], 100.0, {"late": 1}, id="replaced"),
        pytest.param(
            [(180.0, {"a": 1.0}), (200.0, {"a": None})], 180.0, {"late": 1}, id="replaced by null"
        ),
    ],
)
def test_only_what_a_newer_row_replaced_is_late(rows, event_time_s, expected):
    history = Forgetful({("stats", 1): rows})

    tally = tallied(served((1, 300.0, {"a": 1.0}, {"stats": event_time_s})), history)["a"]

    assert verdict(tally) == expected


def test_text_has_no_distance():
    history = History({("stats", 1): [NEW]})

    tally = tallied(served((1, 300.0, {"b": "y"}, {"stats": 200.0})), history)["b"]

    assert verdict(tally) == {"differing": 1}
    assert tally.mean_distance is tally.max_distance is None


VALUE = st.none() | st.integers(0, 2).map(float)
EVENTS = st.dictionaries(st.integers(1, 9), VALUE, max_size=4)
ROWS = st.lists(
    st.tuples(
        st.integers(0, 2),  # key
        st.integers(5, 12),  # request time
        st.none() | st.integers(1, 9),  # event time online
        VALUE,  # value online
        st.sampled_from([PRESENT, OUTSIDE, NULL]),
    ),
    min_size=1,
    max_size=8,
)


@settings(max_examples=200)
@given(st.fixed_dictionaries(dict.fromkeys(range(3), EVENTS)), ROWS)
def test_every_row_is_counted_as_the_definitions_say(events, rows):
    history = History(
        {
            ("stats", key): [(float(time_s), {"a": value}) for time_s, value in of.items()]
            for key, of in events.items()
        }
    )

    def offline_at(key, time_s):
        known = [at for at in events[key] if at <= time_s]
        return events[key][max(known)] if known else None

    expected = dict.fromkeys(
        ("compared", "differing", "missing_online", "missing_offline", "late"), 0
    )
    for key, time_s, event_s, value, status in rows:
        stored = None if status is NULL else value
        online = stored if status is PRESENT else None
        offline = offline_at(key, time_s)
        expected["compared"] += online is not None or offline is not None
        if online is offline is None or online == offline:
            continue
        is_told = event_s and event_s <= time_s and (stored is not None or status is NULL)
        if is_told and stored != offline and offline_at(key, event_s) == stored:
            expected["late"] += 1
        elif offline is None:
            expected["missing_offline"] += 1
        elif online is None:
            expected["missing_online"] += 1
        else:
            expected["differing"] += 1

    tally = tallied(
        served(
            *(
                (
                    key,
                    float(time_s),
                    {"a": (None if status is NULL else value, status)},
                    {"stats": float(event_s or NAN)},
                )
                for key, time_s, event_s, value, status in rows
            )
        ),
        history,
    )["a"]

    assert {name: getattr(tally, name) for name in expected} == expected


def logged(folder, *times_s):
    """Write a file for each time, of one row."""
    for time_s in times_s:
        SkewFolder(folder, 2**30).write([served((int(time_s), time_s, {"a": 1.0}, {}))])


def read(folder, rows, service=None, since_s=None):
    files, unreadable = scan(folder, service, since_s)
    assert not unreadable
    return [sorted(table["key.user_id"].to_pylist()) for _, table in chunks(files, rows, since_s)]


@pytest.mark.parametrize(("rows", "sizes"), [(1, [1] * 5), (2, [2, 2, 1]), (5, [5]), (9, [5])])
def test_a_log_is_read_a_bounded_number_of_rows_at_a_time(tmp_path, rows, sizes):
    logged(tmp_path, 1.0, 2.0)
    SkewFolder(tmp_path / "of another host", 2**30).write(
        [served(*((key, 3.0, {}, {}) for key in (3, 4, 5)))]
    )

    found = read(tmp_path, rows)

    assert [len(chunk) for chunk in found] == sizes
    assert sorted(chain(*found)) == [1, 2, 3, 4, 5]


def test_requests_before_since_are_left_out(tmp_path):
    logged(tmp_path, 100.0, 200.0, 300.5)

    assert read(tmp_path, 10, since_s=200.0) == [[200, 300]]
    assert read(tmp_path, 10, since_s=4e9) == []


def test_another_services_rows_are_left_out(tmp_path):
    logged(tmp_path, 100.0)

    assert read(tmp_path, 10, "service") == [[100]]
    assert read(tmp_path, 10, "another") == []


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"PAR1 this is no Parquet", id="no Parquet"),
        pytest.param(None, id="Parquet of somebody else"),
    ],
)
def test_a_file_that_is_none_of_the_log_is_told_of(tmp_path, content):
    import pandas as pd

    stranger = tmp_path / "skew-20260101T000000Z-x-0.parquet"
    if content is None:
        pd.DataFrame({"x": [1]}).to_parquet(stranger)
    else:
        stranger.write_bytes(content)
    logged(tmp_path, 100.0)

    files, unreadable = scan(tmp_path, None, None)

    assert unreadable == [stranger]
    assert len(files) == 1


def key_in(file):
    return pq.read_table(file)["key.user_id"][0].as_py()


def test_a_file_that_is_damaged_inside_is_told_of_and_the_others_are_read(tmp_path):
    logged(tmp_path, 100.0, 200.0, 300.0)
    damaged = next(file for file in tmp_path.iterdir() if key_in(file) == 200)
    content = bytearray(damaged.read_bytes())
    content[4:200] = b"\xff" * 196  # its data, not its footer
    damaged.write_bytes(content)
    told = []

    files, unreadable = scan(tmp_path, None, None)
    found = [table["key.user_id"].to_pylist() for _, table in chunks(files, 10, None, told.append)]

    assert unreadable == []
    assert told == [damaged]
    assert [sorted(chunk) for chunk in found] == [[100, 300]]
