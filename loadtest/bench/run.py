"""Measure the gateway against its ceiling and against glue code, in interleaved rounds.

    python loadtest/bench/run.py [--rounds 11] [--seconds 1.5] [--only tensor|features|costs]

Writes a page under loadtest/results/ and exits with 1 when a target is missed. Needs two cores:
the server has the first one for itself; the generator, the feature store, a monitor and a collector
share the second. The gateway runs with all that watches it: metrics, one call in a hundred traced,
and every prediction streamed to the monitor.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import TypeAlias

import grpc
import http2
import numpy as np
import subjects
from rich.console import Console
from rich.table import Table
from tritonclient.grpc import service_pb2, service_pb2_grpc

ROOT = Path(__file__).parents[2]
PATH = "/inference.GRPCInferenceService/ModelInfer"
CONNECTIONS, IN_FLIGHT = 4, 16
GENERATOR_CORE = subjects.GENERATOR_CORE

Command: TypeAlias = Callable[..., list[str]]


@dataclass(slots=True)
class Contest:
    """
    Two servers measured in turn on one question.

    Args:
        title: The question.
        names: Who is measured; the gateway first.
        figure: Which of the generator's figures counts.
        target: The gateway's figure over the other's must reach it; None is only reported.
        rounds: Each server's figure, round for round.
    """

    title: str
    names: tuple[str, str]
    figure: str
    target: float | None
    rounds: dict[str, list[float]] = field(default_factory=dict)

    @property
    def ratio(self) -> float:
        """The gateway's median over the other's."""
        gateway, other = (median(self.rounds[name]) for name in self.names)
        return gateway / other

    @property
    def ratios(self) -> list[float]:
        """The gateway over the other, round by round."""
        gateway, other = (self.rounds[name] for name in self.names)
        return [one / two for one, two in zip(gateway, other, strict=True)]

    @property
    def is_missed(self) -> bool:
        """Whether there is a target and the ratio is below it."""
        return self.target is not None and self.ratio < self.target


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write the page, print the table; return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--seconds", type=float, default=1.5)
    parser.add_argument("--only", choices=["tensor", "features", "costs"])
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.add_argument("--no-page", action="store_true", help="write no results page")
    options = parser.parse_args(arguments)
    if (os.cpu_count() or 1) < 2:
        print("bench: needs two cores, one for the server and one for the load", file=sys.stderr)
        return 2
    os.sched_setaffinity(0, {subjects.GENERATOR_CORE})
    console = Console(stderr=True)
    contests = []
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        model = subjects.write_models(work / "models")
        watchers = {"monitor_port": subjects.free_port(), "collector_port": subjects.free_port()}
        with (
            subjects.running(subjects.monitor(watchers["monitor_port"]), GENERATOR_CORE),
            subjects.running(subjects.collector(watchers["collector_port"]), GENERATOR_CORE),
        ):
            gateway = partial(subjects.gateway, **watchers)
            if options.only in (None, "tensor"):
                contests += _tensor_contests(work, model, gateway, options, console)
            if options.only in (None, "features"):
                contests += _feature_contests(work, model, gateway, options, console)
            if options.only in (None, "costs"):
                contests += _cost_contests(work, gateway, options, console)
    if options.json:
        print(json.dumps([_as_json(contest) for contest in contests]))
    else:
        Console().print(_table(contests))
    if not options.no_page:
        page = ROOT / "loadtest" / "results" / f"{datetime.now(UTC):%Y-%m-%d}-gateway.md"
        page.write_text(_page(contests, options))
        console.print(f"written: {page.relative_to(ROOT)}")
    missed = [contest for contest in contests if contest.is_missed]
    for contest in missed:
        print(f"missed: {contest.title}: {contest.ratio:.2f} < {contest.target}", file=sys.stderr)
    return 1 if missed else 0


def _tensor_contests(
    work: Path, model: Path, gateway: Command, options: argparse.Namespace, console: Console
) -> list[Contest]:
    contests = [
        Contest(
            "one-row tensors, 64 in flight", ("gateway", "ceiling"), "requests_per_s", target=0.7
        ),
        Contest(
            "the same with a parameter, 64 in flight",
            ("gateway", "ceiling"),
            "requests_per_s",
            target=None,
        ),
        Contest("one-row tensors, 1 in flight", ("gateway", "ceiling"), "mean_ms", target=None),
    ]
    bodies = work / "tensor.bodies"
    http2.write_bodies(bodies, subjects.tensor_requests())
    with_parameter = work / "parameter.bodies"
    http2.write_bodies(with_parameter, subjects.tensor_requests(with_parameter=True))
    tensors_only = work / "tensors_only"
    tensors_only.mkdir()
    (work / "models" / "tensor").rename(tensors_only / "tensor")
    model = tensors_only / "tensor" / "1" / "model.onnx"
    commands = {
        "gateway": partial(gateway, tensors_only, None),
        "ceiling": lambda port: subjects.ceiling(model, port),
    }
    loads = {
        contests[0].title: (bodies, CONNECTIONS, IN_FLIGHT),
        contests[1].title: (with_parameter, CONNECTIONS, IN_FLIGHT),
        contests[2].title: (bodies, 1, 1),
    }
    _contend(contests, commands, subjects.tensor_requests(), loads, options, console)
    (tensors_only / "tensor").rename(work / "models" / "tensor")
    return contests


def _feature_contests(
    work: Path, model: Path, gateway: Command, options: argparse.Namespace, console: Console
) -> list[Contest]:
    contest = Contest(
        "entity, 16 Redis features, 64 in flight", ("gateway", "glue"), "requests_per_s", target=8
    )
    bodies = work / "entity.bodies"
    http2.write_bodies(bodies, subjects.entity_requests())
    with subjects.valkey() as valkey:
        feature_repo = work / "feature_repo"
        subjects.write_feature_repo(feature_repo, valkey.port)
        commands = {
            "gateway": partial(gateway, work / "models", feature_repo),
            "glue": lambda port: subjects.glue(model, feature_repo, port),
        }
        loads = {contest.title: (bodies, CONNECTIONS, IN_FLIGHT)}
        _contend([contest], commands, subjects.entity_requests(), loads, options, console)
    return [contest]


def _cost_contests(
    work: Path, gateway: Command, options: argparse.Namespace, console: Console
) -> list[Contest]:
    """What each part that watches costs: the whole gateway against one without that part."""
    parts = ("the metrics", "the stream", "the traces")
    contests = [
        Contest(f"what {part} cost", ("gateway", f"without {part}"), "requests_per_s", None)
        for part in parts
    ]
    everything = "what tracing every call costs"
    contests.append(
        Contest(everything, ("every call traced", "without the traces"), "requests_per_s", None)
    )
    bodies = work / "costs.bodies"
    http2.write_bodies(bodies, subjects.tensor_requests())
    whole = partial(gateway, work / "models", None)
    commands = {
        "gateway": whole,
        "without the metrics": partial(whole, with_metrics=False),
        "without the stream": partial(whole, monitor_port=None),
        "without the traces": partial(whole, collector_port=None),
        "every call traced": partial(whole, traced_share=1.0),
    }
    loads = {contest.title: (bodies, CONNECTIONS, IN_FLIGHT) for contest in contests}
    _contend(contests, commands, subjects.tensor_requests(), loads, options, console)
    return contests


def _contend(
    contests: Sequence[Contest],
    commands: dict[str, Callable[[int], list[str]]],
    requests: Sequence[bytes],
    loads: dict[str, tuple[Path, int, int]],
    options: argparse.Namespace,
    console: Console,
) -> None:
    """Start every server, check that they agree, and measure them in turn."""
    ports = {name: subjects.free_port() for name in commands}
    with ExitStack() as stack:
        for name, command in commands.items():
            stack.enter_context(subjects.running(command(ports[name])))
        _refuse_disagreement(ports, requests)
        for number in range(options.rounds):
            for contest in contests:
                # Who goes first changes, so that neither always meets what the other left behind.
                for name in contest.names if number % 2 else reversed(contest.names):
                    figures = _measure(ports[name], loads[contest.title], options.seconds)
                    if figures["errors"]:
                        raise RuntimeError(f"{name} answered {figures['errors']} errors")
                    value = figures[contest.figure]
                    contest.rounds.setdefault(name, []).append(value)
                    console.print(
                        f"round {number + 1}/{options.rounds}  {contest.title:<40} {name:<8} "
                        f"{value:>10,.3f} {contest.figure}"
                    )


def _measure(port: int, load: tuple[Path, int, int], seconds: float) -> dict[str, float]:
    bodies, connections, in_flight = load
    command = [sys.executable, str(Path(http2.__file__)), "--port", str(port), "--path", PATH]
    command += ["--bodies", str(bodies), "--seconds", str(seconds)]
    command += ["--connections", str(connections), "--in-flight", str(in_flight)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=60 + 2 * seconds, check=True
    )
    figures: dict[str, float] = json.loads(done.stdout)
    return figures


def _refuse_disagreement(ports: dict[str, int], requests: Sequence[bytes]) -> None:
    """Ask every server the same at once, so that batches form; wrong answers are no speed."""
    answers = {}
    for name, port in ports.items():
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            messages = [service_pb2.ModelInferRequest.FromString(raw) for raw in requests[:64]]
            calls = [stub.ModelInfer.future(message, timeout=20) for message in messages]
            raw = [call.result().raw_output_contents[0] for call in calls]
            answers[name] = np.frombuffer(b"".join(raw), np.float32)
    first, *others = answers.values()
    # A batch may add up in another order than a row alone, no more than that.
    if not all(np.allclose(first, other, rtol=1e-4, atol=1e-5) for other in others):
        raise RuntimeError("the servers disagree")


def _as_json(contest: Contest) -> dict[str, object]:
    return {
        "title": contest.title,
        "figure": contest.figure,
        "rounds": contest.rounds,
        "ratio": contest.ratio,
        "target": contest.target,
    }


def _table(contests: Sequence[Contest]) -> Table:
    table = Table()
    for heading in ("what", "gateway", "compared with", "ratio", "target"):
        table.add_column(heading)
    for contest in contests:
        gateway, other = contest.names
        table.add_row(
            contest.title,
            f"{median(contest.rounds[gateway]):,.2f} {contest.figure}",
            f"{other}: {median(contest.rounds[other]):,.2f}",
            f"{contest.ratio:.2f}",
            "-" if contest.target is None else f">= {contest.target}",
        )
    return table


def _page(contests: Sequence[Contest], options: argparse.Namespace) -> str:
    lines = [
        "| what | figure | gateway | compared with | ratio | target |",
        "|---|---|---|---|---|---|",
    ]
    for contest in contests:
        gateway, other = contest.names
        target = "-" if contest.target is None else f"≥ {contest.target}"
        lines.append(
            f"| {contest.title} | {contest.figure} | {median(contest.rounds[gateway]):,.2f} "
            f"| {other}: {median(contest.rounds[other]):,.2f} | {contest.ratio:.2f} | {target} |"
        )
    rounds = [
        f"| {contest.title} | {name} | {', '.join(f'{value:,.2f}' for value in values)} |"
        for contest in contests
        for name, values in (
            *contest.rounds.items(),
            ("ratio, round by round", contest.ratios),
        )
    ]
    packages = ("grpcio", "protobuf", "onnxruntime", "feast", "redis", "hiredis", "numpy")
    only = f" --only {options.only}" if options.only else ""
    command = f"run.py --rounds {options.rounds} --seconds {options.seconds:g}{only}"
    return f"""# The gateway, its ceiling and the glue

{chr(10).join(lines)}

Medians of {options.rounds} interleaved rounds of {options.seconds:g} s after 1 s of warm-up.

| | |
|---|---|
| when | {datetime.now(UTC):%Y-%m-%d %H:%M} UTC |
| commit | {commit()} |
| command | `python loadtest/bench/{command}` |
| machine | {machine()} |
| Python | {platform.python_version()} |
| packages | {", ".join(f"{name} {version(name)}" for name in packages)} |

## Every round

| what | server | rounds |
|---|---|---|
{chr(10).join(rounds)}

## Why to doubt it

- One machine with two cores: the server has one for itself, the generator the other. The monitor,
  the collector and, in the feature contest, the embedded Valkey share the generator's core, for all
  servers alike; the monitor keeps one prediction in a hundred.
- In the contests about costs five servers share the core; four wait while one is measured.
- Loopback: no network, no TLS. Closed loop: a slow server is asked less often, so no tail is
  shown.
- The model is tiny on purpose. With a model of a millisecond all three would be equal.
- The ceiling checks nothing and is no server that anybody should run.
- The glue runs one row per request, as such programs do; one that batches would be faster.
- On a shared machine single rounds differ by a third and more, as the rounds above show: the
  medians are good to some 10 %. Compare within one run only.
- The requests of the first two contests look alike but for their numbers, as those of one client
  do: the gateway recognises them without a parser, the ceiling parses each. Those with a parameter
  are parsed by both.
"""


def commit() -> str:
    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
        )
        return done.stdout.strip()

    dirty = " with uncommitted changes" if git("status", "--porcelain", "server") else ""
    return f"`{git('rev-parse', '--short', 'HEAD')}`{dirty}"


def machine() -> str:
    info = Path("/proc/cpuinfo").read_text()
    names = [line.partition(":")[2].strip() for line in info.splitlines() if "model name" in line]
    return (
        f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores, {platform.system()}"
    )


if __name__ == "__main__":
    sys.exit(main())
