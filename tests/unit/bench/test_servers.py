"""A server that is measured is asked by the real generator, and judged by every answer."""

import dataclasses

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


def test_a_server_that_dies_in_its_warm_up_is_started_anew_and_only_its_window_counts(
    bench, stage, monkeypatch
):
    """As Triton does when a client leaves; its start and its warm-ups cost seconds."""
    deadly = [True, True, False, False]  # a window; then warm-ups, and a window
    asked_s = []

    with ceiling(bench, stage) as server:
        generate = server._generate

        def dying(load, seconds):
            asked_s.append(seconds)
            if deadly.pop(0):
                server._process.kill()
                server._process.wait()
            return generate(load, seconds)

        server._launch = dataclasses.replace(server._launch, is_fragile=True)
        monkeypatch.setattr(server, "_generate", dying)
        before_s = server.used_s()
        figures = server.measure(bench.contests.LOADED, 0.3)
        used_s = server.used_s() - before_s

    assert asked_s == [0.3, bench.servers.WARM_UP_S, bench.servers.WARM_UP_S, 0.3]
    assert server.deaths == 2
    assert figures["requests"] > 0
    assert 0 < used_s < 0.8


def test_what_a_gateway_did_not_tell_of_is_asked_of_itself(bench, stage, monkeypatch):
    """All that is counted is told of by a gateway with a monitor and a collector."""
    texts = []
    monkeypatch.setattr(bench.servers, "drops", lambda text: texts.append(text) or [])
    name = bench.names.GATEWAY
    with bench.servers.Server(name, bench.peers.PEERS[name], stage) as server:
        server.measure(bench.contests.ALONE, 0.3)
        assert server.drops() == []

    (text,) = texts
    for counted in (
        *("headrace_requests_total{", "headrace_call_records_dropped_total "),
        *('headrace_stream_rows_total{result="dropped"}', 'spans_total{result="dropped"}'),
    ):
        assert counted in text
    assert bench.drops.drops(text) == []


def test_the_generator_tells_how_much_of_its_core_was_left(bench, stage):
    """Where it is kept on one, as a bench keeps it; a test that is not knows nothing of it."""
    with ceiling(bench, stage) as server:
        figures = server.measure(bench.contests.ALONE, 0.3)

    is_kept = bench.cores.own_core() is not None
    assert ("generator_idle_share" in figures) is True
    assert (figures["generator_idle_share"] is not None) is is_kept
