"""A worker's side of the channel to its supervisor."""

import os
import select
import socket
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from itertools import count
from queue import SimpleQueue
from typing import Any, Protocol

import structlog

from headrace.errors import Draining, ModelLoadError
from headrace.settling import settle
from headrace.telemetry.logs import set_log_level
from headrace.workers.channel import ChannelBrokenError, Decoder, Message, encode
from headrace.workers.numbers import Page

_LOG = structlog.get_logger(__name__)

LOOK_PERIOD_S = 0.25
"""How often readiness is looked at, to tell of a change."""

START_TIMEOUT_S = 10.0
"""For the first message, which is written before the process begins."""

ANSWER_MARGIN_S = 5.0
"""How much longer than a change itself its answer may take."""

STOPPING = "this server is stopping"

EXIT_TIMEOUT_S = 15.0
"""Beyond the drain timeout; a worker without a supervisor that has not ended by then is cut off."""


class Served(Protocol):
    """The part of a gateway that a supervisor reaches."""

    def is_ready(self) -> bool: ...

    def readiness_notes(self) -> Sequence[str]: ...

    def numbers(self) -> Page: ...

    def load(self, name: str, timeout_s: float | None) -> None: ...

    def unload(self, name: str, timeout_s: float | None) -> None: ...

    def serves(self, name: str) -> bool: ...

    def hurry(self) -> None: ...


class SupervisorLink:
    """
    The channel, with one thread that reads it, another that carries out changes one by one.

    When the supervisor is gone the worker stops by itself: `asked_to_stop` is set, without a drain
    delay, and the process is cut off if that does not end it.

    Args:
        channel: Connected to the supervisor; owned from here on.
    """

    def __init__(self, channel: socket.socket) -> None:
        self.asked_to_stop = threading.Event()
        self._channel = channel
        self._decoder = Decoder()
        self._early: list[Message] = []
        """Came with the first one."""
        self._sending = threading.Lock()
        self._served: Served | None = None
        self._exit_timeout_s = EXIT_TIMEOUT_S
        self._said: tuple[bool, tuple[str, ...]] | None = None
        self._asked: dict[int, Future[None]] = {}
        self._ids = count(1)
        self._is_cut = self._has_left = False
        self._may_serve = False
        """Whether requests may have been accepted, though nobody has been told so."""
        self._steps: SimpleQueue[Message] = SimpleQueue()
        self._changing = threading.Condition()
        self._changes: list[Message] = []
        self._thread = threading.Thread(target=self._run, name="supervisor-link", daemon=True)
        self._changer = threading.Thread(target=self._change, name="worker-changes", daemon=True)

    def receive_start(self) -> Message:
        """
        Wait for the first message.

        Raises:
            ChannelBrokenError: it does not come, or is another.
        """
        self._channel.settimeout(START_TIMEOUT_S)
        messages: list[Message] = []
        while not messages:
            try:
                piece = self._channel.recv(1 << 16)
            except OSError as error:
                raise ChannelBrokenError(str(error)) from None
            if not piece:
                raise ChannelBrokenError("the supervisor is gone")
            messages = self._decoder.feed(piece)
        self._channel.settimeout(None)
        first, *self._early = messages
        if first["type"] != "start":
            raise ChannelBrokenError(f"expected `start`, got `{first['type']}`")
        return first

    def start(self, drain_timeout_s: float) -> None:
        """
        Begin to listen. Before `join` has let this worker begin, a supervisor that asks to stop, or
        goes, ends the process.

        Args:
            drain_timeout_s: How long stopping may take, about.
        """
        self._exit_timeout_s = drain_timeout_s + EXIT_TIMEOUT_S
        self._thread.start()

    def cannot_start(self, reason: str) -> None:
        """Tell why, before exiting."""
        self._send({"type": "cannot_start", "reason": reason})

    def join(self, state: Message, catch_up: Callable[[Message], None]) -> None:
        """
        Wait until this worker is as the others are; from then on it is asked for changes as they.

        Args:
            state: That it has: of the first message.
            catch_up: Is told the state of now, as often as there is a newer one.
        """
        while True:
            self._send({"type": "built", "seen": state["seen"]})
            state = self._steps.get()
            if state["type"] == "begin":
                return
            catch_up(state)

    def serving(self, served: Served) -> None:
        """Tell that requests are served from now on."""
        self._served = served
        if self._is_cut:  # it was not there yet when the supervisor went
            served.hurry()
        self._changer.start()
        self._said = self._state(served)
        self._send({"type": "started", **_fields(self._said)})

    def ask(self, what: str, name: str, timeout_s: float) -> None:
        """
        Have a change made by all workers, this one too; wait for it.

        Args:
            what: `load`, `unload` or `log_level`.
            name: Of a model; the level.
            timeout_s: Longest that it may take; it goes on then.

        Raises:
            ModelLoadError: a worker could not.
            Draining: this one is stopping.
            TimeoutError: it takes longer.
        """
        number, future = next(self._ids), Future[None]()
        self._asked[number] = future
        try:
            if (
                self._is_cut or self._has_left
            ):  # after the entry: `leave` has seen it, or we see this
                raise Draining(STOPPING)
            message = {"type": "ask", "id": number, "what": what}
            self._send({**message, "name": name, "timeout_s": timeout_s})
            future.result(timeout_s + ANSWER_MARGIN_S)
        finally:
            self._asked.pop(number, None)

    def leave(self) -> None:
        """Keep nobody waiting for changes, now or later: this worker stops."""
        self._has_left = True
        for future in list(self._asked.values()):
            settle(future, Draining(STOPPING))

    def _run(self) -> None:
        try:
            self._listen()
        except Exception:  # noqa: BLE001 whatever it was, nobody leads this process any more
            _LOG.exception("supervisor_link_failed")
        self._is_cut = True
        self.leave()
        if not self._may_serve:
            os._exit(1)
        _LOG.warning("supervisor_gone", effect="this worker stops")
        if self._served is not None:
            self._served.hurry()
        self.asked_to_stop.set()
        time.sleep(self._exit_timeout_s)
        os._exit(1)

    def _listen(self) -> None:
        for message in self._early:
            self._take(message)
        poll = select.poll()
        poll.register(self._channel, select.POLLIN)
        while True:
            if poll.poll(LOOK_PERIOD_S * 1e3):
                try:
                    piece = self._channel.recv(1 << 16)
                except ConnectionError:
                    return
                if not piece:
                    return
                for message in self._decoder.feed(piece):
                    self._take(message)
            elif self._served is not None and self._state(self._served) != self._said:
                self._tell(self._served)

    def _take(self, message: Message) -> None:
        served = self._served
        match message["type"]:
            case "drain":
                if not self._may_serve:
                    os._exit(0)  # nothing was accepted
                self.asked_to_stop.set()
            case "look" if served is not None:
                self._tell(served)
            case "numbers" if served is not None:
                self._send_numbers(served, message["id"])
            case "begin" | "catch_up":
                self._may_serve = message["type"] == "begin"
                self._steps.put(message)
            case "change" if message["what"] == "log_level":
                set_log_level(message["name"])
                self._done(message, None)
            case "change":
                with self._changing:
                    self._changes.append(message)
                    self._changing.notify()
            case "changed":
                future = self._asked.get(message["id"])
                if future is not None:
                    settle_as(future, message["failure"])

    def _send_numbers(self, served: Served, number: int) -> None:
        try:
            self._send({"type": "numbers", "id": number, "families": served.numbers()})
        except Exception:  # noqa: BLE001 the page lacks this worker, and nothing else does
            _LOG.exception("numbers_failed")

    def _change(self) -> None:
        while True:
            with self._changing:
                self._changing.wait_for(lambda: self._changes)
                message = self._changes.pop(0)
            assert self._served is not None
            change = {"load": self._served.load, "unload": self._served.unload}[message["what"]]
            # However long it takes: the supervisor counts the time, and has to know the end of it.
            try:
                failure = failure_of(lambda: change(message["name"], None))  # noqa: B023 called at once
            except Draining:  # the supervisor waits for no worker that has ended
                self.leave()
                return
            self._done(message, failure, serves=self._served.serves(message["name"]))

    def _done(
        self, change: Message, failure: dict[str, str] | None, *, serves: bool = False
    ) -> None:
        done = {"type": "done", "id": change["id"], "failure": failure}
        self._send({**done, "serves": serves})

    def _state(self, served: Served) -> tuple[bool, tuple[str, ...]]:
        is_ready = served.is_ready() and not self.asked_to_stop.is_set()
        return is_ready, tuple(served.readiness_notes())

    def _tell(self, served: Served) -> None:
        self._said = self._state(served)
        self._send({"type": "state", **_fields(self._said)})

    def _send(self, message: Message) -> None:
        """Send; without a supervisor, to nobody. It always reads: the wait is short."""
        line = encode(message)
        with self._sending:
            try:
                self._channel.sendall(line)
            except OSError:
                self._is_cut = True  # the thread that reads finds out by itself


def failure_of(change: Callable[[], None]) -> dict[str, str] | None:
    """
    Carry out a change; return what it raised, for the channel.

    Raises:
        Draining: this worker is stopping: it will never be made here.
    """
    try:
        change()
    except Draining:
        raise
    except ModelLoadError as error:
        return {"kind": "load", "text": str(error)}
    except (TimeoutError, FutureTimeoutError):
        return {"kind": "timeout", "text": ""}
    except Exception:  # noqa: BLE001 it is the caller's, somewhere
        _LOG.exception("change_failed")
        return {"kind": "internal", "text": ""}
    return None


def settle_as(future: "Future[None]", failure: dict[str, str] | None) -> None:
    """Make of what came over the channel what `failure_of` had seen."""
    if failure is None:
        settle(future, None)
    elif failure["kind"] == "load":
        settle(future, ModelLoadError(failure["text"]))
    elif failure["kind"] == "timeout":
        settle(future, TimeoutError())
    else:
        settle(future, RuntimeError("a worker failed; its log says more"))


def _fields(state: tuple[bool, tuple[str, ...]]) -> dict[str, Any]:
    return {"ready": state[0], "notes": list(state[1])}


class SharedRepository:
    """
    A worker's repository as callers reach it: what they change is changed in every worker.

    Args:
        link: To the supervisor, which asks them all.
        mode: What makes versions come and go.
    """

    def __init__(self, link: SupervisorLink, mode: str) -> None:
        self._link = link
        self.mode = mode

    def load(self, name: str, timeout_s: float) -> None:
        """See `RepositoryManager.load`."""
        self._link.ask("load", name, timeout_s)

    def unload(self, name: str, timeout_s: float) -> None:
        """See `RepositoryManager.unload`."""
        self._link.ask("unload", name, timeout_s)
