"""The load test passes on a healthy server, and fails on one with a slow stage."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

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


def test_a_scenario_that_does_not_exist_is_refused():
    done = loadtest("--scenario", "nothing")
    assert done.returncode == 2
    assert "slo.yaml has ['reload', 'steady']" in done.stderr
