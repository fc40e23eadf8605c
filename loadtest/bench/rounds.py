"""Interleaved rounds: two servers measured in turn, each as often first as second."""

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack

import numpy as np
from contest import FIGURES, Contest, Load, Question, Side, together
from peers import PEERS
from servers import TOLERANCE, WARM_UP_S, NotMeasuredError, Server
from stage import Stage

SETTLE_S = 1.2
"""Spans, records and metrics are sent up to a second after the replies; they cost the round."""

WINDOWS = (0, 1, 1, 0, 1, 0, 0, 1)
"""
Who is measured in a round between fresh processes: what drifts evenly, or ever faster, is in both
alike. Source: the Thue-Morse sequence, whose first 2^n signs have no moments below the n-th.
"""

Tell = Callable[[str], None]


def hold(question: Question, stage: Stage, rounds: int, seconds: float, tell: Tell) -> Contest:
    """
    Ask a question for a number of rounds.

    Args:
        question: The question.
        stage: What its servers are started on.
        rounds: How many, one at least.
        seconds: For each server, in each round.
        tell: Takes a line of progress.

    Returns:
        What came of it; `skipped` where a server is not here, `failure` where one did not serve.
    """
    contest = Contest(question)
    sides = (question.first, question.second)
    absences = [PEERS[side.server].absence() for side in sides]
    contest.skipped = next((reason for reason in absences if reason), None)
    if contest.skipped is not None:
        tell(f"{question.name}: skipped: {contest.skipped}")
        return contest
    try:
        if question.is_fresh:
            for number in range(rounds):
                with ExitStack() as stack:
                    servers = _start(sides, stage, stack, is_turned=bool(number % 2))
                    order = tuple(which ^ (number % 2) for which in WINDOWS)
                    _round(contest, sides, servers, order, 2 * seconds / len(WINDOWS))
                    tell(_progress(contest, rounds))
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
    except NotMeasuredError as error:
        contest.failure = str(error)
        tell(f"{question.name}: failed: {error}")
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
    return servers[::-1] if is_turned else servers


def _round(
    contest: Contest,
    sides: tuple[Side, Side],
    servers: Sequence[Server],
    order: Sequence[int],
    seconds: float,
) -> None:
    windows: tuple[list[dict[str, float]], ...] = ([], [])
    before_s = [server.used_s() for server in servers]
    for which in order:
        windows[which].append(servers[which].measure(sides[which].load, seconds))
    time.sleep(SETTLE_S)
    first, second = (
        together(windows[i], servers[i].used_s() - before_s[i], sides[i].load.rows)
        for i in range(2)
    )
    contest.rounds.append((first, second))


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
