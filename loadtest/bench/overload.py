"""Ask a gateway for more than it can answer, and see how much it still does.

    python loadtest/bench/overload.py [--rounds 3] [--seconds 5] [--only slow|tiny] [--shares 2,5]

Two models: one whose row costs 8 ms, far more than a refusal, and a tiny MLP. Each round finds the
peak of each in a closed loop, then offers 0.1 to 5 times that at random times; after each flood
half the peak is asked, to see how soon all is well. Writes a page and a curve under
loadtest/results/ and exits with 1 when a target is missed. Needs two cores: the gateway has the
first one for itself, the generator the second.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import flood
import goodput
import goodput_curve
import overload_models
from flood import Flood, Gateway, Questions
from goodput import Peak, Sweep
from overload_models import SLOW, TINY
from overload_page import Circumstances, page
from page import commit, machine
from rich.console import Console

RESULTS = Path(__file__).parents[1] / "results"
SERVER_CORE, GENERATOR_CORE = 0, 1
SHARES = {
    SLOW: (0.1, 0.25, 0.5, 0.75, 0.9, 1.0, 1.25, 1.5, 2.0, 3.0, 5.0),
    TINY: (0.1, 0.5, 0.9, 1.5, 2.0),
}
CALM_SHARE, CALM_S = 0.5, 5.0
CONNECTIONS = 4


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
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--only", choices=[SLOW, TINY])
    parser.add_argument("--shares", help="of the peak, by commas, instead of all")
    parser.add_argument("--json", action="store_true", help="print every figure as JSON")
    parser.add_argument("--no-page", action="store_true", help="write no results page")
    options = parser.parse_args(arguments)
    if len(os.sched_getaffinity(0)) < 2:
        print("overload: needs two cores, one for the gateway, one for the load", file=sys.stderr)
        return 2
    console = Console(stderr=True)
    subjects = [one for one in SUBJECTS if options.only in (None, one.name)]
    chosen = [float(text) for text in (options.shares or "").split(",") if text]
    sweeps = {one.name: Sweep(one.name, one.deadline_s, [], {}) for one in subjects}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        row_s = overload_models.write_slow(work / "models")
        overload_models.write_tiny(work / "models")
        questions = {
            one.name: flood.write_questions(work, work / "models", one.name) for one in subjects
        }
        with flood.gateway(work / "models", SERVER_CORE) as server:
            for number in range(options.rounds):
                for subject in subjects:
                    shares = chosen or SHARES[subject.name]
                    console.print(f"round {number + 1}/{options.rounds}  {subject.name}")
                    _measure(
                        sweeps[subject.name],
                        subject,
                        server,
                        questions[subject.name],
                        # Upwards, then downwards: nobody always meets what another left behind.
                        shares if number % 2 == 0 else shares[::-1],
                        options.seconds,
                        console,
                    )
    found = [text for sweep in sweeps.values() for text in goodput.faults(sweep)]
    if SLOW in sweeps:
        found += goodput.missed(sweeps[SLOW])
    if options.json:
        print(json.dumps({name: _as_json(sweep) for name, sweep in sweeps.items()}))
    if not options.no_page:
        _write(list(sweeps.values()), found, options, row_s, console)
    for text in found:
        print(f"missed: {text}", file=sys.stderr)
    return 1 if found else 0


def _measure(
    sweep: Sweep,
    subject: Subject,
    server: Gateway,
    questions: Questions,
    shares: Sequence[float],
    seconds: float,
    console: Console,
) -> None:
    peak = find_peak(subject, server, questions, seconds, GENERATOR_CORE)
    sweep.peaks.append(peak)
    console.print(f"  peak {peak.per_s:>9,.1f}/s, {peak.per_cpu_s:,.1f} a processor second")
    for share in shares:
        asked = flood_at(share, subject, peak, server, questions, seconds, GENERATOR_CORE)
        point = goodput.point(share, peak, asked)
        sweep.points.setdefault(share, []).append(point)
        console.print(
            f"  {share:>4g} times it: goodput {point.goodput_share:.3f} "
            f"({point.cpu_goodput_share:.3f} by processor)  refused {point.refused_share:.0%} "
            f"p99 {point.refused_p99_ms:.1f} ms  recovered {point.recovered_s:.1f} s  "
            f"{point.growth_mib:+.1f} MiB{'  generator late' * point.is_generator_bottleneck}"
        )


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
) -> Flood:
    """Ask for so much of the peak, then for half of it."""
    return flood.ask(
        *(server, questions, core),
        connections=CONNECTIONS,
        rate=share * peak.per_s,
        seconds=seconds,
        timeout=subject.deadline_s,
        then=f"{CALM_SHARE * peak.per_s}:{CALM_S}",
    )


def _write(
    sweeps: Sequence[Sweep],
    found: Sequence[str],
    options: argparse.Namespace,
    row_s: float,
    console: Console,
) -> None:
    now = datetime.now(UTC)
    path, curve = RESULTS / f"{now:%Y-%m-%d}-overload.md", None
    if goodput_curve.is_drawable():
        goodput_curve.draw(sweeps, path.with_suffix(".png"))
        curve = path.with_suffix(".png").name
    else:
        console.print("no curve: matplotlib is not installed (dependency group `bench`)")
    packages = ("grpcio", "protobuf", "onnxruntime", "numpy")
    command = f"overload.py --rounds {options.rounds} --seconds {options.seconds:g}"
    command += f" --only {options.only}" if options.only else ""
    command += f" --shares {options.shares}" if options.shares else ""
    about = Circumstances(
        when=f"{now:%Y-%m-%d %H:%M} UTC",
        commit=commit(),
        command=f"python loadtest/bench/{command}",
        machine=f"{machine()}, Python {platform.python_version()}",
        packages=", ".join(f"{name} {version(name)}" for name in packages),
        rounds=options.rounds,
        seconds=options.seconds,
        row_ms=1e3 * row_s,
        curve=curve,
    )
    path.write_text(page(sweeps, found, about))
    console.print(f"written: {path.relative_to(RESULTS.parents[1])}")


def _as_json(sweep: Sweep) -> dict[str, object]:
    return {
        "peaks": [peak._asdict() for peak in sweep.peaks],
        "points": [one._asdict() for points in sweep.points.values() for one in points],
    }


if __name__ == "__main__":
    sys.exit(main())
