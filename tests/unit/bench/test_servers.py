"""A server that is measured is asked by the real generator, and judged by every answer."""

import pytest


@pytest.fixture
def stage(bench, tmp_path):
    with bench.stage.Stage(tmp_path) as stage:
        yield stage


def ceiling(bench, stage):
    name = bench.names.CEILING
    return bench.servers.Server(name, bench.peers.PEERS[name], stage)


def test_right_answers_are_counted_with_what_they_cost(bench, stage):
    with ceiling(bench, stage) as server:
        figures = server.measure(bench.contests.LOADED, 0.3)
        used_s = server.used_s()

    assert figures["requests"] > 0
    assert (figures["wrong"], figures["errors"]) == (0, 0)
    assert used_s > 0


def test_answers_that_are_another_request_s_are_found_out(bench, stage):
    """The servers would agree with each other: it is the generator that knows better."""
    answers = stage.answers("tensor")
    whole = answers.read_bytes()
    one = len(whole) // len(bench.stage.REQUESTS["tensor"]())
    answers.write_bytes(whole[one:] + whole[:one])

    with (
        ceiling(bench, stage) as server,
        pytest.raises(bench.servers.NotMeasuredError, match=r"ceiling: [0-9]+ answers are wrong"),
    ):
        server.measure(bench.contests.LOADED, 0.3)


def test_a_server_that_died_is_not_measured_as_cheap(bench, stage):
    with ceiling(bench, stage) as server:
        server._process.kill()
        server._process.wait()

        with pytest.raises(bench.servers.NotMeasuredError, match="ceiling died"):
            server.used_s()
