"""Interleaved rounds: two servers measured in turn, each as often first as second."""

import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from itertools import groupby

import grpc
import numpy as np
from contest import FIGURES, Contest, Load, Question, Side, together
from peers import PEERS
from servers import SETTLE_S, TOLERANCE, WARM_UP_S, NotMeasuredError, Server
from stage import Stage

FAILURES = (
    *(NotMeasuredError, RuntimeError, ValueError, OSError),
    *(subprocess.SubprocessError, grpc.RpcError),
)
"""What may become of a question; the others are asked all the same."""

WINDOWS = (0, 1, 1, 0, 1, 0, 0, 1)
"""
Who is measured in a round between fresh processes: what drifts evenly, or ever faster, is in both
alike. Each is as long as a round of other questions: what is sent after a window counts too, and
was much beside a shorter one. Source: the Thue-Morse sequence, whose first 2^n signs have no
moments below the n-th.
"""

Tell = Callable[[str], None]


def hold(question: Question, stage: Stage, rounds: int, seconds: float, tell: Tell) -> Contest:
    """
    Ask a question for a number of rounds.

    Args:
        question: The question.
        stage: What its servers are started on.
        rounds: How many, one at least; times `question.rounds_times`.
        seconds: For each server, in each round; between fresh processes, in each window.
        tell: Takes a line of progress.

    Returns:
        What came of it; `skipped` where a server is not here, `failure` where one did not serve.
    """
    contest = Contest(question)
    rounds *= question.rounds_times
    sides = (question.first, question.second)
    try:
        absences = [PEERS[side.server].absence() for side in sides]
        contest.skipped = next((reason for reason in absences if reason), None)
        if contest.skipped is not None:
            tell(f"{question.name}: skipped: {contest.skipped}")
            return contest
        if question.is_fresh:
            for number in range(rounds):
                with ExitStack() as stack:
                    servers = _start(sides, stage, stack, is_turned=bool(number % 2))
                    order = tuple(which ^ (number % 2) for which in WINDOWS)
                    _round(contest, sides, servers, order, seconds)
                    tell(_progress(contest, rounds))
                    contest.notes += [
                        f"round {number + 1}: {said}" for said in _look_for_drops(servers)
                    ]
        else:
            with ExitStack() as stack:
                servers = _start(sides, stage, stack, is_turned=False)
                for number in range(rounds):
                    order = (0, 1) if number % 2 == 0 else (1, 0)
                    _round(contest, sides, servers, order, seconds)
                    tell(_progress(contest, rounds))
                contest.notes += [
                    f"{server.name} died {server.deaths} times of the generator's leaving with "
                    "requests in flight, and was started anew"
                    for server in servers
                    if server.deaths
                ]
    except FAILURES as error:
        is_plain = isinstance(error, NotMeasuredError)
        contest.failure = str(error) if is_plain else f"{type(error).__name__}: {error}"
        tell(f"{question.name}: failed: {contest.failure}")
    return contest


def _start(
    sides: tuple[Side, Side], stage: Stage, stack: ExitStack, *, is_turned: bool
) -> list[Server]:
    """Start both, check that they agree, and warm them up."""
    order = sides[::-1] if is_turned else sides
    servers = [stack.enter_context(Server(s.server, PEERS[s.server], stage)) for s in order]
    _refuse_disagreement(servers, [side.load for side in order])
    for server, side in zip(servers, order, strict=True):
        server.measure(side.load, WARM_UP_S)
        time.sleep(SETTLE_S)
    return servers[::-1] if is_turned else servers


def _round(
    contest: Contest,
    sides: tuple[Side, Side],
    servers: Sequence[Server],
    order: Sequence[int],
    seconds: float,
) -> None:
    """Measure; what a server still sends after its windows is its own, and in nobody else's."""
    windows: tuple[list[dict[str, float]], ...] = ([], [])
    cpu_s = [0.0, 0.0]
    for which, turns in groupby(order):
        server, before_s = servers[which], servers[which].used_s()
        for _ in turns:
            windows[which].append(server.measure(sides[which].load, seconds))
        time.sleep(SETTLE_S)
        cpu_s[which] += server.used_s() - before_s
    first, second = (together(windows[i], cpu_s[i], sides[i].load.rows) for i in range(2))
    contest.rounds.append((first, second))


def _look_for_drops(servers: Sequence[Server]) -> list[str]:
    """Return what was not told of; refuse the question where that is much of it."""
    found = []
    for server in servers:
        for drop in server.drops():
            if drop.is_too_much:
                raise NotMeasuredError(f"{server.name} dropped {drop}: it would look too cheap")
            found.append(f"{server.name} dropped {drop}")
    return found


def _refuse_disagreement(servers: Sequence[Server], loads: Sequence[Load]) -> None:
    """Ask both the same; wrong answers are no speed."""
    one, two = (server.answers(load) for server, load in zip(servers, loads, strict=True))
    if one.shape != two.shape or not np.allclose(one, two, rtol=TOLERANCE, atol=TOLERANCE):
        raise NotMeasuredError(f"{servers[0].name} and {servers[1].name} disagree")


def _progress(contest: Contest, rounds: int) -> str:
    question = contest.question
    unit, form = FIGURES[question.figure]
    first, second = (format(side[question.figure], form) for side in contest.rounds[-1])
    return (
        f"{question.name:<14} round {len(contest.rounds)}/{rounds}  {first:>9} : {second:>9} {unit}"
        f"  {contest.ratios[-1]:.3f}"
    )
