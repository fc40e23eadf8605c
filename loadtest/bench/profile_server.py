"""Where a request's CPU time goes: microseconds per request, by stage of the gateway.

    python loadtest/bench/profile_server.py [--only tensor|entity|refusal|ranking] [--rounds 5]
        [--seconds 2] [--json] [--libraries]

CPU time, not time on the clock: others on the same machine make a server slower, and a profile by a
few percent worse, since they share caches. Each subject is measured twice, with stopwatches around
the stages and without any; the difference says what to believe of the stages. `--libraries` adds
what `perf` says of the shares of the kernel, gRPC, Python and the rest. `docs/performance.md` says
how to read it.
"""

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import http2
import numpy as np
import subjects
from cores import ARE_ENOUGH, GENERATOR_CORE
from stopwatches import STAGES, table, used
from tritonclient.grpc import service_pb2

PATH = "/inference.GRPCInferenceService/ModelInfer"
RANKED = 200
FEATURE_REPO = "feature_repo"
BARE, WATCHED = "all", "all, and the stopwatches"


@dataclass(slots=True)
class Subject:
    """
    What is asked of a gateway.

    Args:
        name: Of the option `--only`.
        title: Of its column.
        bodies: Requests, serialized.
        load: Connections, and requests in flight on each.
        models: The model repository.
        feature_repo: Whether the model needs it.
        flags: Of the gateway, besides the usual ones.
        is_refused: Whether an answer would be a mistake.
        rounds: Figures of each round, by stage.
    """

    name: str
    title: str
    bodies: Sequence[bytes]
    load: tuple[int, int]
    models: Path
    feature_repo: Path | None = None
    flags: tuple[str, ...] = ()
    is_refused: bool = False
    rounds: dict[str, list[float]] = field(default_factory=dict)
    libraries: dict[str, float] = field(default_factory=dict)

    @property
    def figures(self) -> dict[str, float]:
        """Medians over the rounds, by stage."""
        return {stage: median(values) for stage, values in self.rounds.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", choices=["tensor", "entity", "refusal", "ranking"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.add_argument("--libraries", action="store_true", help="ask perf for the libraries, too")
    options = parser.parse_args(arguments)
    if not ARE_ENOUGH:
        print("profile: needs two cores, one for the server and one for the load", file=sys.stderr)
        return 2
    if options.libraries and shutil.which("perf") is None:
        print("profile: --libraries needs Linux's perf", file=sys.stderr)
        return 2
    os.sched_setaffinity(0, {GENERATOR_CORE})
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        work = Path(folder)
        measured = [s for s in _subjects(work) if options.only in (None, s.name)]
        if any(subject.feature_repo for subject in measured):
            valkey = stack.enter_context(subjects.valkey())
            subjects.write_feature_repo(work / FEATURE_REPO, valkey.port)
        for subject in measured:
            _measure(subject, work, options)
    if options.json:
        print(json.dumps({s.name: s.figures | {"libraries": s.libraries} for s in measured}))
    else:
        _print(measured)
    return 0


def _subjects(work: Path) -> list[Subject]:
    subjects.write_models(work / "models")
    tensors_only = work / "tensors_only"
    shutil.copytree(work / "models" / "tensor", tensors_only / "tensor")
    # One request waits for company that never comes; the queue has no room for a second.
    full = work / "full"
    shutil.copytree(tensors_only, full)
    with (full / "tensor" / "config.pbtxt").open("a") as config:
        config.write(
            "dynamic_batching { preferred_batch_size: [ 256 ] "
            "max_queue_delay_microseconds: 60000000 }\n"
        )
    tensors, models, feature_repo = subjects.tensor_requests(), work / "models", work / FEATURE_REPO
    return [
        Subject("tensor", "one row, tensor", tensors, (4, 16), tensors_only),
        Subject(
            "entity",
            "one entity, 16 features",
            subjects.entity_requests(),
            (4, 16),
            models,
            feature_repo,
        ),
        Subject(
            "refusal",
            "one row, read and refused",
            tensors,
            (4, 16),
            full,
            flags=("--max-queue-size", "1"),
            is_refused=True,
        ),
        Subject(
            "ranking",
            f"{RANKED} entities, 16 features each",
            _ranking_requests(),
            (1, 4),
            models,
            feature_repo,
        ),
    ]


def _ranking_requests() -> list[bytes]:
    rng = np.random.default_rng(20)
    requests = []
    for _ in range(256):
        message = service_pb2.ModelInferRequest(model_name="entity")
        message.inputs.add(name="item_id", datatype="INT64", shape=[RANKED, 1])
        ids = rng.permutation(subjects.ENTITIES)[:RANKED].astype(np.int64)
        message.raw_input_contents.append(ids.tobytes())
        requests.append(bytes(message.SerializeToString()))
    return requests


def _measure(subject: Subject, work: Path, options: argparse.Namespace) -> None:
    bodies = work / f"{subject.name}.bodies"
    http2.write_bodies(bodies, subject.bodies)
    with (
        _gateway(subject, work, "on") as (watched, watched_port),
        _gateway(subject, work, "off") as (bare, bare_port),
    ):
        _load(subject, bodies, watched_port, 1.0)
        _load(subject, bodies, bare_port, 1.0)
        for number in range(options.rounds):
            _progress(f"{subject.name}: round {number + 1}/{options.rounds}")
            before = _snapshot(bare)
            requests = _load(subject, bodies, bare_port, options.seconds)
            kinds = used(before, _snapshot(bare), requests)
            before = _snapshot(watched)
            requests = _load(subject, bodies, watched_port, options.seconds)
            after = _snapshot(watched)
            figures = table(before, after, requests, kinds)
            figures[BARE] = sum(kinds.values())
            figures[WATCHED] = sum(used(before, after, requests).values())
            for stage, value in figures.items():
                subject.rounds.setdefault(stage, []).append(value)
        if options.libraries:
            pid = _snapshot(bare)["pid"]
            with _perf(pid, work / "perf.data") as shares:
                _load(subject, bodies, bare_port, max(4.0, options.seconds))
            subject.libraries = shares


@contextmanager
def _gateway(subject: Subject, work: Path, stopwatches: str) -> Iterator[tuple[Path, int]]:
    """Run a gateway on the server's core; give the socket of its stopwatches, and its port."""
    port = subjects.free_port()
    path = work / f"{subject.name}-{stopwatches}"
    command = subjects.gateway(subject.models, subject.feature_repo, port)
    at = command.index("-m")
    script = [str(Path(__file__).with_name("stopwatches.py")), str(path), stopwatches]
    command[at : at + 2] = script
    with subjects.running([*command, *subject.flags]):
        yield path, port


def _snapshot(path: Path) -> Any:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(30)
        connection.connect(str(path))
        parts = []
        while part := connection.recv(1 << 16):
            parts.append(part)
    return json.loads(b"".join(parts))


def _load(subject: Subject, bodies: Path, port: int, seconds: float) -> int:
    """Ask for so long; return how many requests that were."""
    connections, in_flight = subject.load
    command = [sys.executable, str(Path(http2.__file__)), "--port", str(port), "--path", PATH]
    command += ["--bodies", str(bodies), "--seconds", str(seconds), "--warm-up", "0"]
    command += ["--connections", str(connections), "--in-flight", str(in_flight)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=60 + 2 * seconds, check=True
    )
    figures = json.loads(done.stdout)
    requests = int(figures["requests"])
    if figures["errors"] != (requests if subject.is_refused else 0):
        raise RuntimeError(f"{subject.name}: {figures['errors']} of {requests} were errors")
    return requests


@contextmanager
def _perf(pid: int, path: Path) -> Iterator[dict[str, float]]:
    """Sample a process until the block ends; then its CPU time's shares, by library, are there."""
    shares: dict[str, float] = {}
    record = ["perf", "record", "--quiet", "-e", "cpu-clock", "-F", "999", "-p", str(pid)]
    process = subprocess.Popen([*record, "-o", str(path)], stderr=subprocess.DEVNULL)
    try:
        yield shares
    finally:
        process.terminate()
        process.wait(30)
    report = ["perf", "report", "-i", str(path), "--sort", "dso", "--stdio", "--fields"]
    done = subprocess.run(
        [*report, "overhead,dso"], capture_output=True, text=True, timeout=120, check=True
    )
    for line in done.stdout.splitlines():
        if line.strip() and not line.startswith("#"):
            share, _, name = line.strip().partition("%")
            shares[name.strip()] = float(share) / 100


def _print(measured: Sequence[Subject]) -> None:
    """Print what `docs/performance.md` shows."""
    print("| µs of CPU per request | " + " | ".join(s.title for s in measured) + " |")
    print("|---|" + "---:|" * len(measured))
    for stage in (*STAGES, BARE, WATCHED):
        values = [subject.figures[stage] for subject in measured]
        cells = ["-" if value < 0.05 else f"{value:,.1f}" for value in values]
        print(f"| {stage} | " + " | ".join(cells) + " |")
    for subject in measured:
        if subject.libraries:
            top = sorted(subject.libraries.items(), key=lambda item: -item[1])[:8]
            print(f"\n{subject.title}: " + ", ".join(f"{name} {share:.0%}" for name, share in top))


def _progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
