"""A server's garbage collector, seen from outside: a process of its own, its metrics."""

import json
import re
import subprocess
import sys
import time
import urllib.request

import pytest
from onnx import helper

from headrace.garbage.pace import IDLE_PERIOD_S

LOOKED_AT_WITHIN_S = IDLE_PERIOD_S / 4


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
        url = f"http://{json.loads(line)['http_address']}/metrics"

        def metrics():
            with urllib.request.urlopen(url, timeout=30) as page:
                text = page.read().decode()
            return dict(re.findall(r"^([^#\s]+) (\S+)$", text, re.MULTILINE))

        yield metrics, tmp_path
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


def until(condition, timeout_s):
    limit_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < limit_s
        time.sleep(0.05)
