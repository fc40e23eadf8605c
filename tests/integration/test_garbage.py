"""A server's garbage collector, seen from outside: a process of its own, its metrics."""

import contextlib
import json
import re
import shutil
import subprocess
import sys
import threading
import time
import urllib.request

import bench_modules
import pytest
from onnx import helper

from headrace.garbage.pace import IDLE_PERIOD_S

bench = bench_modules.load("flood", "overload_models")

LOOKED_AT_WITHIN_S = IDLE_PERIOD_S / 4

LOOKS_AT_ALL_MAX = 2
"""While one version is loaded: one is due after it. Python's own pace makes some in any load."""

PAUSED_SHARE_MAX = 0.01
"""Of the time under load, in pauses of any length. Half a millisecond in two seconds is usual."""

PAUSE_MAX_S = 0.025
"""
Half a millisecond is usual for what is new; the rest is for a machine whose cores are shared. All
that a gateway has, if it is not set aside, takes more (decision 0023).
"""


def write_version(model_files, root, number):
    tensor = ("FP32", ["n", 2])
    model_files.write_model(
        root,
        "m",
        [helper.make_node("Neg", ["x"], ["y"])],
        [("x", *tensor)],
        [("y", *tensor)],
        version=number,
    )


def metrics_at(address):
    """Return what a server measures, by name."""
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=30) as page:
        text = page.read().decode()
    return dict(re.findall(r"^([^#\s]+) (\S+)$", text, re.MULTILINE))


@pytest.fixture
def server(model_files, tmp_path):
    """Return a server's metrics by name, read anew each time, and its repository."""
    write_version(model_files, tmp_path, 1)
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "headrace", "serve", "--model-repository", tmp_path),
            *("--grpc-address", "127.0.0.1:0", "--http-address", "127.0.0.1:0"),
            *("--workers", "1", "--drain-delay-s", "0", "--settle-s", "0.2"),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        line = process.stdout.readline()
        assert line, process.stderr.read()
        address = json.loads(line)["http_address"]
        yield lambda: metrics_at(address), tmp_path
    finally:
        process.terminate()
        try:
            process.communicate(timeout=30)
        finally:
            process.kill()
    assert process.returncode == 0


def test_a_model_that_was_loaded_is_looked_at_once_and_the_pause_is_measured(server, model_files):
    metrics, root = server
    name = 'headrace_gc_pause_seconds_count{generation="old"}'
    assert metrics()[name] == "0.0"  # what was there at the start is set aside before anybody calls

    write_version(model_files, root, 2)

    loads = 'headrace_model_loads_total{model="m",result="ready"}'
    until(lambda: metrics()[loads] == "2.0", 60)
    # An idle server would look at few new objects after half a minute, whatever was loaded.
    until(lambda: metrics()[name] != "0.0", LOOKED_AT_WITHIN_S)


@pytest.mark.alone
@pytest.mark.timeout(300)
def test_under_load_only_a_new_model_is_looked_at_and_nobody_waits_long_for_it(
    tmp_path,
):
    """The time that loading takes is the machine's: it is asked until a while after it."""
    tiny = bench.overload_models.TINY
    bench.overload_models.write_tiny(tmp_path / "models")
    questions = bench.flood.write_questions(tmp_path, tmp_path / "models", tiny)
    with bench.flood.gateway(tmp_path / "models") as server, asking(server, questions) as rounds:

        def count(name):
            return float(metrics_at(f"127.0.0.1:{server.http_port}")[name])

        def pauses(generation, suffix="count", more=""):
            return count(f'headrace_gc_pause_seconds_{suffix}{{generation="{generation}"{more}}}')

        until(lambda: len(rounds) == 1, 60)
        began_s, paused_s = time.monotonic(), pauses("young", "sum")
        shutil.copytree(tmp_path / "models" / tiny / "1", tmp_path / "models" / tiny / "2")
        loads = f'headrace_model_loads_total{{model="{tiny}",result="ready"}}'
        until(lambda: count(loads) == 2, 60)
        until(lambda: pauses("old") > 0, LOOKED_AT_WITHIN_S)
        so_far = len(rounds)
        until(lambda: len(rounds) == so_far + 3, 60)

        assert all(round_["errors"] == round_["wrong"] == 0 for round_ in rounds)
        assert pauses("old") <= LOOKS_AT_ALL_MAX
        assert pauses("middle") == 0
        for generation in ("young", "old"):
            short = pauses(generation, "bucket", f',le="{PAUSE_MAX_S}"')
            assert short == pauses(generation)
        paused_s = pauses("young", "sum") + pauses("old", "sum") - paused_s
        assert paused_s <= PAUSED_SHARE_MAX * (time.monotonic() - began_s)


@contextlib.contextmanager
def asking(server, questions):
    """Meanwhile ask a server, always as much as it can answer; figures of each round are added."""
    rounds, ends = [], threading.Event()

    def ask():
        while not ends.is_set():
            options = {"connections": 4, "in_flight": 16, "seconds": 2, "warm_up": 0.1}
            rounds.append(bench.flood.ask(server, questions, **options).figures)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield rounds
    finally:
        ends.set()
        thread.join(60)


def until(condition, timeout_s):
    limit_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < limit_s
        time.sleep(0.05)
