"""A server's garbage collector, seen from outside: a process of its own, its metrics."""

import json
import re
import subprocess
import sys
import time
import urllib.request

import pytest
from onnx import helper


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

    limit_s = time.monotonic() + 60
    while metrics()[name] == "0.0":
        assert time.monotonic() < limit_s
        time.sleep(0.05)
    assert metrics()['headrace_model_loads_total{model="m",result="ready"}'] == "2.0"
