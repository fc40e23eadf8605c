"""Measure the gateway beside its ceiling, its floor and its peers, and under overload.

    python loadtest/bench/run.py [--rounds 7] [--seconds 1] [--only NAME ...] [--list]

Interleaved rounds of two servers for each question, then, of the gateway alone, what is still
answered when more is asked than can be (`overload.py`). Writes a page under loadtest/results/, of
some questions only with `--page`. Exits with 1 when a target is missed, and with 2 when a
question could not be asked, or was answered wrongly. A peer that is not installed is skipped, and
named. Needs two cores, and `taskset` to keep them apart: the server has the first one for itself;
the generator, the feature store, a monitor and a collector share the second. The gateway runs with
all that watches it: metrics, one call in a hundred traced, and every prediction streamed to the
monitor.
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
from typing import TYPE_CHECKING

from contest import Contest, Question
from contests import QUESTIONS
from cores import ARE_ENOUGH, GENERATOR_CORE
from page import ROOT, Section, as_json, line, write

if TYPE_CHECKING:
    from overload_page import Overload

OVERLOAD = "overload"
OVERLOAD_TITLE = "slow and tiny models at 0.1 to 5 times their peak, open loop"
OVERLOAD_TARGETS = "goodput ≥ 0.9, refused ≤ 5 ms, recovery ≤ 2 s"
OVERLOAD_ROUNDS, OVERLOAD_STRETCH = 5, 10 / 3
"""At most so many rounds, each load for so many times the seconds of the others: 1.5 makes 5."""

NAMES = [*(question.name for question in QUESTIONS), OVERLOAD]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write the page, print the table; return the exit status."""
    options = _options(arguments)
    if options.list:
        for question in QUESTIONS:
            print("\t".join((question.name, question.title, str(question.target or "-"))))
        print(f"{OVERLOAD}\t{OVERLOAD_TITLE}\t{OVERLOAD_TARGETS}")
        return 0
    if not ARE_ENOUGH:
        _tell("bench: needs two cores, one for the server and one for the load")
        return 2
    asked = options.only or NAMES
    contests, overload = _ask(
        [question for question in QUESTIONS if question.name in asked],
        options,
        is_overloaded=OVERLOAD in asked,
    )
    page = None
    if options.page or not (options.no_page or options.only):
        page = ROOT / "loadtest" / "results" / f"{datetime.now(UTC):%Y-%m-%d}-gateway.md"
    section = None if overload is None else _section(overload, page)
    if options.json:
        print(json.dumps([as_json(contest) for contest in contests] + _as_json(overload)))
    else:
        print("\n".join(map(line, contests)))
        for row in section.rows if section else ():
            print("  ".join(row))
    if page is not None:
        command = _command(options)
        page.write_text(write(contests, command, options.rounds, options.seconds, section))
        _tell(f"written: {page.relative_to(ROOT)}")
    return max(_status(contests), 0 if overload is None else _say(overload))


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--rounds",
        type=int,
        default=7,
        help="of each question; twice as many where a percent or three are told",
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=1.0,
        help="for each server in a round; four times that where percents are told",
    )
    parser.add_argument(
        "--overload-seconds", type=float, help="for each load; else 10/3 of --seconds"
    )
    parser.add_argument("--only", nargs="+", choices=NAMES, metavar="NAME", help="see --list")
    parser.add_argument("--list", action="store_true", help="name, title and target of each")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.add_argument("--page", action="store_true", help="write a page of --only, too")
    parser.add_argument("--no-page", action="store_true", help="write no results page")
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error(f"--rounds {options.rounds}: expected at least 1")
    if not 0.1 <= options.seconds <= 600:
        parser.error(f"--seconds {options.seconds:g}: expected 0.1 to 600")
    if options.overload_seconds is None:
        options.overload_seconds = OVERLOAD_STRETCH * options.seconds
    if not 0.1 <= options.overload_seconds <= 600:
        parser.error(f"--overload-seconds {options.overload_seconds:g}: expected 0.1 to 600")
    return options


def _ask(
    questions: Sequence[Question], options: argparse.Namespace, *, is_overloaded: bool
) -> "tuple[list[Contest], Overload | None]":
    # Feast, ONNX and pandas take seconds to import: the list and a wrong option need not wait.
    from overload import measure  # noqa: PLC0415
    from rounds import hold  # noqa: PLC0415
    from stage import Stage  # noqa: PLC0415

    os.sched_setaffinity(0, {GENERATOR_CORE})
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the servers are stopped on the way
    with tempfile.TemporaryDirectory() as folder, Stage(Path(folder)) as stage:
        contests = [
            hold(question, stage, options.rounds, options.seconds, _tell) for question in questions
        ]
        if not is_overloaded:
            return contests, None
        rounds = min(options.rounds, OVERLOAD_ROUNDS)
        return contests, measure(stage, rounds, options.overload_seconds, _tell)


def _section(overload: "Overload", page: Path | None) -> Section:
    from overload import draw  # noqa: PLC0415
    from overload_page import section  # noqa: PLC0415

    if page is not None:
        draw(overload, page.with_name(page.stem + "-overload.png"), _tell)
    return section(overload)


def _as_json(overload: "Overload | None") -> list[dict[str, object]]:
    from overload import as_json as all_of  # noqa: PLC0415

    return [] if overload is None else [{"name": OVERLOAD, **all_of(overload)}]


def _say(overload: "Overload") -> int:
    from overload import say  # noqa: PLC0415

    say(overload, _tell)
    return overload.status


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
    if options.overload_seconds != OVERLOAD_STRETCH * options.seconds:
        numbers += f" --overload-seconds {options.overload_seconds:g}"
    return f"python loadtest/bench/run.py {numbers}{only}"


if __name__ == "__main__":
    sys.exit(main())
