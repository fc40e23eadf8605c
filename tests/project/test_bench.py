"""`make bench` asks what it says it asks, and its servers answer."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def bench(*arguments, timeout_s=60):
    return subprocess.run(
        [sys.executable, str(ROOT / "loadtest" / "bench" / "run.py"), *arguments],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


def test_the_list_names_every_target_of_the_design_that_it_is_to_prove():
    listed = [line.split("\t") for line in bench("--list").stdout.splitlines()]

    targets = {name: target for name, _, target in listed if target != "-"}
    assert targets == {
        "tensors": "≥ 0.85",
        "alone": "≤ 1.2",
        "entity": "≥ 10",
        "ranking": "≥ 0.6",
        "traces": "≥ 0.97",
        "traces-all": "≥ 0.85",
        "stream": "≥ 0.97",
        "overload": "goodput ≥ 0.9, refused ≤ 5 ms, recovery ≤ 2 s",
    }
    assert {"metrics", "workers", "aio", "mlserver", "triton"} <= {name for name, _, _ in listed}


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.timeout(580)
@pytest.mark.parametrize(
    "names", [("aio", "control"), ("ranking-many", "ranking", "ranking-fields")]
)
def test_servers_agree_and_are_measured(names):
    """Whether a target is met is for the bench to say, on a machine that has nothing else to do."""
    done = bench(
        *("--rounds", "1", "--seconds", "0.3", "--no-page", "--json", "--only", *names),
        timeout_s=560,
    )

    assert done.returncode in {0, 1}, done.stderr
    found = json.loads(done.stdout)
    assert {one["name"] for one in found} == set(names)
    for one in found:
        assert one["reason"] is None
        for side in one["rounds"][0]:
            assert side["requests"] > 0
            assert side["cpu_s"] > 0


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.timeout(580)
def test_overload_is_one_of_its_questions_and_every_load_is_answered_rightly():
    done = bench(
        *("--rounds", "1", "--seconds", "0.3", "--no-page", "--json", "--only", "overload"),
        timeout_s=560,
    )

    assert done.returncode in {0, 1, 2}, done.stderr  # 2: the generator was late, on a busy machine
    (found,) = json.loads(done.stdout)
    assert (found["name"], found["failures"]) == ("overload", [])
    for model, least in (("slow", 5.0), ("tiny", 2.0)):
        points = found[model]["points"]
        assert max(point["share"] for point in points) >= least
        assert all(point["wrong"] == point["lost"] == 0 for point in points)
