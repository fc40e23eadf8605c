"""The process that starts workers on one gRPC port, watches them, replaces them, stops them as one.

It serves no request and imports neither gRPC nor Feast nor ONNX Runtime. One thread, the main one,
owns all workers; the HTTP port's threads ask it for numbers.
"""

import contextlib
import random
import selectors
import signal
import socket
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from queue import Empty, SimpleQueue
from types import FrameType

import structlog
from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector

from headrace.errors import StartupError
from headrace.ports import hold_port
from headrace.settings import ServeSettings, join_address, split_address
from headrace.telemetry.http import HttpEndpoint
from headrace.telemetry.logs import set_log_level
from headrace.workers.changes import Changes, Failure
from headrace.workers.channel import Message
from headrace.workers.numbers import Ledger, supervisor_families
from headrace.workers.policy import (
    WorkerState,
    deaths_in_a_row,
    readiness,
    restart_delay_s,
    starts_too_long,
)
from headrace.workers.process import WorkerProcess, describe_exit
from headrace.workers.questions import TIMEOUT_S, Make, Questions

_LOG = structlog.get_logger(__name__)

LOOK_PERIOD_S = 5.0
UNANSWERED_MAX = 12
"""A worker that does not answer so many looks in a row, a minute's, hangs and is replaced."""

EXIT_TIMEOUT_S = 2.0
"""Between the end of a worker's channel and that of its process; then it is killed."""

STOP_MARGIN_S = 20.0
"""How much longer than drain delay and timeout together a worker may take to stop."""

_IDLE_S = 0.5
"""How often processes are looked at though nothing has come."""

_CLOSING_S = 0.02
"""The same while one is about to end."""

EXIT_OK, EXIT_FAILED = 0, 1


@dataclass(slots=True)
class _Place:
    """One of the workers that there should be, whichever process it is now."""

    number: int
    device: str | None
    process: WorkerProcess | None = None
    state: WorkerState = field(default_factory=WorkerState)
    restarts: int = 0
    deaths: int = 0
    start_at_s: float = 0.0
    spawned_s: float = 0.0
    started_s: float = 0.0
    closed_s: float | None = None
    """When the channel of a process that is still there ended."""
    last_told: str = ""


class Supervisor:
    """
    Several workers on one port.

    Construct it (takes the ports), then `run`. Ready once every worker has been ready; then while
    one is. A worker that ends is replaced, with growing pauses while it keeps ending.

    Args:
        settings: Of the whole; workers get them with the port that was taken.
        devices: The GPU that each worker sees; None for what this process sees.

    Raises:
        StartupError: a port cannot be listened on.
    """

    def __init__(self, settings: ServeSettings, devices: Sequence[str | None]) -> None:
        host, port = split_address(settings.grpc_address)
        self._port = hold_port("--grpc-address", host, port)
        self.grpc_address = join_address(host, self._port.getsockname()[1])
        self._settings = settings.model_copy(update={"grpc_address": self.grpc_address})
        self._places = [_Place(number, device) for number, device in enumerate(devices, 1)]
        self._questions = Questions(Ledger(len(devices)), self._serving, self._send_to)
        self._changes = Changes(self._send_to, settings.log_level)
        self._look_at_s = time.monotonic() + LOOK_PERIOD_S
        self._is_complete = False
        self._is_asked = self._is_stopping = False
        self._was_cut_off = False
        self._stop_by_s = 0.0
        self._posts: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._woken, self._wake = socket.socketpair()
        for end in (self._woken, self._wake):
            end.settimeout(0)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._woken, selectors.EVENT_READ)
        http_host, http_port = split_address(settings.http_address)
        self._http = HttpEndpoint(
            http_host,
            http_port,
            lambda: self._readiness()[0],
            _Together(self),
            {"/metrics/workers": self._page_of_each},
            notes=lambda: self._readiness()[1],
        )
        self.http_address = join_address(http_host, self._http.port)

    def run(self, on_ready: Callable[[], None]) -> int:
        """
        Start all workers, replace those that end, until SIGTERM or SIGINT; stop all of them.

        A second signal ends everything at once.

        Args:
            on_ready: Called once, when all workers serve.

        Returns:
            The exit code: 0 if every worker stopped as asked, else 1.

        Raises:
            StartupError: a worker could not start at the first start.
        """
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        try:
            self._http.start()
            for place in self._places:
                self._start(place)
            return self._watch(on_ready)
        finally:
            for place in self._places:
                if place.process is not None:
                    place.process.reap()
            self._http.stop()
            self._port.close()

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if self._is_asked:
            for place in self._places:
                if place.process is not None:
                    place.process.kill()
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self._is_asked = True
        self._post(lambda: None)

    def _post(self, work: Callable[[], None]) -> None:
        """Have the main thread do something. Any thread may call it, and a signal's handler."""
        self._posts.put(work)
        with contextlib.suppress(BlockingIOError):  # enough are on their way already
            self._wake.send(b"\0")

    def _watch(self, on_ready: Callable[[], None]) -> int:
        was_told = False
        while True:
            for key, events in self._selector.select(self._pause_s()):
                if key.data is None:
                    self._woken.recv(4096)
                else:
                    self._serve_channel(key.data, events)
            self._do_posts()
            now_s = time.monotonic()
            self._look_at_processes(now_s)
            self._end_overdue(now_s)
            if self._is_asked and not self._is_stopping:
                self._drain(now_s)
            if self._is_stopping:
                if all(place.process is None for place in self._places):
                    _LOG.info("stopped")
                    return EXIT_FAILED if self._was_cut_off else EXIT_OK
                continue
            if self._was_cut_off:  # a worker died before all had ever served
                return EXIT_FAILED
            for place in self._places:
                if place.process is None and now_s >= place.start_at_s:
                    self._start(place)
            if self._is_complete and not was_told:
                was_told = True
                _LOG.info(
                    "started",
                    grpc_address=self.grpc_address,
                    http_address=self.http_address,
                    workers=len(self._places),
                )
                on_ready()

    def _pause_s(self) -> float:
        if any(place.closed_s is not None for place in self._places):
            return _CLOSING_S
        now_s = time.monotonic()
        dues = [self._questions.due_s, self._changes.due_s]
        dues += [place.start_at_s for place in self._places if place.process is None]
        return min([_IDLE_S, *(max(0.001, due_s - now_s) for due_s in dues if due_s is not None)])

    def _start(self, place: _Place) -> None:
        start = {
            "type": "start",
            "worker": place.number,
            "settings": self._settings.model_dump(mode="json"),
            **self._changes.state(),
        }
        try:
            place.process = WorkerProcess(place.number, place.device, start)
        except OSError as error:
            if not self._is_complete:
                raise StartupError(f"worker {place.number} cannot be started: {error}") from None
            self._schedule(place, f"it cannot be started: {error}")
            return
        place.closed_s, place.spawned_s = None, time.monotonic()
        self._selector.register(place.process.channel, selectors.EVENT_READ, place)
        self._mind_writing(place)

    def _serve_channel(self, place: _Place, events: int) -> None:
        process = place.process
        if process is None:
            return
        if events & selectors.EVENT_WRITE:
            process.write()
        if events & selectors.EVENT_READ:
            messages = process.read()
            if messages is None:
                self._selector.unregister(process.channel)
                place.closed_s = time.monotonic()
                return
            for message in messages:
                self._take(place, process, message)
        self._mind_writing(place)

    def _mind_writing(self, place: _Place) -> None:
        """Hear of the channel's room only while something waits for it."""
        process = place.process
        if process is not None and place.closed_s is None:
            events = selectors.EVENT_READ
            if process.wants_to_write:
                events |= selectors.EVENT_WRITE
            self._selector.modify(process.channel, events, place)

    def _serving(self) -> list[int]:
        return [place.number for place in self._places if place.state.is_started]

    def _send_to(self, worker: int, message: Message) -> None:
        self._send(self._places[worker - 1], message)

    def _send(self, place: _Place, message: Message) -> None:
        if place.process is not None and place.closed_s is None:
            place.process.send(message)
            self._mind_writing(place)

    def _take(self, place: _Place, process: WorkerProcess, message: Message) -> None:
        process.unanswered = 0
        match message["type"]:
            case "cannot_start":
                process.cannot_start = str(message["reason"])
            case "built":
                if self._changes.join(place.number, message["seen"]):
                    self._send(place, {"type": "begin"})
                else:
                    self._send(place, {"type": "catch_up", **self._changes.state()})
            case "started":
                process.is_started = True
                place.started_s = time.monotonic()
                if place.last_told:
                    _LOG.info("worker_serves_again", worker=place.number)
                    place.last_told = ""
                self._take_state(place, message)
            case "state":
                self._take_state(place, message)
            case "numbers":
                self._questions.answered(place.number, message)
            case "ask":
                self._changes.ask(
                    message,
                    time.monotonic(),
                    lambda failure: self._answer(place, process, message["id"], failure),
                )
            case "done":
                self._changes.done(place.number, message, time.monotonic())
                set_log_level(self._changes.log_level)

    def _answer(
        self, place: _Place, asker: WorkerProcess, number: int, failure: Failure | None
    ) -> None:
        if place.process is asker:  # else it has died, and whoever asked with it
            self._send(place, {"type": "changed", "id": number, "failure": failure})

    def _take_state(self, place: _Place, message: Message) -> None:
        is_ready = bool(message["ready"])
        place.state = WorkerState(
            was_ready=place.state.was_ready or is_ready,
            is_started=True,
            is_ready=is_ready,
            notes=tuple(message["notes"]),
        )
        self._is_complete |= all(other.state.is_started for other in self._places)

    def _readiness(self) -> tuple[bool, list[str]]:
        """Say what /readyz says. Any thread may call it: it reads what is replaced whole."""
        is_ready, notes = readiness([place.state for place in self._places])
        return is_ready and not self._is_asked, notes

    # Processes that end

    def _look_at_processes(self, now_s: float) -> None:
        limit_s = self._settings.worker_start_timeout_s
        for place in self._places:
            process = place.process
            if process is None:
                continue
            code = process.exit_code()
            if code is not None:
                self._ended(place, process, code, now_s)
            elif place.closed_s is not None and now_s - place.closed_s > EXIT_TIMEOUT_S:
                process.kill()
            elif not process.is_started and starts_too_long(now_s - place.spawned_s, limit_s):
                process.cannot_start = (
                    f"it does not serve after {limit_s:g} s; --worker-start-timeout-s allows more"
                )
                process.kill()
        if now_s < self._look_at_s:
            return
        self._look_at_s = now_s + LOOK_PERIOD_S
        for place in self._places:
            process = place.process
            if process is None or not process.is_started:
                continue
            if process.unanswered >= UNANSWERED_MAX:
                _LOG.error("worker_hangs", worker=place.number, pid=process.pid)
                process.kill()
            process.unanswered += 1
            self._send(place, {"type": "look"})

    def _ended(self, place: _Place, process: WorkerProcess, code: int, now_s: float) -> None:
        if place.closed_s is None:  # what it said last is still to be read
            for message in iter(process.read, None):
                for one in message:
                    self._take(place, process, one)
                if not message:
                    break
            self._selector.unregister(process.channel)
        process.channel.close()
        served_s = now_s - place.started_s if process.is_started else None
        place.process, place.closed_s = None, None
        place.state = replace(place.state, is_started=False, is_ready=False, notes=())
        self._questions.ended(place.number)
        self._changes.ended(place.number, now_s)
        if self._is_asked:
            # One that had accepted nothing may end as it likes: service managers signal all of us.
            self._was_cut_off |= process.is_started and code != EXIT_OK
            return
        reason = process.cannot_start or describe_exit(code)
        if not self._is_complete:
            if process.cannot_start is not None:
                raise StartupError(process.cannot_start)
            if not self._was_cut_off:  # one is enough to know
                _LOG.critical("worker_died_at_start", worker=place.number, reason=reason)
            self._was_cut_off = True
            return
        place.deaths = deaths_in_a_row(place.deaths, served_s)
        self._schedule(place, reason)

    def _schedule(self, place: _Place, reason: str) -> None:
        """Have a worker replaced after a while; tell of it once, not of every attempt."""
        delay_s = restart_delay_s(max(1, place.deaths), random.random())  # noqa: S311 no secret
        place.start_at_s = time.monotonic() + delay_s
        place.restarts += 1
        if reason != place.last_told:
            _LOG.error(
                "worker_ended",
                worker=place.number,
                reason=reason,
                replaced_in_s=round(delay_s, 1),
            )
            place.last_told = reason

    def _drain(self, now_s: float) -> None:
        self._is_stopping = True
        limit_s = self._settings.drain_delay_s + self._settings.drain_timeout_s + STOP_MARGIN_S
        self._stop_by_s = now_s + limit_s
        _LOG.info("draining_started", drain_delay_s=self._settings.drain_delay_s)
        for place in self._places:
            self._send(place, {"type": "drain"})

    def _end_overdue(self, now_s: float) -> None:
        self._questions.overdue(now_s)
        self._changes.overdue(now_s)
        if self._is_stopping and now_s >= self._stop_by_s:
            for place in self._places:
                if place.process is not None:
                    _LOG.error("worker_cut_off", worker=place.number)
                    place.process.kill()
            self._stop_by_s = now_s + STOP_MARGIN_S

    # Numbers

    def numbers(self, make: Make) -> list[Metric]:
        """
        Ask all workers for their numbers. Not for the main thread.

        Args:
            make: Makes the page of what they say.

        Raises:
            TimeoutError: the main thread is not there any more.
        """
        answer: Future[list[Metric]] = Future()
        self._post(lambda: self._questions.ask(make, answer, time.monotonic()))
        return answer.result(2 * TIMEOUT_S)

    def own_numbers(self) -> list[Metric]:
        """Return what the supervisor counts itself."""
        return supervisor_families(
            sum(place.state.is_ready for place in self._places),
            {place.number: place.restarts for place in self._places},
        )

    def _page_of_each(self) -> tuple[str, bytes]:
        registry = CollectorRegistry()
        registry.register(_OneByOne(self))
        return CONTENT_TYPE_LATEST, generate_latest(registry)

    def _do_posts(self) -> None:
        while True:
            try:
                work = self._posts.get_nowait()
            except Empty:
                return
            work()


class _Together(Collector):
    """One page of all."""

    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor

    def collect(self) -> Iterable[Metric]:
        yield from self._supervisor.numbers(Ledger.together)
        yield from self._supervisor.own_numbers()


class _OneByOne(Collector):
    """One page of each."""

    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor

    def collect(self) -> Iterable[Metric]:
        yield from self._supervisor.numbers(Ledger.one_by_one)
