"""A gateway in a process of its own, a load upon it, and what both used of the machine."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import http2
import numpy as np
import overload_models
from cores import on
from samples import Figures

PATH = "/inference.GRPCInferenceService/ModelInfer"
TOLERANCE = 1e-4
"""A batch may add up in another order than a row alone, no more than that."""

LOOK_S = 0.1
_ENDS_WITHIN_S = 60.0


class Look(NamedTuple):
    """What the gateway used, and held, at a moment of `time.perf_counter`."""

    at_s: float
    cpu_s: float
    memory_mib: float


class Gateway(NamedTuple):
    """A serving process, and its ports for gRPC and for HTTP."""

    pid: int
    port: int
    http_port: int

    def look(self) -> Look:
        """Say what it holds now, and what all its threads have used. Source: proc(5)."""
        pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return Look(
            time.perf_counter(),
            (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK"),
            pages * os.sysconf("SC_PAGE_SIZE") / 2**20,
        )


class Questions(NamedTuple):
    """Files of what is asked, and of what must be answered."""

    bodies: Path
    answers: Path


class Flood(NamedTuple):
    """
    What the generator saw, and what the gateway used from before it began until it had ended.

    Args:
        figures: The generator's.
        looks: At the gateway, ten times a second.
    """

    figures: Figures
    looks: list[Look]

    @property
    def cpu_s(self) -> float:
        """Processor time of the gateway within the generator's window."""
        at_s, cpu_s, _ = zip(*self.looks, strict=True)
        window_s = (self.figures["window_start_s"], self.figures["window_end_s"])
        start_s, end_s = np.interp(window_s, at_s, cpu_s)
        return float(end_s - start_s)

    @property
    def growth_mib(self) -> float:
        """
        Most memory in the window's second half less most in its first: what has not come to rest.

        A window without two looks in it is one between the looks around it.
        """
        start_s, end_s = self.figures["window_start_s"], self.figures["window_end_s"]
        middle_s = (start_s + end_s) / 2
        earlier = [look.memory_mib for look in self.looks if start_s <= look.at_s < middle_s]
        later = [look.memory_mib for look in self.looks if middle_s <= look.at_s <= end_s]
        if not earlier:
            earlier = [look.memory_mib for look in self.looks if look.at_s < start_s][-1:]
        if not later:
            later = [look.memory_mib for look in self.looks if look.at_s > end_s][:1]
        return max(later) - max(earlier)


@contextmanager
def gateway(
    repository: Path,
    core: int | None = None,
    *,
    monitor_port: int | None = None,
    collector_port: int | None = None,
    arguments: Sequence[str] = (),
) -> Iterator[Gateway]:
    """
    Run a gateway until the block ends; it serves when it begins.

    Args:
        repository: Of models.
        core: That it is kept on.
        monitor_port: Of a monitor that all predictions are streamed to.
        collector_port: Of a collector that one call in a hundred is told to.
        arguments: More of them, of `headrace serve`.
    """
    command = [sys.executable, "-m", "headrace", "serve", "--model-repository", str(repository)]
    command += ["--grpc-address", "127.0.0.1:0", "--http-address", "127.0.0.1:0"]
    command += ["--workers", "1", "--drain-delay-s", "0", "--log-level", "error", *arguments]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("OTEL_")}
    if monitor_port is not None:
        command += ["--monitor-address", f"127.0.0.1:{monitor_port}"]
    if collector_port is not None:
        environment["OTEL_EXPORTER_OTLP_ENDPOINT"] = f"http://127.0.0.1:{collector_port}"
        environment["OTEL_TRACES_SAMPLER_ARG"] = "0.01"
    process = subprocess.Popen(
        [*on(core), *command], env=environment, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    with process.stdout as output:
        try:
            line = output.readline()
            if "serving" not in line:
                raise RuntimeError("the gateway did not start")
            said = json.loads(line)
            ports = (int(said[f"{kind}_address"].rpartition(":")[2]) for kind in ("grpc", "http"))
            yield Gateway(process.pid, *ports)
        finally:
            process.terminate()
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def write_questions(folder: Path, repository: Path, model: str) -> Questions:
    """Write what one of `overload_models` is asked, and what it must answer."""
    questions = Questions(folder / f"{model}.bodies", folder / f"{model}.answers")
    http2.write_bodies(questions.bodies, overload_models.requests(model))
    http2.write_answers(questions.answers, overload_models.answers(repository, model))
    return questions


def ask(server: Gateway, questions: Questions, core: int | None = None, **options: Any) -> Flood:
    """
    Run the generator, on one core if it is given.

    Args:
        server: Is asked.
        questions: What it is asked.
        core: Of the generator.
        options: Of `http2.py`, `_` for `-`; those that are None are left out.

    Raises:
        RuntimeError: the generator failed, or took far longer than it was told to; what it says.
    """
    command = [sys.executable, str(Path(http2.__file__)), "--port", str(server.port)]
    command += ["--path", PATH, "--bodies", str(questions.bodies)]
    command += ["--answers", str(questions.answers), "--tolerance", str(TOLERANCE)]
    for name, value in options.items():
        if value is not None:
            command += [f"--{name.replace('_', '-')}", str(value)]
    looks = [server.look()]
    process = subprocess.Popen(
        [*on(core), *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    with process:
        ends_s = time.monotonic() + _ENDS_WITHIN_S + 3 * _seconds(options)
        while process.poll() is None:
            looks.append(server.look())
            if time.monotonic() > ends_s:
                process.kill()
                raise RuntimeError("the generator does not end")
            time.sleep(LOOK_S)
        output, problem = process.communicate()
    if process.returncode:
        raise RuntimeError(f"the generator failed: {problem.strip().splitlines()[-1:]}")
    looks.append(server.look())
    return Flood(json.loads(output), looks)


def _seconds(options: dict[str, Any]) -> float:
    """How long the generator was told to go on, about."""
    _, _, then = str(options.get("then") or "").partition(":")
    return float(options.get("seconds") or 3) + float(then or 0)
