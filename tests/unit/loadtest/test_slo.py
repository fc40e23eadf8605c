"""Targets, the stages of a test, and what counts as a target missed."""

import importlib
import socket
import sys
import threading
import time
from argparse import Namespace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

LOADTEST = Path(__file__).parents[3] / "loadtest"
NAMES = ("slo", "stages", "delay")


@pytest.fixture(scope="module")
def load():
    sys.path.insert(0, str(LOADTEST))
    try:
        yield Namespace(**{name: importlib.import_module(name) for name in NAMES})
    finally:
        sys.path.remove(str(LOADTEST))
        for name in NAMES:
            sys.modules.pop(name, None)


SCENARIO = """
scenarios:
  one:
    shape: steady
    users: 20
    seconds: 10
    latency_ms: {home: {p50: 10, p99: 50}}
    error_share: 0.01
    achieved_share: 0.9
"""


@pytest.fixture
def scenario(load, tmp_path):
    (tmp_path / "slo.yaml").write_text(SCENARIO)
    return load.slo.read_targets(tmp_path / "slo.yaml").scenarios["one"]


def requests(load, times_ms, failures=0, name="home"):
    return load.slo.Requests(name, sum(times_ms.values()), failures, times_ms)


def missed(load, scenario, found, achieved_per_s=200):
    return load.slo.missed(scenario, found, achieved_per_s=achieved_per_s, offered_per_s=200)


def test_the_projects_own_targets_are_well_formed(load):
    scenarios = load.slo.read_targets().scenarios
    assert set(scenarios) == {"steady", "reload"}
    assert scenarios["reload"].reload_every_s == 2
    assert all(of.error_share == 0 for of in scenarios.values())


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (("shape: steady", "shape: square"), "scenarios.one.shape"),
        (("users: 20", "users: 0"), "scenarios.one.users"),
        (("users: 20", "users: true"), "scenarios.one.users"),
        (("seconds: 10", "seconds: '10'"), "scenarios.one.seconds"),
        (("p99: 50", "p99: .nan"), "scenarios.one.latency_ms.home.p99"),
        (("p99: 50", "p99: .inf"), "scenarios.one.latency_ms.home.p99"),
        (("p99: 50", "p99: -50"), "scenarios.one.latency_ms.home.p99"),
        (("p99: 50", "p10: 50"), "scenarios.one.latency_ms.home.p10"),
        (("{p50: 10, p99: 50}", "{}"), "scenarios.one.latency_ms.home"),
        (("users: 20", "users: 20\n    users: 2"), "'users' is there twice"),
        (("p99: 50", "p98: 50"), "scenarios.one.latency_ms.home.p98"),
        (("error_share: 0.01", "errors: 1"), "scenarios.one.errors"),
        (("scenarios:", "scenario:"), "scenarios: Field required"),
        (("scenarios:", "scenarios: ["), "slo.yaml"),
    ],
)
def test_a_wrong_target_is_named_by_its_place(load, tmp_path, change, complaint):
    (tmp_path / "slo.yaml").write_text(SCENARIO.replace(*change))
    with pytest.raises(ValueError, match=complaint.replace(".", r"\.")):
        load.slo.read_targets(tmp_path / "slo.yaml")


def test_targets_that_are_met_leave_nothing_to_say(load, scenario):
    assert missed(load, scenario, [requests(load, {5.0: 99, 50.0: 1})]) == []


@pytest.mark.parametrize(
    ("times_ms", "failures", "achieved_per_s", "complaint"),
    [
        ({11.0: 100}, 0, 200, "home: p50 11 ms, wanted at most 10"),
        ({5.0: 97, 60.0: 3}, 0, 200, "home: p99 60 ms, wanted at most 50"),
        ({5.0: 100}, 2, 200, "2 of 100 requests failed, wanted at most 1.0%"),
        ({5.0: 100}, 0, 179, "179 of 200 offered requests/s"),
        ({}, 0, 200, "home: no request was made"),
    ],
)
def test_a_target_that_is_missed_is_named(
    load, scenario, times_ms, failures, achieved_per_s, complaint
):
    (fault,) = missed(load, scenario, [requests(load, times_ms, failures)], achieved_per_s)
    assert complaint in fault


@given(st.dictionaries(st.floats(0, 1e4), st.integers(1, 50), min_size=1))
def test_a_percentile_is_exceeded_by_no_more_than_its_rest(load, times_ms):
    of = requests(load, times_ms)
    for name, share in (("p50", 0.5), ("p95", 0.95), ("p99", 0.99)):
        limit_ms = of.percentile_ms(name)
        above = sum(n for ms, n in times_ms.items() if ms > limit_ms)
        assert above <= (1 - share) * of.count + 1e-9


SHAPES = ("steady", "ramp", "spike")


@pytest.mark.parametrize("shape", SHAPES)
@given(users=st.integers(1, 500), seconds=st.floats(1, 1e4))
def test_a_plan_lasts_as_long_as_asked_and_reaches_all_users(load, shape, users, seconds):
    stages = load.stages.plan(shape, users, seconds)
    ends = [stage.until_s for stage in stages]
    assert ends == sorted(ends)
    assert ends[-1] == seconds
    assert max(stage.users for stage in stages) == users
    assert min(stage.users for stage in stages) >= 1
    assert 0 < load.stages.user_seconds(stages) <= users * seconds * (1 + 1e-9)


def test_what_is_offered_is_the_area_under_the_shape(load):
    stages = load.stages.plan("spike", 40, 30)
    assert load.stages.user_seconds(stages) == 10 * 10 + 40 * 10 + 10 * 10


def test_a_shape_that_does_not_exist_is_refused(load):
    with pytest.raises(ValueError, match="no shape 'square'"):
        load.stages.plan("square", 1, 1)


@pytest.mark.alone
def test_the_proxy_delays_what_is_sent_and_nothing_else(load):
    with socket.create_server(("127.0.0.1", 0)) as server:

        def echo():
            connection, _ = server.accept()
            with connection:
                while data := connection.recv(100):
                    connection.sendall(data)

        thread = threading.Thread(target=echo)
        thread.start()
        with load.delay.DelayingProxy(f"127.0.0.1:{server.getsockname()[1]}", 0.1) as proxy:
            host, _, port = proxy.address.rpartition(":")
            with socket.create_connection((host, int(port)), 5) as caller:
                started_s = time.perf_counter()
                caller.sendall(b"hello")
                assert caller.recv(100) == b"hello"
                assert 0.1 <= time.perf_counter() - started_s < 2
        thread.join(5)
        assert not thread.is_alive()
