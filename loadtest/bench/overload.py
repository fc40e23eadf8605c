"""Ask a gateway for more than it can answer, and see how much it still does.

    python loadtest/bench/overload.py [--rounds 5] [--seconds 5] [--only slow|tiny] [--shares 2,5]
        [--streams 125]

Two models, each with a gateway of its own: one whose row costs 8 ms, far more than a refusal, and a
tiny MLP. Each round finds the peak in a closed loop, then offers 0.1 to 5 times that at random
times; after each flood half the peak is asked, to see how soon all is well. The gateway has its
default settings and all that watches it: metrics, one call in a hundred traced, every prediction
streamed to a monitor. Writes a page and a curve under loadtest/results/ (of a part of it only with
`--page`) and exits with 1 when a target is missed, with 2 when something could not be measured.
Needs two cores: the gateway has the first one for itself, the others share the second. `run.py`
asks the same among its own questions.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import cores
import flood
import goodput
import goodput_curve
import overload_models
from cores import GENERATOR_CORE, SERVER_CORE
from flood import Flood, Gateway, Questions
from goodput import Peak, Sweep
from overload_models import SLOW, TINY
from overload_page import Overload, page
from page import ROOT, circumstances
from stage import Stage

RESULTS = ROOT / "loadtest" / "results"
ROUNDS, SECONDS = 5, 5.0
SHARES = {
    SLOW: (0.1, 0.25, 0.5, 0.75, 0.9, 1.0, 1.25, 1.5, 2.0, 3.0, 5.0),
    TINY: (0.1, 0.5, 0.9, 1.5, 2.0),
}
CALM_SHARE, CALM_S, CALM_S_MIN = 0.5, 5.0, 3.0
"""What is asked after a flood, for as long as it, within bounds: recovery may take two seconds."""

WARM_UP_S, WARM_UP_S_MAX = 1.0, 4.0
CONNECTIONS = 4
FAILURES = (RuntimeError, ValueError, OSError, subprocess.SubprocessError, ZeroDivisionError)
"""What may become of a model's measurement; the other one is measured all the same."""

Tell = Callable[[str], None]


class Subject(NamedTuple):
    """
    A model that is asked.

    Args:
        name: Its own.
        deadline_s: Of a call: a hundred of the slow model's rows.
        in_flight: On each connection, to find its peak.
    """

    name: str
    deadline_s: float
    in_flight: int


SUBJECTS = (
    Subject(SLOW, 100 * overload_models.SLOW_ROW_S, 6),
    Subject(TINY, 0.1, 16),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, draw, write the page; return the exit status."""
    options = _options(arguments)
    if not cores.ARE_ENOUGH:
        _tell("overload: needs two cores, one for the gateway, one for the load")
        return 2
    with tempfile.TemporaryDirectory() as folder, Stage(Path(folder)) as stage:
        found = measure(
            stage,
            options.rounds,
            options.seconds,
            _tell,
            models=[options.only] if options.only else list(SHARES),
            shares=options.shares,
            streams=options.streams,
        )
    if options.json:
        print(json.dumps(as_json(found)))
    is_whole = not (options.only or options.shares or options.streams)
    if options.page or (is_whole and not options.no_page):
        path = RESULTS / f"{datetime.now(UTC):%Y-%m-%d}-overload.md"
        draw(found, path.with_suffix(".png"), _tell)
        path.write_text(page(found, circumstances(_command(options))))
        _tell(f"written: {path.relative_to(ROOT)}")
    say(found, _tell)
    return found.status


def measure(
    stage: Stage,
    rounds: int,
    seconds: float,
    tell: Tell,
    *,
    models: Sequence[str] = tuple(SHARES),
    shares: Sequence[float] = (),
    streams: int | None = None,
) -> Overload:
    """
    Ask models for more than they can answer, each in a gateway of its own, one after the other.

    Args:
        stage: Has the monitor and the collector, and a folder for the models.
        rounds: Of each model.
        seconds: Of each load.
        tell: Takes a line of progress.
        models: Names.
        shares: Of the peak, instead of all.
        streams: Calls that a connection may have under way, instead of the default.
    """
    arguments = () if streams is None else ("--max-concurrent-streams", str(streams))
    found = Overload(rounds, seconds)
    for subject in (one for one in SUBJECTS if one.name in models):
        sweep = Sweep(subject.name, subject.deadline_s, [], {})
        found.sweeps.append(sweep)
        try:
            repository = stage.work / "overload" / subject.name
            if subject.name == SLOW:
                found.row_ms = 1e3 * overload_models.write_slow(repository)
            else:
                overload_models.write_tiny(repository)
            questions = flood.write_questions(stage.work, repository, subject.name)
            with flood.gateway(
                repository,
                SERVER_CORE,
                monitor_port=stage.monitor_port,
                collector_port=stage.collector_port,
                arguments=arguments,
            ) as server:
                for number in range(rounds):
                    tell(f"overload       round {number + 1}/{rounds}  {subject.name}")
                    chosen = shares or SHARES[subject.name]
                    # Upwards, then downwards: nobody always meets what another left behind.
                    ordered = chosen if number % 2 == 0 else chosen[::-1]
                    _round(sweep, subject, server, questions, ordered, seconds, number, tell)
        except FAILURES as error:
            found.failures.append(f"{subject.name} model: {type(error).__name__}: {error}")
            tell(f"overload: failed: {found.failures[-1]}")
    return found


def _round(
    sweep: Sweep,
    subject: Subject,
    server: Gateway,
    questions: Questions,
    shares: Sequence[float],
    seconds: float,
    number: int,
    tell: Tell,
) -> None:
    peak = find_peak(subject, server, questions, seconds, GENERATOR_CORE)
    sweep.peaks.append(peak)
    tell(f"  peak {peak.per_s:>9,.1f}/s, {peak.per_cpu_s:,.1f} a processor second")
    for share in shares:
        asked = flood_at(
            *(share, subject, peak, server, questions, seconds, GENERATOR_CORE),
            seed=seed(number, share),
        )
        point = goodput.point(share, peak, asked)
        sweep.points.setdefault(share, []).append(point)
        tell(
            f"  {share:>4g} times it: goodput {point.goodput_share:.3f} "
            f"({point.cpu_goodput_share:.3f} by processor)  refused {point.refused_share:.0%} "
            f"p99 {point.refused_p99_ms:.1f} ms  recovered {point.recovered_s:.1f} s  "
            f"{point.growth_mib:+.1f} MiB{'  generator late' * point.is_generator_bottleneck}"
        )


def seed(number: int, share: float) -> int:
    """Return the seed of a load's times: another for each round and share."""
    return 1_000_000 * (number + 1) + round(1000 * share)


def find_peak(
    subject: Subject,
    server: Gateway,
    questions: Questions,
    seconds: float,
    core: int | None = None,
) -> Peak:
    """
    Measure a model in a closed loop.

    Raises:
        RuntimeError: an answer was wrong, or none.
    """
    asked = flood.ask(
        *(server, questions, core),
        connections=CONNECTIONS,
        in_flight=subject.in_flight,
        seconds=seconds,
    )
    if asked.figures["errors"] or asked.figures["wrong"]:
        raise RuntimeError(f"{subject.name}: errors below its peak: {asked.figures['statuses']}")
    return goodput.peak(asked)


def flood_at(
    share: float,
    subject: Subject,
    peak: Peak,
    server: Gateway,
    questions: Questions,
    seconds: float,
    core: int | None = None,
    *,
    seed: int,
) -> Flood:
    """Ask for so much of the peak, then for half of it."""
    return flood.ask(
        *(server, questions, core),
        connections=CONNECTIONS,
        rate=share * peak.per_s,
        seconds=seconds,
        warm_up=warm_up_s(share, subject.deadline_s),
        seed=seed,
        timeout=subject.deadline_s,
        then=f"{CALM_SHARE * peak.per_s}:{min(CALM_S, max(CALM_S_MIN, seconds))}",
    )


def warm_up_s(share: float, deadline_s: float) -> float:
    """
    Return how long a load goes on before it counts.

    Until what waits is as much as the deadline lets wait: what a flood puts there is answered, too,
    and would be counted as served on top of what can be.
    """
    if share <= 1:
        return WARM_UP_S
    return min(WARM_UP_S_MAX, max(WARM_UP_S, deadline_s / (share - 1)))


def draw(found: Overload, path: Path, tell: Tell) -> None:
    """Draw the curve, if it can be drawn, and note where it is."""
    sweeps = [sweep for sweep in found.sweeps if sweep.points]
    if not sweeps:
        return
    if not goodput_curve.is_drawable():
        tell("no curve: matplotlib is not installed (dependency group `bench`)")
        return
    goodput_curve.draw(sweeps, path)
    found.curve = path.name


def say(found: Overload, tell: Tell) -> None:
    """Tell what was missed, and what not measured."""
    for text in found.unmeasured:
        tell(f"failed: overload: {text}")
    for text in found.missed:
        tell(f"missed: overload: {text}")


def as_json(found: Overload) -> dict[str, object]:
    """Return all that is known of it."""
    models: dict[str, object] = {
        sweep.model: {
            "peaks": [peak._asdict() for peak in sweep.peaks],
            "points": [one._asdict() for points in sweep.points.values() for one in points],
            "verdicts": [
                [one.what, one.figure, one.value, str(one.target), one.verdict]
                for of, one in found.judgements
                if of is sweep
            ],
        }
        for sweep in found.sweeps
    }
    return {**models, "failures": found.failures}


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--seconds", type=float, default=SECONDS)
    parser.add_argument("--only", choices=list(SHARES))
    parser.add_argument("--shares", type=_shares, default=[], help="of the peak, by commas")
    parser.add_argument("--streams", type=int, help="--max-concurrent-streams of the gateway")
    parser.add_argument("--json", action="store_true", help="print every figure as JSON")
    parser.add_argument("--page", action="store_true", help="write a page of a part, too")
    parser.add_argument("--no-page", action="store_true", help="write no results page")
    return parser.parse_args(arguments)


def _shares(text: str) -> list[float]:
    return [float(one) for one in text.split(",") if one]


def _command(options: argparse.Namespace) -> str:
    command = f"python loadtest/bench/overload.py --rounds {options.rounds}"
    command += f" --seconds {options.seconds:g}"
    command += f" --only {options.only}" if options.only else ""
    command += f" --streams {options.streams}" if options.streams else ""
    shares = ",".join(f"{share:g}" for share in options.shares)
    return command + (f" --shares {shares}" if shares else "")


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
