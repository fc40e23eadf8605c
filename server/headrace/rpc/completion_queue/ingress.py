"""Hot calls on grpcio's own loop thread, the way round its handlers and their threads.

A unary call is over after its close and its status. `ReceiveCloseOnServer` costs a quarter of a
small request, so it is started only for calls that wait longer than `WATCH_DELAY_S`; the others
have it in the batch of their reply.
"""

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import grpc
import structlog

from headrace.rpc.completion_queue.core import (
    FAR_FUTURE_S,
    NO_STATE,
    Taker,
    cancel,
    cygrpc,
    loop_thread,
)
from headrace.rpc.completion_queue.streams import Streams
from headrace.rpc.ingress import Accept, HotMethod, HotStream, Metadata
from headrace.rpc.status import Status

_LOG = structlog.get_logger(__name__)

OUTSTANDING_REQUESTS = 64
"""
Calls that C-core may hand over before Python asks again, per method. Calls nobody asked for wait in
C-core, out of sight of admission; each call asks for its successor at once.
"""

WATCH_DELAY_S = 0.01
"""
A call that waits longer than this is watched for its caller leaving; shorter waits are not worth
the batch and the event. Measured: 58 µs of CPU per one-row request with every call watched, 49
without.
"""

ATTENDANT_PATIENCE_S = 1.0
"""How long the attendant looks for calls to watch, with none there, before it sleeps."""

_NO_MESSAGE = Status(grpc.StatusCode.INVALID_ARGUMENT, "expected one request message")


class CompletionQueueIngress:
    """
    Takes hot calls on the server's own loop thread.

    Construct it before `server.start()`, call `begin` right after and `end` after its stop. Events
    are the loop thread's alone, so counting them needs no lock.

    Args:
        server: Not started yet. Kept alive as long as any call: a reply after the server object is
            gone would abort the process.
        methods: Must not be registered with the server as well, or calls are split.
        streams: Likewise.
    """

    name = "completion-queue"

    def __init__(
        self,
        server: grpc.Server,
        methods: Sequence[HotMethod],
        streams: Sequence[HotStream] = (),
    ) -> None:
        self._server = server
        self._state: Any = server._state  # type: ignore[attr-defined]
        self._methods = methods
        self._refusal: Status | None = None
        self._open = 0
        self._loop: threading.Thread | None = None
        self._claims = threading.Lock()
        self._recent: deque[_Call] = deque()
        self._ended = threading.Event()
        self._arrival = threading.Event()
        self._attendant_sleeps = False
        self._attendant = threading.Thread(target=self._attend, name="call-attendant", daemon=True)
        self._stream_methods = streams
        self._streams = Streams(server)
        for path in [*(method.path for method in methods), *(stream.path for stream in streams)]:
            self._state.server.register_method(path)  # after start it would abort

    def begin(self) -> None:
        """Ask for the first calls."""
        self._loop = loop_thread(self._state)
        self._attendant.start()
        takers: list[Taker] = [_CallTaker(self, method) for method in self._methods]
        takers += [self._streams.taker(method) for method in self._stream_methods]
        for taker in takers:
            for _ in range(OUTSTANDING_REQUESTS):
                taker.ask()

    def refuse_new(self, status: Status) -> None:
        """Answer new calls with `status`, unread; end streams with it once they are answered."""
        self._refusal = status
        self._streams.drain(status)

    def end(self) -> None:
        """End the attendant; the server has stopped."""
        self._ended.set()
        self._arrival.set()
        if self._attendant.ident is not None:
            self._attendant.join(5)

    @property
    def open_calls(self) -> int:
        """Calls whose message has come and that have not ended yet, and messages of streams."""
        return self._open + self._streams.messages_under_way

    @property
    def open_streams(self) -> int:
        """Streams that have not ended yet."""
        return len(self._streams)

    @property
    def is_alive(self) -> bool:
        """Whether the loop thread runs."""
        return self._loop is not None and self._loop.is_alive()

    def _note(self, call: "_Call") -> None:
        self._recent.append(call)
        if self._attendant_sleeps:
            self._arrival.set()

    def _attend(self) -> None:
        """Watch calls that wait long. The attendant's whole life."""
        idle_s = 0.0
        while not self._ended.wait(WATCH_DELAY_S):
            try:
                self._watch_old_calls()
            except Exception:
                _LOG.exception("ingress_failed", where="attendant")
            idle_s = 0.0 if self._recent else idle_s + WATCH_DELAY_S
            if idle_s > ATTENDANT_PATIENCE_S:
                self._attendant_sleeps = True
                if not self._recent:  # a call noted before the flag was seen sent no signal
                    self._arrival.wait()
                self._attendant_sleeps = False
                self._arrival.clear()
                idle_s = 0.0

    def _watch_old_calls(self) -> None:
        recent, old_s = self._recent, time.perf_counter() - WATCH_DELAY_S
        while recent and recent[0].arrival_s <= old_s:
            call = recent.popleft()
            if not call._answered:  # most are, by then
                call.watch()


class _CallTaker(Taker):
    """Asks C-core for calls of one method and begins each."""

    __slots__ = ("_accept", "_glance", "_ingress")

    def __init__(self, ingress: CompletionQueueIngress, method: HotMethod) -> None:
        super().__init__(ingress._state, method.path)
        self._ingress = ingress
        self._accept = method.accept
        self._glance = method.glance

    def on_call(self, event: Any) -> Any:
        if not event.success:  # the server stops: outstanding requests come back
            return NO_STATE
        call = None
        try:
            self.ask()
            ingress, glance = self._ingress, self._glance
            call = _Call(ingress, event, self._accept)
            refusal = ingress._refusal
            if refusal is None and glance is not None:
                refusal = glance(call)
            if refusal is None:
                ingress._note(call)
                call.receive()
            else:
                call.refuse(refusal)
        except Exception:
            _LOG.exception("ingress_failed", where="on_call")
            if call is None:
                cancel(event.call)
            else:
                call._refuse_internal()
        return NO_STATE


class _Call:
    """One hot call; see `HotCall`. Its tags run on the loop thread, its replies on any."""

    __slots__ = (
        "_accept",
        "_answered",
        "_call",
        "_event",
        "_ingress",
        "_is_counted",
        "_unfinished",
        "_watched",
        "arrival_s",
        "deadline_s",
        "gone",
        "on_gone",
    )

    def __init__(
        self,
        ingress: CompletionQueueIngress,
        event: Any,
        accept: Accept,
    ) -> None:
        self._ingress = ingress
        self._accept = accept
        self._call = event.call
        self._event = event
        deadline_s = event.call_details.deadline
        self.deadline_s = deadline_s if deadline_s < FAR_FUTURE_S else math.inf
        self.arrival_s = time.perf_counter()
        self.gone = False
        self.on_gone: Callable[[], None] | None = None
        self._answered = self._watched = False
        self._unfinished = 1
        self._is_counted = False

    @property
    def metadata(self) -> Metadata:
        return self._event.invocation_metadata  # type: ignore[no-any-return]

    def receive(self) -> None:
        operations = (cygrpc.ReceiveMessageOperation(0),)
        error = self._call.start_server_batch(operations, self._on_message)
        if error:
            _LOG.error("call_not_received", error=error)
            cancel(self._call)

    def watch(self) -> None:
        """Learn from now on when the caller leaves."""
        with self._ingress._claims:
            if self._answered:
                return
            self._watched = True
            self._unfinished = 2  # its close and its status
        operations = (cygrpc.ReceiveCloseOnServerOperation(0),)
        error = self._call.start_server_batch(operations, self._on_close)
        if error:  # nothing was started, the tag will never come
            _LOG.error("call_not_watched", error=error)
            self._unfinished -= 1

    def reply(self, message: bytes) -> None:
        self._send(
            (
                cygrpc.SendInitialMetadataOperation(None, 0),
                cygrpc.SendMessageOperation(message, 0),
                cygrpc.SendStatusFromServerOperation(None, 0, b"", 0),
            )
        )

    def refuse(self, status: Status) -> None:
        self._send(
            (
                cygrpc.SendInitialMetadataOperation(None, 0),
                cygrpc.SendStatusFromServerOperation(
                    status.trailing, status.code.value[0], status.details, 0
                ),
            )
        )

    def _send(self, operations: tuple[Any, ...]) -> None:
        with self._ingress._claims:
            if self._answered:
                return
            self._answered = True
        self.on_gone = None  # whom it leads to leads back here: references alone would not free it
        try:
            if self._watched:
                error = self._call.start_server_batch(operations, self._on_sent)
            else:
                error = self._call.start_server_batch(
                    (cygrpc.ReceiveCloseOnServerOperation(0), *operations), self._on_close
                )
        except Exception as raised:
            error = repr(raised)
        if error:  # nothing was started, the tag will never come
            cancel(self._call)
            self._finish_one()
            _LOG.error("reply_not_sent", error=error)

    def _on_message(self, event: Any) -> Any:
        try:
            message = event.batch_operations[0].message()
            if message is None:
                self.refuse(_NO_MESSAGE)
            else:
                # Only now: a caller who never sends must not hold up a stop.
                self._is_counted = True
                self._ingress._open += 1
                self._accept(self, message)
        except Exception:
            _LOG.exception("ingress_failed", where="on_message")
            self._refuse_internal()
        return NO_STATE

    def _on_close(self, event: Any) -> Any:
        try:
            self.gone = event.batch_operations[0].cancelled()
            on_gone = self.on_gone
            if self.gone and on_gone is not None:
                self.on_gone = None
                on_gone()
        except Exception:
            _LOG.exception("ingress_failed", where="on_close")
        return self._finish_one()

    def _on_sent(self, _event: Any) -> Any:
        return self._finish_one()

    def _finish_one(self) -> Any:
        self._unfinished -= 1
        if not self._unfinished:
            if self._is_counted:
                self._ingress._open -= 1
            # C-core's part is freed here, one call at a time. Whoever has the last reference, the
            # attendant as a rule, would free hundreds at a stretch, and keep their streams so long.
            self._call = self._event = None
        return NO_STATE

    def _refuse_internal(self) -> None:
        try:
            self.refuse(Status(grpc.StatusCode.INTERNAL, "internal error"))
        except Exception:
            _LOG.exception("ingress_failed", where="refuse")
