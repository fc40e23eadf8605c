"""A server that is measured: started on its core, asked for figures and answers, and stopped."""

import json
import os
import select
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import grpc
import http2
import numpy as np
import subjects
from contest import Load
from cores import SERVER_CORE, on
from drops import Drop, drops
from numpy.typing import NDArray
from peers import Peer
from processor_time import used_s
from stage import REQUESTS, Stage
from tritonclient.grpc import service_pb2, service_pb2_grpc

PATH = "/inference.GRPCInferenceService/ModelInfer"
START_TIMEOUT_S, STOP_TIMEOUT_S, ANSWER_TIMEOUT_S = 120.0, 30.0, 20.0
WARM_UP_S = 1.0
SETTLE_S = 1.2
"""Spans, records and metrics are sent up to a second after the replies; they are whose they are."""

DEATHS_MAX, DYING_S = 10, 0.3
"""Of a server that is known to die: how often in a row, and how long it takes."""

TOLERANCE = 1e-4
"""Of an answer: a batch may add up in another order than a row alone, no more than that."""

COMPARED = {"tensor": 64, "parameter": 64, "numbered": 64, "entity": 64, "ranking": 4}
"""Requests whose answers are compared, sent at once so that batches form."""


class NotMeasuredError(Exception):
    """A server did not start, or died, or answered what it should not: its figures say nothing."""


class Server:
    """
    One process on the server's core, with its children; leaving the block ends them.

    Args:
        name: Its name, for messages.
        peer: How it is started.
        stage: On what.

    Attributes:
        deaths: How often a client that left has been its end; it is started anew then.
    """

    def __init__(self, name: str, peer: Peer, stage: Stage) -> None:
        self.name = name
        self.deaths = 0
        self._stage = stage
        self._port = subjects.free_port()
        self._launch = peer.launch(stage, self._port)
        self._counted_s = 0.0
        self._http_address: str | None = None
        self._process = self._start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        _end(self._process)

    def measure(self, load: Load, seconds: float) -> dict[str, float]:
        """
        Ask it for so long; every request counts, so let it be warm.

        Returns:
            The generator's figures: one of the `windows` of `contest.together`.

        Raises:
            NotMeasuredError: it died, or answered with errors or wrongly.
        """
        figures: dict[str, float]
        if self._launch.is_program:
            figures = self._ask_line(f"{seconds} {load.connections * load.in_flight}", seconds)
            self._counted_s += figures["cpu_s"]
        elif self._launch.is_fragile:
            figures = self._generate_again(load, seconds)
        else:
            figures = self._generate(load, seconds)
        for what in ("wrong", "errors"):
            if figures.get(what):
                raise NotMeasuredError(f"{self.name}: {figures[what]:g} answers are {what}")
        return figures

    def used_s(self) -> float:
        """
        Return the processor time that its measured windows and what was between them took.

        Raises:
            NotMeasuredError: it has ended.
        """
        if self._launch.is_program:  # it tells what its windows took
            return self._counted_s
        if self._process.poll() is not None:
            raise NotMeasuredError(f"{self.name} died: {self._last_words()}")
        return self._counted_s + used_s(self._process.pid)

    def drops(self) -> list[Drop]:
        """Return what it has not told of, if it is a gateway; see `drops.drops`."""
        if self._http_address is None:
            return []
        url = f"http://{self._http_address}/metrics"
        with urllib.request.urlopen(url, timeout=ANSWER_TIMEOUT_S) as reply:
            return drops(reply.read().decode())

    def answers(self, load: Load) -> NDArray[np.float32]:
        """Return its predictions for the first few requests."""
        count = COMPARED[load.requests]
        if self._launch.is_program:
            return np.array(self._ask_line(f"answers {count}", 0), np.float32).ravel()
        requests = REQUESTS[load.requests]()[:count]
        with grpc.insecure_channel(f"127.0.0.1:{self._port}") as channel:
            stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            messages = [service_pb2.ModelInferRequest.FromString(raw) for raw in requests]
            calls = [stub.ModelInfer.future(one, timeout=ANSWER_TIMEOUT_S) for one in messages]
            try:
                raw = [call.result().raw_output_contents[0] for call in calls]
            except grpc.RpcError as error:
                raise NotMeasuredError(f"{self.name}: {error.code()}: {error.details()}") from None
        return np.frombuffer(b"".join(raw), np.float32)

    def _generate_again(self, load: Load, seconds: float) -> dict[str, float]:
        """Run the generator until the server outlives it: what a dying one did is no figure."""
        counted_s, is_anew = self.used_s(), False
        for _ in range(DEATHS_MAX):
            with suppress(NotMeasuredError, ProcessLookupError):
                if is_anew:
                    self._survive(load, WARM_UP_S)
                    time.sleep(SETTLE_S)
                    # Neither its start nor its warm-up is a cost of what is measured.
                    self._counted_s = counted_s - used_s(self._process.pid)
                return self._survive(load, seconds)
            _end(self._process)
            self.deaths += 1
            self._process, is_anew = self._start(), True
        raise NotMeasuredError(f"{self.name} died {self.deaths} times: {self._last_words()}")

    def _survive(self, load: Load, seconds: float) -> dict[str, float]:
        figures = self._generate(load, seconds)
        time.sleep(DYING_S)
        self.used_s()
        return figures

    def _generate(self, load: Load, seconds: float) -> dict[str, float]:
        command = [sys.executable, str(Path(http2.__file__)), "--port", str(self._port)]
        command += ["--path", PATH, "--bodies", str(self._stage.bodies(load.requests))]
        command += ["--answers", str(self._stage.answers(load.requests))]
        command += ["--tolerance", str(TOLERANCE), "--seconds", str(seconds), "--warm-up", "0"]
        command += ["--connections", str(load.connections), "--in-flight", str(load.in_flight)]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=_patience_s(seconds), check=False
            )
        except subprocess.TimeoutExpired:
            raise NotMeasuredError(f"{self.name}: the generator did not end") from None
        if done.returncode:
            last = done.stderr.strip().rpartition("\n")[2]
            raise NotMeasuredError(f"{self.name}: the generator stopped: {last}")
        figures: dict[str, float] = json.loads(done.stdout)
        return figures

    def _ask_line(self, line: str, seconds: float) -> Any:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it says nothing, then
            self._process.stdin.write(f"{line}\n")
            self._process.stdin.flush()
        answer = _line(self._process, _patience_s(seconds))
        if not answer:
            raise NotMeasuredError(f"{self.name} died: {self._last_words()}")
        return json.loads(answer)

    def _start(self) -> "subprocess.Popen[str]":
        launch = self._launch
        ours = {k: v for k, v in os.environ.items() if not k.startswith("OTEL_")}
        if launch.folder is not None or launch.environment:  # it runs in an environment of its own
            ours.pop("PYTHONPATH", None)
        with (self._stage.work / f"{self._port}.log").open("w") as log:
            process = subprocess.Popen(
                [*on(SERVER_CORE), *launch.command],
                cwd=launch.folder,
                env={**ours, **launch.environment},
                stdin=subprocess.PIPE if launch.is_program else subprocess.DEVNULL,
                stdout=subprocess.PIPE if launch.says_serving else log,
                stderr=log,
                text=True,
            )
        try:
            self._wait(process)
        except BaseException:
            _end(process)
            raise
        return process

    def _wait(self, process: "subprocess.Popen[str]") -> None:
        """Return once it serves."""
        if process.stdout is not None:
            line = _line(process, START_TIMEOUT_S)
            if "serving" not in line:
                raise NotMeasuredError(f"{self.name} did not start: {self._last_words()}")
            with suppress(ValueError):  # a gateway says where it serves what
                self._http_address = json.loads(line)["http_address"]
            return
        deadline_s = time.monotonic() + START_TIMEOUT_S
        ask = service_pb2.ModelReadyRequest(name="tensor")
        with grpc.insecure_channel(f"127.0.0.1:{self._port}") as channel:
            stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            while time.monotonic() < deadline_s and process.poll() is None:
                with suppress(grpc.RpcError):
                    if stub.ModelReady(ask, timeout=1).ready:
                        return
                time.sleep(0.05)
        raise NotMeasuredError(f"{self.name} did not start: {self._last_words()}")

    def _last_words(self) -> str:
        words = (self._stage.work / f"{self._port}.log").read_text().strip()
        return words.rpartition("\n")[2] or "it said nothing"


def _patience_s(seconds: float) -> float:
    return 60 + 2 * seconds


def _line(process: "subprocess.Popen[str]", timeout_s: float) -> str:
    """Return the line that it writes in time, the only one it has to say; else nothing."""
    assert process.stdout is not None
    ready, _, _ = select.select([process.stdout], [], [], timeout_s)
    return process.stdout.readline() if ready else ""


def _end(process: "subprocess.Popen[str]") -> None:
    process.terminate()
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with suppress(OSError):
                pipe.close()
