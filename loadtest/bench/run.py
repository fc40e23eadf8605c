"""Measure the gateway beside its ceiling, its floor and its peers, in interleaved rounds.

    python loadtest/bench/run.py [--rounds 11] [--seconds 1.5] [--only NAME ...] [--list]

Writes a page under loadtest/results/. Exits with 1 when a target is missed, and with 2 when a
question could not be asked, or was answered wrongly. A peer that is not installed is skipped, and
named. Needs two cores: the server has the first one for itself; the generator, the feature store, a
monitor and a collector share the second. The gateway runs with all that watches it: metrics, one
call in a hundred traced, and every prediction streamed to the monitor.
"""

import argparse
import json
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from contest import Contest, Question
from contests import QUESTIONS
from page import ROOT, as_json, line, write

NAMES = [question.name for question in QUESTIONS]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write the page, print the table; return the exit status."""
    options = _options(arguments)
    if options.list:
        for question in QUESTIONS:
            print("\t".join((question.name, question.title, str(question.target or "-"))))
        return 0
    if (os.cpu_count() or 1) < 2:
        _tell("bench: needs two cores, one for the server and one for the load")
        return 2
    asked = [question for question in QUESTIONS if question.name in (options.only or NAMES)]
    contests = _ask(asked, options)
    if options.json:
        print(json.dumps([as_json(contest) for contest in contests]))
    else:
        print("\n".join(map(line, contests)))
    if not options.no_page:
        page = ROOT / "loadtest" / "results" / f"{datetime.now(UTC):%Y-%m-%d}-gateway.md"
        page.write_text(write(contests, _command(options), options.rounds, options.seconds))
        _tell(f"written: {page.relative_to(ROOT)}")
    return _status(contests)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=11, help="of each question")
    parser.add_argument("--seconds", type=float, default=1.5, help="for each server in a round")
    parser.add_argument("--only", nargs="+", choices=NAMES, metavar="NAME", help="see --list")
    parser.add_argument("--list", action="store_true", help="name, title and target of each")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.add_argument("--no-page", action="store_true", help="write no results page")
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error(f"--rounds {options.rounds}: expected at least 1")
    if not 0.1 <= options.seconds <= 600:
        parser.error(f"--seconds {options.seconds:g}: expected 0.1 to 600")
    return options


def _ask(questions: Sequence[Question], options: argparse.Namespace) -> list[Contest]:
    # Feast, ONNX and pandas take seconds to import: the list and a wrong option need not wait.
    from rounds import hold  # noqa: PLC0415
    from stage import Stage  # noqa: PLC0415
    from subjects import GENERATOR_CORE  # noqa: PLC0415

    os.sched_setaffinity(0, {GENERATOR_CORE})
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the servers are stopped on the way
    with tempfile.TemporaryDirectory() as folder, Stage(Path(folder)) as stage:
        return [
            hold(question, stage, options.rounds, options.seconds, _tell) for question in questions
        ]


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _status(contests: Sequence[Contest]) -> int:
    for contest in contests:
        title = contest.question.title
        if contest.failure is not None:
            _tell(f"failed: {title}: {contest.failure}")
        elif contest.skipped is not None:
            _tell(f"skipped: {title}: {contest.skipped}")
        elif contest.is_missed:
            target = contest.question.target
            _tell(f"missed: {title}: {contest.ratio:.3f}, not {target}")
    if any(contest.failure is not None for contest in contests):
        return 2
    return 1 if any(contest.is_missed for contest in contests) else 0


def _command(options: argparse.Namespace) -> str:
    only = f" --only {' '.join(options.only)}" if options.only else ""
    numbers = f"--rounds {options.rounds} --seconds {options.seconds:g}"
    return f"python loadtest/bench/run.py {numbers}{only}"


if __name__ == "__main__":
    sys.exit(main())
