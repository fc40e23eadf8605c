"""What was served is written down, sampled rows only, and never in anybody's way."""

import errno
import fcntl
import os
import subprocess
import sys
import threading
import time
from functools import partial
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import structlog
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.features import skew_log as skew_log_module
from headrace.features.key_sample import sampled_rows, threshold_of
from headrace.features.memory_store import MemoryStore
from headrace.features.plan import FeatureSource, ViewSource, compile_plan
from headrace.features.skew_log import FeatureReadLog, SkewLog, read_plan
from headrace.features.skew_reader import scan
from headrace.features.skew_record import SkewSource
from headrace.features.values import ValueType as V

NOW_S = 1_800_000_000.25
DRIVER = (("driver_id", "driver_id", V.INT64),)

VALUES = {
    V.FLOAT: 0.5,
    V.DOUBLE: 0.1,
    V.INT32: -7,
    V.INT64: 2**60 + 1,
    V.BOOL: True,
    V.UNIX_TIMESTAMP: 2**55,
    V.STRING: "é",
    V.BYTES: b"\xff",
    V.JSON: "{}",
    V.UUID: "00000000-0000-0000-0000-000000000001",
    V.TIME_UUID: "00000000-0000-0000-0000-000000000002",
    V.DECIMAL: "1.50",
    V.FLOAT_LIST: [0.5, 1.0],
    V.DOUBLE_LIST: [],
    V.INT32_LIST: [1],
    V.INT64_LIST: [2**60],
    V.BOOL_LIST: [True, False],
    V.STRING_LIST: ["a", ""],
    V.BYTES_LIST: [b"\x00"],
    V.UNIX_TIMESTAMP_LIST: [1],
}


def plan_of(*features, keys=DRIVER, more=()):
    sources = [FeatureSource(name, value_type) for name, value_type in features]
    return compile_plan("service", "demo", "v7", [ViewSource("stats", keys, sources), *more])


FLOATS = plan_of(("rating", V.FLOAT), ("trips", V.FLOAT))


def log_to(folder, **changes):
    limits = {
        "share": 1.0,
        "max_queue_bytes": 2**25,
        "file_rows": 10**6,
        "file_s": 3600.0,
        "folder_bytes": 2**30,
    }
    return SkewLog(folder, **limits | changes)


def source_of(plan, model="m"):
    return SkewSource(model, "3", "f00d", plan)


def put(log, source, entities, store=None, first_number=0, request_rows=None, **more):
    columns = {name: column(values) for name, values in entities.items()}
    rows = (store or MemoryStore()).read(source.plan, columns, now_s=NOW_S, timeout_s=1)
    count = rows.statuses.shape[1]
    log.put(
        source,
        columns,
        rows,
        first_number=first_number,
        request_rows=request_rows or [1] * count,
        time_s=NOW_S,
        **more,
    )


def column(values):
    if isinstance(values[0], bytes):
        array = np.empty(len(values), np.object_)
        array[:] = values
        return array
    return np.array(values, np.int64)


def flushed(log):
    """Let the log end in order, as a server does."""
    log.start()
    log.stop(30)


def written(folder):
    return [row for file in sorted(folder.glob("*.parquet")) for row in rows_in(file)]


def rows_in(file):
    return pq.read_table(file).to_pylist()


def eventually(found, expected):
    deadline_s = time.monotonic() + 10
    while found() != expected:
        assert time.monotonic() < deadline_s
        time.sleep(0.002)


@pytest.fixture
def fast(monkeypatch):
    monkeypatch.setattr(skew_log_module, "WRITE_DOWN_PERIOD_S", 0.002)


def test_every_type_of_value_comes_back_as_it_was_served(tmp_path):
    plan = plan_of(*((value_type.name.lower(), value_type) for value_type in VALUES))
    store = MemoryStore()
    own = {value_type.name.lower(): value for value_type, value in VALUES.items()}
    store.put("stats", {"driver_id": 1}, own, NOW_S - 60)
    store.put("stats", {"driver_id": 2}, dict.fromkeys(own), NOW_S - 60)
    log = log_to(tmp_path)

    put(log, source_of(plan), {"driver_id": [1, 2, 3]}, store)
    flushed(log)

    present, null, absent = written(tmp_path)
    for name, value in own.items():
        assert present[f"value.{name}"] == value, name
        assert null[f"value.{name}"] is absent[f"value.{name}"] is None
    assert {row["status.float"] for row in (present, null, absent)} == {
        "PRESENT",
        "NULL_VALUE",
        "NOT_FOUND",
    }
    assert present["event_time.stats"].timestamp() == NOW_S - 60
    assert absent["event_time.stats"] is None


def test_a_row_of_a_part_has_its_place_in_the_whole_request(tmp_path):
    log = log_to(tmp_path)

    keys = {"driver_id": [5, 6, 7]}
    put(log, source_of(FLOATS), keys, first_number=31, request_rows=[1, 2], parts=([32, 9], [0, 8]))
    flushed(log)

    ids = [row["prediction_id"] for row in written(tmp_path)]
    assert ids == ["f00d0000000020/0", "f00d0000000009/8", "f00d0000000009/9"]


def test_a_row_says_who_served_it_to_whom_and_when(tmp_path):
    log = log_to(tmp_path)

    put(log, source_of(FLOATS), {"driver_id": [5, 6, 7]}, first_number=31, request_rows=[1, 2])
    flushed(log)

    rows = written(tmp_path)
    ids = [row["prediction_id"] for row in rows]
    assert ids == ["f00d000000001f/0", "f00d0000000020/0", "f00d0000000020/1"]
    assert [row["key.driver_id"] for row in rows] == [5, 6, 7]
    assert {(row["model"], row["version"], row["registry_version"]) for row in rows} == {
        ("m", "3", "v7")
    }
    assert {row["request_time"].timestamp() for row in rows} == {NOW_S}


def test_a_view_read_by_two_keys_has_an_event_time_for_each(tmp_path):
    trips = [
        ViewSource(
            "stats", (("driver_id", f"{role}_id", V.INT64),), (FeatureSource(role, V.INT64),)
        )
        for role in ("guide", "guest")
    ]
    plan = compile_plan("service", "demo", "1", trips)
    store = MemoryStore()
    for driver in (1, 2):
        store.put("stats", {"driver_id": driver}, {"guide": 10, "guest": 20}, NOW_S - driver)
    log = log_to(tmp_path)

    put(log, source_of(plan), {"guide_id": [1], "guest_id": [2]}, store)
    flushed(log)

    (row,) = written(tmp_path)
    times = [row[f"event_time.stats#{group}"].timestamp() for group in (0, 1)]
    assert times == [NOW_S - 1, NOW_S - 2]


BATCHES = st.lists(
    st.lists(st.tuples(st.integers(0, 50), st.binary(max_size=3)), min_size=1, max_size=8),
    max_size=6,
)


@settings(max_examples=25)
@given(BATCHES, st.sampled_from([0.05, 0.5, 1.0]))
def test_exactly_the_rows_of_sampled_keys_are_kept(tmp_path_factory, batches, share):
    folder = tmp_path_factory.mktemp("log")
    plan = plan_of(
        ("rating", V.DOUBLE),
        ("trips", V.INT64),
        keys=(("who", "who", V.BYTES), ("driver_id", "driver_id", V.INT64)),
    )
    log = log_to(folder, share=share)
    source = source_of(plan)
    expected = []
    for number, keys in enumerate(batches):
        drivers, names = zip(*keys, strict=True)
        put(log, source, {"driver_id": drivers, "who": names}, None, number, [len(keys)])
        # By name, whatever the service's order.
        kept = sampled_rows([column(drivers), column(names)], threshold_of(share))
        expected += [(f"f00d{number:010x}/{at}", *keys[at]) for at in kept.tolist()]

    flushed(log)

    found = [(r["prediction_id"], r["key.driver_id"], r["key.who"]) for r in written(folder)]
    assert found == expected
    assert log.rows_written == len(expected)
    assert log.queued_bytes == 0


def test_a_text_key_that_is_no_text_disturbs_nobody(tmp_path):
    plan = plan_of(("rating", V.FLOAT), keys=(("city", "city", V.STRING),))
    log = log_to(tmp_path)

    put(log, source_of(plan), {"city": [b"\xff\xfe", "Åbo".encode()]})
    flushed(log)

    assert [row["key.city"] for row in written(tmp_path)] == ["\ufffd\ufffd", "Åbo"]


def test_a_service_without_keys_is_sampled_row_by_row(tmp_path):
    plan = plan_of(("rain", V.FLOAT), keys=())
    log = log_to(tmp_path, share=0.1)
    source = source_of(plan)

    for number in range(0, 2_000, 20):
        put(log, source, {"unused": [0] * 20}, first_number=number)
    flushed(log)

    assert 100 < len(written(tmp_path)) < 300


def test_a_full_queue_drops_the_newest_and_counts_them(tmp_path):
    log = log_to(tmp_path, max_queue_bytes=10_000)
    source = source_of(FLOATS)

    for number in range(100):
        put(log, source, {"driver_id": [number]}, first_number=number)
    assert log.queued_bytes <= 10_000
    flushed(log)

    rows = written(tmp_path)
    assert 2 < len(rows) < 20
    assert [row["key.driver_id"] for row in rows] == list(range(len(rows)))
    assert (log.rows_written, log.rows_dropped) == (len(rows), 100 - len(rows))


def test_several_executors_lose_and_double_nothing(tmp_path, fast):
    log = log_to(tmp_path, file_rows=50)
    log.start()

    def serve(first):
        source = source_of(FLOATS, f"model {first}")
        for driver in range(first, first + 100):
            put(log, source, {"driver_id": [driver]})

    executors = [threading.Thread(target=serve, args=(100 * i,)) for i in range(4)]
    for executor in executors:
        executor.start()
    for executor in executors:
        executor.join()
    log.stop(30)

    assert sorted(row["key.driver_id"] for row in written(tmp_path)) == list(range(400))
    assert (log.rows_written, log.queued_bytes) == (400, 0)


def test_long_values_count_for_what_they_are(tmp_path):
    plan = plan_of(("text", V.STRING), ("numbers", V.INT64_LIST))
    store = MemoryStore()
    store.put("stats", {"driver_id": 1}, {"text": "x" * 10**6, "numbers": []}, NOW_S)
    store.put("stats", {"driver_id": 2}, {"text": "", "numbers": [0] * 10**5}, NOW_S)
    log = log_to(tmp_path, max_queue_bytes=10**6)

    put(log, source_of(plan), {"driver_id": [1]}, store)
    put(log, source_of(plan), {"driver_id": [2]}, store)

    assert log.rows_dropped == 2


def test_files_are_begun_anew_by_rows_and_by_time(tmp_path, fast):
    by_rows = log_to(tmp_path / "rows", file_rows=3)
    by_time = log_to(tmp_path / "time", file_s=0.01)
    source = source_of(FLOATS)

    for log in (by_rows, by_time):
        log.start()
        for count in (1, 2):
            put(log, source, {"driver_id": [1, 2, 3]})
            eventually(partial(getattr, log, "rows_written"), 3 * count)
        log.stop(10)

    assert [len(list(folder.iterdir())) for folder in tmp_path.iterdir()] == [2, 2]


def test_rows_wait_for_a_whole_file(tmp_path, fast):
    log = log_to(tmp_path)
    log.start()

    put(log, source_of(FLOATS), {"driver_id": [1]})
    eventually(lambda: (len(log._queue), len(log._gathered)), (0, 1))

    assert not list(tmp_path.iterdir())
    log.stop(10)
    assert log.rows_written == 1


def test_each_version_has_files_of_its_own(tmp_path):
    log = log_to(tmp_path)

    for model in ("one", "two"):
        put(log, source_of(FLOATS, model), {"driver_id": [1]})
    flushed(log)

    models = [{row["model"] for row in rows_in(file)} for file in tmp_path.iterdir()]
    assert sorted(models, key=str) == [{"one"}, {"two"}]


def test_the_oldest_files_make_room_for_new_ones(tmp_path, fast):
    log = log_to(tmp_path, file_rows=1, folder_bytes=20_000)
    (tmp_path / "notes.txt").write_text("not of the log" * 1_000)
    log.start()

    source = source_of(FLOATS)
    for number in range(20):
        put(log, source, {"driver_id": [number]})
        eventually(partial(getattr, log, "rows_written"), number + 1)
    log.stop(10)

    files = sorted(tmp_path.glob("*.parquet"))
    assert sum(file.stat().st_size for file in files) <= 20_000
    drivers = [row["key.driver_id"] for row in written(tmp_path)]
    assert drivers == list(range(20 - len(files), 20))
    assert log.files_deleted == 20 - len(files) > 0
    assert (tmp_path / "notes.txt").exists()


def test_what_a_dead_writer_left_behind_is_swept_up(tmp_path):
    dead, alive = (tmp_path / f".skew-{name}.parquet.tmp" for name in ("dead", "alive"))
    for file in (dead, alive):
        file.write_text("half of")
    os.utime(dead, (0, 0))
    log = log_to(tmp_path)

    put(log, source_of(FLOATS), {"driver_id": [1]})
    flushed(log)

    assert not dead.exists()
    assert alive.exists()


def test_room_is_made_for_what_another_process_is_about_to_add_too(tmp_path, fast):
    log = log_to(tmp_path, file_rows=1, folder_bytes=20_000)
    log.start()
    source = source_of(FLOATS)
    put(log, source, {"driver_id": [1]})
    eventually(lambda: log.rows_written, 1)

    (tmp_path / ".skew-other.tmp").write_bytes(b"x" * 15_000)
    put(log, source, {"driver_id": [2]})
    eventually(lambda: log.rows_written, 2)
    log.stop(10)

    assert [row["key.driver_id"] for row in written(tmp_path)] == [2]
    assert log.files_deleted == 1


def test_a_full_disk_is_counted_logged_once_and_leaves_nothing_behind(tmp_path, fast, monkeypatch):
    def full(_descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    log = log_to(tmp_path, file_rows=1)
    with structlog.testing.capture_logs() as lines:
        log.start()
        for count in (1, 2, 3):
            put(log, source_of(FLOATS), {"driver_id": [1]})
            eventually(partial(getattr, log, "rows_failed"), count)
        monkeypatch.undo()
        put(log, source_of(FLOATS), {"driver_id": [1]})
        log.stop(10)

    assert [line["event"] for line in lines] == ["skew_log_failed", "skew_log_writes_again"]
    assert "No space left" in lines[0]["reason"]
    assert (log.rows_written, log.rows_failed, log.queued_bytes) == (1, 3, 0)
    assert len(list(tmp_path.iterdir())) == 1


def test_a_folder_that_is_none_costs_nobody_anything(tmp_path):
    (tmp_path / "file").write_text("")
    log = log_to(tmp_path / "file")

    put(log, source_of(FLOATS), {"driver_id": [1, 2]})
    with structlog.testing.capture_logs() as lines:
        flushed(log)

    assert [line["event"] for line in lines] == ["skew_log_failed"]
    assert (log.rows_failed, log.queued_bytes) == (2, 0)


def test_rows_that_arrow_cannot_take_are_counted_and_the_next_ones_are_written(tmp_path):
    log = log_to(tmp_path)
    good = source_of(plan_of(("text", V.STRING)), "good")
    bad = source_of(plan_of(("text", V.STRING)), "bad")
    store = MemoryStore()
    store.put("stats", {"driver_id": 1}, {"text": "\ud800"}, NOW_S)

    put(log, bad, {"driver_id": [1]}, store)
    put(log, good, {"driver_id": [1]})
    with structlog.testing.capture_logs():
        flushed(log)

    assert (log.rows_written, log.rows_failed, log.queued_bytes) == (1, 1, 0)


def test_no_file_is_larger_than_the_whole_log_may_be(tmp_path):
    log = log_to(tmp_path, folder_bytes=1_000)

    put(log, source_of(FLOATS), {"driver_id": list(range(100))})
    with structlog.testing.capture_logs():
        flushed(log)

    assert log.rows_failed == 100
    assert not list(tmp_path.iterdir())


def read(log, plan, drivers, number=0):
    """What a feature read without a model leaves behind."""
    columns = {"driver_id": column(drivers)} if plan.request_columns else {"": column(drivers)}
    rows = MemoryStore().read(plan, columns, now_s=NOW_S, timeout_s=1)
    FeatureReadLog(log).put(plan, columns, rows, time_s=NOW_S + number)


def test_feature_reads_are_kept_like_a_models_but_without_a_prediction_id(tmp_path):
    log = log_to(tmp_path, share=0.5)

    for _ in range(2):  # whichever thread and object they come through
        read(log, FLOATS, range(100))
    put(log, source_of(FLOATS), {"driver_id": range(100)})
    flushed(log)

    rows = written(tmp_path)
    reads = [row["key.driver_id"] for row in rows if row["prediction_id"] is None]
    assert reads == 2 * [row["key.driver_id"] for row in rows if row["prediction_id"] is not None]
    assert {(row["model"], row["version"]) for row in rows} == {("", ""), ("m", "3")}
    assert len(list(tmp_path.iterdir())) == 2


def test_callers_who_select_ever_something_else_make_no_flood_of_files(tmp_path, monkeypatch):
    monkeypatch.setattr(skew_log_module, "GATHERED_MAX", 3)
    log = log_to(tmp_path)

    for i in range(5):
        read(log, plan_of((f"f{i}", V.FLOAT)), [1, 2])
    flushed(log)

    assert len(list(tmp_path.iterdir())) == 3
    assert (log.rows_written, log.rows_dropped, log.queued_bytes) == (6, 4, 0)


def test_feature_reads_without_keys_are_sampled_row_by_row(tmp_path):
    plan = plan_of(("rain", V.FLOAT), keys=())
    log = log_to(tmp_path, share=0.1)

    for number in range(100):
        read(log, plan, [0] * 20, number)
    flushed(log)

    assert 100 < len(written(tmp_path)) < 300


def test_what_a_read_computes_is_kept_as_what_it_is_computed_from(tmp_path):
    computed = SimpleNamespace(computed=("view",), stored=FLOATS)
    only_computed = SimpleNamespace(computed=("view",), stored=None)

    assert [read_plan(plan) for plan in (FLOATS, computed, only_computed)] == [FLOATS, FLOATS, None]


WRITER = """
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa

from headrace.features.plan import FeatureSource, ViewSource, compile_plan
from headrace.features.skew_file import Columns, SkewFolder
from headrace.features.skew_reader import scan
from headrace.features.skew_record import SkewSource
from headrace.features.values import ValueType

keys = (("driver_id", "driver_id", ValueType.INT64),)
features = (FeatureSource("rating", ValueType.FLOAT),)
plan = compile_plan("service", "demo", "1", [ViewSource("stats", keys, features)])
batch = pa.RecordBatch.from_pydict({"noise": np.random.default_rng().random(2_000)})
folder = SkewFolder(Path(sys.argv[1]), int(sys.argv[2]))
print("ready", flush=True)
while True:
    folder.write([Columns(SkewSource("m", "1", "f00d", plan), batch, 0)])
    print("written", flush=True)
"""


def begin_writing(folder, folder_bytes):
    command = [sys.executable, "-c", WRITER, folder, str(folder_bytes)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def end(process):
    process.kill()
    process.communicate(timeout=10)


def test_processes_that_share_a_folder_stay_under_its_limit_together(tmp_path):
    limit = 100_000  # of files of some 17,000 bytes
    writers = [begin_writing(tmp_path, limit) for _ in range(3)]
    try:
        for writer in writers:
            assert writer.stdout.readline() == "ready\n"
        most, names = 0, set()
        deadline_s = time.monotonic() + 30
        while len(names) < 60:
            assert time.monotonic() < deadline_s
            sizes = sizes_in(tmp_path)
            names |= sizes.keys()
            most = max(most, sum(sizes.values()))
    finally:
        for writer in writers:
            end(writer)

    assert limit / 2 < most <= limit
    assert len({name.split("-")[2] for name in names}) == 3  # all of them wrote


def sizes_in(folder):
    """Return the log's files as they are at one moment: under the writers' own lock."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        return {file.name: file.stat().st_size for file in folder.glob("skew-*.parquet")}
    finally:
        os.close(descriptor)


def test_a_writer_that_is_killed_leaves_only_whole_files(tmp_path):
    writer = begin_writing(tmp_path, 10**9)
    try:
        for line in ("ready", "written", "written", "written"):
            assert writer.stdout.readline() == f"{line}\n"
    finally:
        end(writer)

    files, unreadable = scan(tmp_path, None, None)

    assert len(files) >= 3
    assert unreadable == []
    assert {len(rows_in(file.path)) for file in files} == {2_000}
