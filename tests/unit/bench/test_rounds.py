"""Rounds between real processes: programs that answer lines, as the floor of ranking does."""

import json
import subprocess
import sys
from argparse import Namespace

import pytest

# Notes each start and each window, and has figures and answers of its own.
PROGRAM = """
import json, sys
name, notes, figures, answers, words, is_mute = json.loads(sys.argv[1])

def note(what):
    with open(notes, "a") as file:
        file.write(f"{name} {what}\\n")

note("starts")
if words:
    sys.exit(words)
if not is_mute:
    print("serving", flush=True)
for line in sys.stdin:
    is_compared = line.startswith("answers")
    note("is compared" if is_compared else "is measured")
    note("for " + line.split()[0])
    print(json.dumps(answers if is_compared else figures), flush=True)
"""
FIGURES = {"requests": 100, "requests_per_s": 50.0, "errors": 0, "mean_ms": 1.0, "cpu_s": 0.5}


@pytest.fixture
def arena(bench, tmp_path, monkeypatch):
    """Two such programs, and how to let them compete."""
    notes = tmp_path / "notes"
    notes.touch()
    peers = {}
    monkeypatch.setattr(bench.rounds, "PEERS", peers)
    monkeypatch.setattr(bench.rounds, "SETTLE_S", 0.0)

    def enter(name, figures=(), answers=(1.0, 2.0), words="", absence=None, *, is_mute=False):
        figures = FIGURES | dict(figures)
        what = json.dumps([name, str(notes), figures, answers, words, is_mute])
        launch = bench.peers.Launch([sys.executable, "-c", PROGRAM, what], is_program=True)
        peers[name] = bench.peers.Peer(lambda _stage, _port: launch, lambda: absence)

    def hold(rounds=2, **how):
        load = bench.contest.Load("tensor")
        sides = [bench.contest.Side(name, load) for name in ("one", "two")]
        question = bench.contest.Question("q", "t", *sides, "requests_per_s", **how)
        return bench.rounds.hold(question, Namespace(work=tmp_path), rounds, 1.0, told.append)

    def noted(what):
        lines = [line.split(" ", 1) for line in notes.read_text().splitlines()]
        return [name for name, noted in lines if noted == what]

    told = []
    enter("one")
    enter("two")
    return Namespace(enter=enter, hold=hold, noted=noted, told=told)


def test_each_is_as_often_first_as_second(arena):
    contest = arena.hold(rounds=4)

    warm_up, windows = arena.noted("is measured")[:2], arena.noted("is measured")[2:]
    assert warm_up == ["one", "two"]
    assert windows == ["one", "two", "two", "one", "one", "two", "two", "one"]
    assert arena.noted("starts") == ["one", "two"]
    assert len(contest.rounds) == 4


def test_a_question_of_percents_is_asked_more_often_than_others(arena):
    assert len(arena.hold(rounds=2, rounds_times=3).rounds) == 6


def test_processes_that_must_be_fresh_are_started_in_turn_for_each_round(arena):
    contest = arena.hold(rounds=3, is_fresh=True)

    assert arena.noted("starts") == ["one", "two", "two", "one", "one", "two"]
    assert len(contest.rounds) == 3
    assert contest.rounds[0][0]["requests"] == 4 * FIGURES["requests"]
    windows = ["one"] + ["two"] * 2 + ["one", "two"] + ["one"] * 2 + ["two"]
    assert arena.noted("for 1.0")[2:10] == windows  # after both warm-ups


def test_windows_in_a_round_between_fresh_processes_cancel_an_even_and_a_growing_drift(bench):
    signs = [1 - 2 * which for which in bench.rounds.WINDOWS]

    assert sum(signs) == 0
    assert sum(sign * at for at, sign in enumerate(signs)) == 0
    assert sum(sign * at**2 for at, sign in enumerate(signs)) == 0


def test_the_warm_up_is_in_no_figure_and_costs_nothing(arena):
    contest = arena.hold(rounds=1)

    first, _ = contest.rounds[0]
    assert first["requests"] == FIGURES["requests"]
    assert first["cpu_us"] == pytest.approx(1e6 * FIGURES["cpu_s"] / FIGURES["requests"])


@pytest.mark.parametrize("what", ["errors", "wrong"])
def test_wrong_answers_are_no_speed(arena, what):
    arena.enter("two", figures={what: 3})

    contest = arena.hold()

    assert contest.verdict == "failed"
    assert contest.failure == f"two: 3 answers are {what}"


def test_servers_that_disagree_are_not_compared(arena):
    arena.enter("two", answers=(1.0, 2.5))

    contest = arena.hold()

    assert contest.failure == "one and two disagree"
    assert arena.noted("is measured") == []


def test_a_server_that_does_not_start_fails_the_question_with_its_last_words(arena):
    arena.enter("two", words="no such model")

    contest = arena.hold()

    assert contest.failure == "two did not start: no such model"
    assert arena.told == ["q: failed: two did not start: no such model"]


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("no store"),
        ProcessLookupError("process 7 has ended"),
        subprocess.TimeoutExpired("ldd", 5),
    ],
)
def test_whatever_fails_is_that_question_s_failure(arena, bench, monkeypatch, error):
    def fail(_stage, _port):
        raise error

    monkeypatch.setitem(bench.rounds.PEERS, "two", bench.peers.Peer(fail))

    contest = arena.hold()

    assert contest.verdict == "failed"
    assert contest.failure == f"{type(error).__name__}: {error}"


def test_what_a_server_still_does_after_its_windows_is_in_its_own_figure(arena, bench, monkeypatch):
    """Each is left alone for as long before the other one's windows begin."""
    slept = []

    def sleep(seconds):
        slept.append((seconds, arena.noted("is measured")[2:]))

    monkeypatch.setattr(bench.rounds, "SETTLE_S", 7.0)
    monkeypatch.setattr(bench.rounds.time, "sleep", sleep)

    arena.hold(rounds=1, is_fresh=True)

    turns = [noted for seconds, noted in slept if seconds == 7.0 and noted]
    assert [turn[-1] for turn in turns] == ["one", "two", "one", "two", "one", "two"]
    assert turns[-1] == ["one", "two", "two", "one", "two", "one", "one", "two"]


METRICS = """
# TYPE headrace_requests counter
headrace_requests_total{model="tensor"} 1000
# TYPE headrace_spans counter
headrace_spans_total{result="exported"} 40
headrace_spans_total{result="dropped"} %d
# TYPE headrace_stream_rows counter
headrace_stream_rows_total{result="sent"} 1000
headrace_stream_rows_total{result="dropped"} 0
headrace_stream_rows_total{result="refused"} 0
"""


@pytest.mark.parametrize(
    ("dropped", "failure", "notes"),
    [
        (0, None, []),
        (1, None, ["round 1: one dropped 1 of 41 spans"]),
        (10, "one dropped 10 of 50 spans: it would look too cheap", []),
    ],
)
def test_who_does_not_tell_of_what_it_should_is_noted_or_not_called_cheap(
    arena, bench, monkeypatch, dropped, failure, notes
):
    monkeypatch.setattr(
        bench.servers.Server,
        "drops",
        lambda server: bench.drops.drops(METRICS % dropped if server.name == "one" else ""),
    )

    contest = arena.hold(rounds=1, is_fresh=True)

    assert (contest.failure, contest.notes) == (failure, notes)


def test_a_server_that_says_nothing_is_not_waited_for_without_end(arena, bench, monkeypatch):
    monkeypatch.setattr(bench.servers, "START_TIMEOUT_S", 0.5)
    arena.enter("two", is_mute=True)

    contest = arena.hold()

    assert contest.failure.startswith("two did not start")


def test_who_is_not_here_is_skipped_and_nobody_is_started(arena):
    arena.enter("two", absence="install it")

    contest = arena.hold()

    assert (contest.verdict, contest.skipped) == ("skipped", "install it")
    assert arena.noted("starts") == []
