"""The load test passes on a healthy server, and fails on one with a slow stage."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

pytestmark = pytest.mark.alone

ROOT = Path(__file__).parents[2]


def loadtest(*arguments):
    return subprocess.run(
        [sys.executable, str(ROOT / "loadtest" / "run.py"), "--no-page", "--json", *arguments],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.timeout(250)
def test_a_healthy_server_meets_every_target_while_versions_change():
    done = loadtest("--seconds", "10")
    assert done.returncode == 0, done.stderr
    steady, reload = json.loads(done.stdout)
    assert list(steady["versions"]) == ["1"]
    assert len(reload["versions"]) >= 3
    assert all(of["failures"] == 0 for of in reload["requests"].values())


@pytest.mark.slow
@pytest.mark.timeout(250)
def test_a_stage_of_fifty_milliseconds_is_found():
    done = loadtest("--scenario", "steady", "--seconds", "5", "--inject-delay-ms", "50")
    assert done.returncode == 1
    assert "missed: steady: one home: p50" in done.stderr


@pytest.mark.parametrize(
    "option", [("--seconds", "-5"), ("--seconds", "nan"), ("--inject-delay-ms", "-1")]
)
def test_a_test_that_cannot_be_run_is_no_target_missed(option):
    done = loadtest(*option)
    assert done.returncode == 2
    assert f"{option[0]} {option[1]}: expected" in done.stderr


def children(process):
    listed = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    return [int(child) for child in listed.split()]


@pytest.mark.slow
def test_a_test_that_is_stopped_stops_its_server():
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "loadtest" / "run.py"), "--scenario", "steady"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    started = []
    try:
        deadline_s = time.monotonic() + 60
        while len(started := children(process)) < 2:  # `headrace up`, then Locust
            assert process.poll() is None
            assert time.monotonic() < deadline_s
            time.sleep(0.05)
        process.terminate()
        assert process.wait(60) != 0
        assert not any(Path(f"/proc/{child}").exists() for child in started)
    finally:
        process.kill()
        process.wait()
        for child in started:
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGINT)


def test_a_scenario_that_does_not_exist_is_refused():
    done = loadtest("--scenario", "nothing")
    assert done.returncode == 2
    assert "slo.yaml has ['reload', 'steady']" in done.stderr
