"""The gateway with stopwatches around its stages: `stopwatches.py SOCKET on|off serve …`.

Whoever connects to the Unix socket gets, as JSON, how much CPU time each thread has used and, with
`on`, how much of it each stage. The clocks are those of the threads: who waits, for a lock, the
interpreter or a core, uses none. A stage has what it does itself; what it calls that is a stage too
has its own.

Such a clock takes 0.2 to 0.7 µs to read, as much as the shortest stages do. So only one in `EVERY`
of the calls that begin a thread's work is timed, and each of these times a stage that does nothing
as well: what is read for that is what a stopwatch takes, there and then, and `table` takes it off.
"""

import gc
import importlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from threading import get_ident
from typing import Any

INGRESS = "headrace.rpc.completion_queue.ingress"

WATCHED: dict[str, tuple[tuple[str, str], ...]] = {
    "ingress: call begins": ((INGRESS, "_CallTaker.on_call"),),
    "ingress: message read": ((INGRESS, "_Call._on_message"),),
    "ingress: call ends": ((INGRESS, "_Call._on_close"), (INGRESS, "_Call._on_sent")),
    "parse and check": (("headrace.rpc.infer", "ModelInfer.accept"),),
    "queue: put": (("headrace.batching.batcher", "Batcher.put"),),
    "queue: take": (("headrace.batching.batcher", "Batcher.take"),),
    "batch: assemble": (("headrace.carrying", "BatchCarrier._attempt"),),
    "features: read": (("headrace.carrying", "BatchCarrier._read"),),
    "features: join": (
        ("headrace.features.join", "FeatureJoin.missing"),
        ("headrace.features.join", "FeatureJoin.assemble"),
    ),
    "infer": (("headrace.backends.onnx_runtime", "OnnxRuntimeBackend.infer"),),
    "reply: bytes": (
        ("headrace.rpc.infer", "InferRequest.answer"),
        ("headrace.carrying", "BatchCarrier._blocks"),
    ),
    "reply: send": ((INGRESS, "_Call._send"),),
    "refusal": (("headrace.rpc.infer", "refuse"),),
    "telemetry": (
        ("headrace.observation", "BatchObserver.answered"),
        ("headrace.telemetry.calls", "CallRecorder.failed"),
    ),
}
"""What is timed: stages, and the functions that are one."""

COLLECTOR = "garbage collector"
LOOP = "gRPC: polls, parses HTTP/2"
EXECUTOR = "batch: the executor's loop"
ATTENDANT = "ingress: calls looked after, freed"
OTHER_PYTHON = "other threads: Python's"
OTHER_NATIVE = "other threads: gRPC's, ONNX Runtime's"
STAGES = (LOOP, *WATCHED, EXECUTOR, ATTENDANT, COLLECTOR, OTHER_PYTHON, OTHER_NATIVE)
"""Every row of a profile, in the order of a request's life."""

EVERY = 17
"""One of so many is timed. Prime, lest it keep step with calls that take turns."""

PROBE, PROBE_AROUND = "probe", "probe around"
_STAGES_MAX = 64


class _Thread:
    """What one thread has used; it alone writes here."""

    __slots__ = ("calls", "inner", "is_inside", "is_timed", "last_ns", "outer", "roots", "totals")

    def __init__(self) -> None:
        self.is_inside = self.is_timed = False
        self.roots = 0
        self.last_ns = 0
        self.outer: list[int] = []
        self.totals, self.calls, self.inner = ([0] * _STAGES_MAX for _ in range(3))

    def begin(self, number: int) -> None:
        outer = self.outer
        now_ns = time.thread_time_ns()
        if outer:
            self.totals[outer[-1]] += now_ns - self.last_ns
            self.inner[outer[-1]] += 1
        self.calls[number] += 1
        outer.append(number)
        self.last_ns = now_ns

    def end(self) -> None:
        now_ns = time.thread_time_ns()
        self.totals[self.outer.pop()] += now_ns - self.last_ns
        self.last_ns = now_ns


class Stopwatches:
    """Counts the CPU time of each thread by stage."""

    def __init__(self) -> None:
        self._stages: list[str] = []
        self._threads: dict[int, _Thread] = {}
        nothing = self.around(lambda: None, PROBE)
        self._probe = self.around(lambda: nothing(), PROBE_AROUND)  # noqa: PLW0108 as others call

    def watch(self, module: str, path: str, stage: str) -> None:
        """
        Put a stopwatch around a function.

        Args:
            module: Where it is.
            path: As `function` or `Class.method`.
            stage: What its time counts for.
        """
        owner: Any = importlib.import_module(module)
        *outer, name = path.split(".")
        for part in outer:
            owner = getattr(owner, part)
        setattr(owner, name, self.around(getattr(owner, name), stage))

    def around(self, function: Callable[..., Any], stage: str) -> Callable[..., Any]:
        """Return the function with a stopwatch around it."""
        number, threads = self._number(stage), self._threads

        @wraps(function)
        def timed(*arguments: Any, **named: Any) -> Any:
            thread = threads.get(get_ident()) or self._thread()
            is_root = not thread.is_inside
            if is_root:
                thread.roots += 1
                thread.is_inside = True
                thread.is_timed = not thread.roots % EVERY
            is_timed = thread.is_timed
            if is_timed:
                thread.begin(number)
            try:
                return function(*arguments, **named)
            finally:
                if is_timed:
                    thread.end()
                    if is_root:
                        self._probe()
                if is_root:
                    thread.is_inside = thread.is_timed = False

        return timed

    def watch_collector(self) -> None:
        """Time Python's garbage collector, where it interrupts what is timed."""
        number = self._number(COLLECTOR)
        began = []

        def on_gc(phase: str, _info: Mapping[str, Any]) -> None:
            thread = self._threads.get(get_ident())
            if phase == "start" and thread is not None and thread.is_timed:
                thread.begin(number)
                began.append(thread)
            elif phase == "stop" and began:
                began.pop().end()

        gc.callbacks.append(on_gc)

    def counts(self) -> dict[int, dict[str, Any]]:
        """Return by thread its `roots`, and by stage: nanoseconds, calls, calls out of it."""
        return {
            ident: {
                "roots": thread.roots,
                "stages": {
                    stage: (thread.totals[at], thread.calls[at], thread.inner[at])
                    for at, stage in enumerate(self._stages)
                    if thread.calls[at]
                },
            }
            for ident, thread in list(self._threads.items())
        }

    def _thread(self) -> _Thread:
        return self._threads.setdefault(get_ident(), _Thread())

    def _number(self, stage: str) -> int:
        if stage not in self._stages:
            self._stages.append(stage)
        return self._stages.index(stage)


def snapshot(stopwatches: Stopwatches) -> dict[str, Any]:
    """Return what has been counted up to now."""
    counts = stopwatches.counts()
    threads = {}
    for thread in threading.enumerate():
        if thread.ident is not None:
            clock = time.pthread_getcpuclockid(thread.ident)
            mine = counts.get(thread.ident, {"roots": 0, "stages": {}})
            threads[thread.name] = {"ns": time.clock_gettime_ns(clock), **mine}
    return {"pid": os.getpid(), "ns": time.process_time_ns(), "threads": threads}


def used(before: Mapping[str, Any], after: Mapping[str, Any], requests: int) -> dict[str, float]:
    """Return the microseconds of CPU per request between two snapshots, by kind of thread. Pure."""
    kinds = dict.fromkeys((LOOP, EXECUTOR, ATTENDANT, OTHER_PYTHON, OTHER_NATIVE), 0.0)
    for name, thread in after["threads"].items():
        kinds[_kind(name)] += thread["ns"] - before["threads"].get(name, _NEW)["ns"]
    kinds[OTHER_NATIVE] = after["ns"] - before["ns"] - sum(kinds.values())
    return {kind: ns / requests / 1e3 for kind, ns in kinds.items()}


def table(
    before: Mapping[str, Any], after: Mapping[str, Any], requests: int, bare: Mapping[str, float]
) -> dict[str, float]:
    """
    Make a profile: microseconds of CPU per request, by stage. Pure.

    Args:
        before: A snapshot of a gateway with stopwatches.
        after: A later one.
        requests: Ended in between.
        bare: What `used` says of a gateway without stopwatches: what its threads take and no stage
            of theirs accounts for is theirs.
    """
    rows = dict.fromkeys(STAGES, 0.0) | bare
    for name, thread in after["threads"].items():
        was = before["threads"].get(name, _NEW)
        stages = _since(was["stages"], thread["stages"])
        timed = stages.get(PROBE, (0, 0, 0))[1]
        if not timed:
            continue
        own_ns, outer_ns = _overhead(stages)
        scale = (thread["roots"] - was["roots"]) / timed / requests / 1e3
        for stage, (ns, calls, inner) in stages.items():
            if stage in rows:
                us = max(0.0, ns - calls * own_ns - inner * outer_ns) * scale
                rows[stage] += us
                rows[_kind(name)] -= us
    return {stage: max(0.0, us) for stage, us in rows.items()}


_NEW: Mapping[str, Any] = {"ns": 0, "roots": 0, "stages": {}}


def _overhead(stages: Mapping[str, Sequence[int]]) -> tuple[float, float]:
    """Return what a stopwatch adds to its own stage, and to the one around it, in nanoseconds."""
    own_ns, probes, _ = stages[PROBE]
    around_ns, _, _ = stages[PROBE_AROUND]
    return own_ns / probes, max(0, around_ns - own_ns) / probes


def _since(
    was: Mapping[str, Sequence[int]], now: Mapping[str, Sequence[int]]
) -> dict[str, tuple[int, int, int]]:
    since = {}
    for stage, (ns, calls, inner) in now.items():
        was_ns, was_calls, was_inner = was.get(stage, (0, 0, 0))
        since[stage] = ns - was_ns, calls - was_calls, inner - was_inner
    return since


def _kind(thread: str) -> str:
    if thread.endswith("(_serve)"):  # grpcio's own
        return LOOP
    if thread == "call-attendant":
        return ATTENDANT
    return EXECUTOR if thread.startswith("executor-") else OTHER_PYTHON


def answer(path: str, stopwatches: Stopwatches) -> None:
    """Send a snapshot to whoever connects, for ever."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        while True:
            connection, _ = listener.accept()
            with connection:
                connection.sendall(json.dumps(snapshot(stopwatches)).encode())


def main(arguments: list[str]) -> int:
    """Serve with stopwatches."""
    path, state, *rest = arguments
    from headrace.__main__ import main as headrace  # noqa: PLC0415 it sets grpcio's environment

    stopwatches = Stopwatches()
    if state == "on":
        for stage, functions in WATCHED.items():
            for module, name in functions:
                stopwatches.watch(module, name, stage)
        stopwatches.watch_collector()
    threading.Thread(
        target=answer, args=(path, stopwatches), name="stopwatches", daemon=True
    ).start()
    return headrace(rest)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
