"""A profile's rows are what their stages took, without what the stopwatches took."""

import gc
import importlib
import json
import os
import subprocess
import sys
import threading
from argparse import Namespace
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
BENCH = ROOT / "loadtest" / "bench"


@pytest.fixture(scope="module")
def bench():
    sys.path.insert(0, str(BENCH))
    try:
        import profile_server
        import stopwatches

        yield Namespace(server=profile_server, watches=stopwatches)
    finally:
        sys.path.remove(str(BENCH))


def busy(rounds):
    return sum(range(rounds))


def thread_of(bench, ns, roots=0, **stages):
    return {"ns": ns, "roots": roots, "stages": {k.replace("_", " "): v for k, v in stages.items()}}


@pytest.fixture
def snapshots(bench):
    """Two snapshots with 100 requests between them, of which every tenth root was timed."""
    w = bench.watches
    before = {"ns": 0, "threads": {"Thread-1 (_serve)": {"ns": 0, "roots": 0, "stages": {}}}}
    stages = {
        "parse and check": (10 * 5_300, 10, 10),  # of 5.3 µs, 1.1 are stopwatches'
        "queue: put": (10 * 2_500, 10, 0),
        w.PROBE: (10 * 500, 10, 0),
        w.PROBE_AROUND: (10 * 1_100, 10, 10),
    }
    after = {
        "ns": 2_000_000,
        "threads": {"Thread-1 (_serve)": {"ns": 1_500_000, "roots": 100, "stages": stages}},
    }
    return before, after


def test_a_stage_has_its_own_time_less_the_stopwatches_and_a_sample_stands_for_all(
    bench, snapshots
):
    bare = dict.fromkeys((bench.watches.LOOP, bench.watches.EXECUTOR), 12.0)
    rows = bench.watches.table(*snapshots, requests=100, bare=bare)

    assert rows["parse and check"] == pytest.approx(5.3 - 0.5 - 0.6)
    assert rows["queue: put"] == pytest.approx(2.5 - 0.5)
    assert rows["infer"] == 0


def test_what_no_stage_accounts_for_is_the_threads_and_the_sum_is_that_without_stopwatches(
    bench, snapshots
):
    bare = {
        **dict.fromkeys(bench.watches.STAGES, 0.0),
        bench.watches.LOOP: 12.0,
        bench.watches.EXECUTOR: 7.0,
    }
    rows = bench.watches.table(*snapshots, requests=100, bare=bare)

    assert rows[bench.watches.LOOP] == pytest.approx(12.0 - 4.2 - 2.0)
    assert sum(rows.values()) == pytest.approx(19.0)


def test_threads_are_told_apart_and_what_python_does_not_know_of_is_the_rest(bench):
    w = bench.watches
    names = ["Thread-7 (_serve)", "executor-m-1-0", "call-attendant", "call-records", "MainThread"]
    before = {"ns": 0, "threads": {}}
    after = {
        "ns": 10_000_000,
        "threads": {name: {"ns": 1_000_000, "roots": 0, "stages": {}} for name in names},
    }

    assert w.used(before, after, 100) == {
        w.LOOP: 10,
        w.EXECUTOR: 10,
        w.ATTENDANT: 10,
        w.OTHER_PYTHON: 20,
        w.OTHER_NATIVE: 50,
    }


def test_one_in_so_many_is_timed_and_the_inner_with_it(bench):
    watches = bench.watches.Stopwatches()
    inner = watches.around(busy, "inner")
    outer = watches.around(lambda: [inner(10) for _ in range(3)], "outer")
    rounds = 5 * bench.watches.EVERY
    results = [outer() for _ in range(rounds)]

    (thread,) = watches.counts().values()
    assert results == [[45, 45, 45]] * rounds
    assert thread["roots"] == rounds
    assert thread["stages"]["outer"][1:] == (5, 15)
    assert thread["stages"]["inner"][1:] == (15, 0)
    assert thread["stages"][bench.watches.PROBE][1] == 5


def test_time_goes_to_the_stage_that_used_it(bench):
    watches = bench.watches.Stopwatches()
    heavy = watches.around(lambda: busy(200_000), "heavy")
    light = watches.around(heavy, "light")
    for _ in range(bench.watches.EVERY):
        light()

    (thread,) = watches.counts().values()
    assert thread["stages"]["heavy"][0] > 5 * thread["stages"]["light"][0]


def test_an_exception_ends_its_stage(bench):
    watches = bench.watches.Stopwatches()

    def fails():
        raise KeyError

    timed = watches.around(fails, "fails")
    for _ in range(2 * bench.watches.EVERY):
        with pytest.raises(KeyError):
            timed()

    (thread,) = watches.counts().values()
    assert thread["stages"]["fails"][1] == 2


def test_each_thread_counts_for_itself(bench):
    watches = bench.watches.Stopwatches()
    timed = watches.around(lambda: busy(10), "work")

    def work():
        for _ in range(bench.watches.EVERY):
            timed()

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    counted = watches.counts().values()  # of one, if the second got the first one's number
    assert sum(thread["stages"]["work"][1] for thread in counted) == 2


def test_a_collection_within_a_stage_is_a_stage_of_its_own(bench):
    watches = bench.watches.Stopwatches()
    callbacks = list(gc.callbacks)
    watches.watch_collector()
    try:
        timed = watches.around(gc.collect, "work")
        for _ in range(bench.watches.EVERY):
            timed(0)
        (thread,) = watches.counts().values()
    finally:
        gc.callbacks[:] = callbacks
    assert thread["stages"][bench.watches.COLLECTOR][1] == 1
    assert thread["stages"]["work"][2] == 1


def test_what_is_watched_is_there(bench):
    for functions in bench.watches.WATCHED.values():
        for module, path in functions:
            found = importlib.import_module(module)
            for name in path.split("."):
                found = getattr(found, name)
            assert callable(found)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="one core for the server, one for the load")
def test_a_gateway_is_profiled_from_the_port_to_the_reply(bench):
    command = [sys.executable, BENCH / "profile_server.py", "--json", "--only", "tensor"]
    command += ["--rounds", "1", "--seconds", "1"]

    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)

    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)["tensor"]
    for stage in (bench.watches.LOOP, "parse and check", "queue: put", "infer", "reply: send"):
        assert figures[stage] > 0, stage
    assert figures["features: read"] == 0
    assert set(bench.watches.STAGES) < set(figures)
