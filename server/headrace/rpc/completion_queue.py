"""Hot calls straight from grpcio's completion queue: the one module that touches grpcio's privates.

`grpc.server`'s own loop thread polls the completion queue and runs any tag that is not one of its
own as `rpc_state, callbacks = tag(event)`. The tags here are bound methods of `_Taker` and `_Call`:
no pool thread, no task and no future per request. What is relied on, tried on grpcio 1.85.1:

* a method registered with the core and not with the Python server is ours alone;
* a tag that raises kills the loop while the port stays open: no tag here may raise;
* `ReceiveCloseOnServer` in a batch of its own completes when the caller leaves or the deadline
  passes, and after a normal reply too: such a call is over after its close and its status. It costs
  a quarter of a small request, so it is started only for calls that wait longer than
  `WATCH_DELAY_S`; the others have it in the batch of their reply;
* a message of None is a caller that left, one that sent too much, or one that sent nothing.

`unusable_because` checks all that with a real call before the server relies on it.
"""

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent import futures
from typing import Any

import grpc
import structlog

from headrace.rpc.ingress import HotCall, HotMethod, Metadata
from headrace.rpc.status import Status

try:
    from grpc import _server
    from grpc._cython import cygrpc
except ImportError:  # a future grpcio: `unusable_because` says so
    _server = cygrpc = None

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

_SELF_CHECK_S = 2.0
"""For each step of the self-check."""

_NO_STATE: tuple[None, tuple[()]] = (None, ())
_NO_MESSAGE = Status(grpc.StatusCode.INVALID_ARGUMENT, "expected one request message")
_FAR_FUTURE_S = 1e15
"""A call without a deadline carries 9.2e18, not infinity."""


def unusable_because() -> str | None:
    """
    Try the private names of the installed grpcio with calls over loopback.

    Returns:
        None when everything works; else why not, for the log.
    """
    if cygrpc is None or _server is None:
        return "grpcio has no completion queue under the expected names"
    try:
        return _try_calls()
    except Exception as error:  # whatever a future grpcio does, the answer is the other ingress
        return f"{type(error).__name__}: {error}".partition("\n")[0]


class CompletionQueueIngress:
    """
    Takes hot calls on the server's own loop thread.

    Construct it before `server.start()`, call `begin` right after and `end` after its stop. Events
    are the loop thread's alone, so counting them needs no lock.

    Args:
        server: Not started yet. Kept alive as long as any call: a reply after the server object is
            gone would abort the process.
        methods: Must not be registered with the server as well, or calls are split.
    """

    name = "completion-queue"

    def __init__(self, server: grpc.Server, methods: Sequence[HotMethod]) -> None:
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
        for method in methods:
            self._state.server.register_method(method.path)  # after start it would abort

    def begin(self) -> None:
        """Ask for the first calls."""
        self._loop = _loop_thread(self._state)
        self._attendant.start()
        for method in self._methods:
            taker = _Taker(self, method)
            for _ in range(OUTSTANDING_REQUESTS):
                taker.ask()

    def refuse_new(self, status: Status) -> None:
        """Answer every call from now on with `status`, unread."""
        self._refusal = status

    def end(self) -> None:
        """End the attendant; the server has stopped."""
        self._ended.set()
        self._arrival.set()
        if self._attendant.ident is not None:
            self._attendant.join(5)

    @property
    def open_calls(self) -> int:
        """Calls whose message has come and that have not ended yet."""
        return self._open

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


class _Taker:
    """Asks C-core for calls of one method and begins each."""

    __slots__ = ("_accept", "_ingress", "_path", "_state")

    def __init__(self, ingress: CompletionQueueIngress, method: HotMethod) -> None:
        self._ingress = ingress
        self._state = ingress._state
        self._path = method.path
        self._accept = method.accept

    def ask(self) -> None:
        state = self._state
        with state.lock:
            if state.stage is _server._ServerStage.STARTED:
                queue = state.completion_queue
                state.server.request_registered_call(queue, queue, self._path, self.on_call)

    def on_call(self, event: Any) -> Any:
        if not event.success:  # the server stops: outstanding requests come back
            return _NO_STATE
        try:
            self.ask()
            call = _Call(self._ingress, event, self._accept)
            self._ingress._note(call)
            if self._ingress._refusal is None:
                call.receive()
            else:
                call.refuse(self._ingress._refusal)
        except Exception:
            _LOG.exception("ingress_failed", where="on_call")
            _cancel(event.call)
        return _NO_STATE


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
    )

    def __init__(
        self,
        ingress: CompletionQueueIngress,
        event: Any,
        accept: Callable[[HotCall, bytes], None],
    ) -> None:
        self._ingress = ingress
        self._accept = accept
        self._call = event.call
        self._event = event
        deadline_s = event.call_details.deadline
        self.deadline_s = deadline_s if deadline_s < _FAR_FUTURE_S else math.inf
        self.arrival_s = time.perf_counter()
        self.gone = False
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
            _cancel(self._call)

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
            _cancel(self._call)
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
        return _NO_STATE

    def _on_close(self, event: Any) -> Any:
        try:
            self.gone = event.batch_operations[0].cancelled()
        except Exception:
            _LOG.exception("ingress_failed", where="on_close")
        return self._finish_one()

    def _on_sent(self, _event: Any) -> Any:
        return self._finish_one()

    def _finish_one(self) -> Any:
        self._unfinished -= 1
        if not self._unfinished and self._is_counted:
            self._ingress._open -= 1
        return _NO_STATE

    def _refuse_internal(self) -> None:
        try:
            self.refuse(Status(grpc.StatusCode.INTERNAL, "internal error"))
        except Exception:
            _LOG.exception("ingress_failed", where="refuse")


def _loop_thread(state: Any) -> threading.Thread | None:
    """Find the thread that `server.start()` made: grpcio keeps no reference to it."""
    for thread in threading.enumerate():
        if getattr(thread, "_args", None) == (state,):
            return thread
    return None


def _cancel(call: Any) -> None:
    try:
        call.cancel(cygrpc.StatusCode.internal, "internal error")
    except Exception:
        _LOG.exception("ingress_failed", where="cancel")


def _try_calls() -> str | None:
    """Make a call of each kind that the server will meet; return what is not as it should be."""
    held: list[HotCall] = []

    def accept(call: HotCall, message: bytes) -> None:
        if message == b"hold":
            held.append(call)
        elif message == b"refuse":
            call.refuse(Status(grpc.StatusCode.ABORTED, "refused"))
        elif message == b"no deadline":
            call.reply(str(call.deadline_s).encode())
        else:
            call.reply(message)

    path = "/headrace.SelfCheck/Echo"
    server = grpc.server(futures.ThreadPoolExecutor(1), options=[("grpc.so_reuseport", 0)])
    ingress = CompletionQueueIngress(server, [HotMethod(path, accept)])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        ingress.begin()
        if not ingress.is_alive:
            return "the loop thread was not found"
        # A proxy from the environment has no business between us and ourselves.
        options = [("grpc.enable_http_proxy", 0)]
        with grpc.insecure_channel(f"127.0.0.1:{port}", options=options) as channel:
            hot = channel.unary_unary(path, None, None)
            if hot(b"headrace", timeout=_SELF_CHECK_S) != b"headrace":
                return "an echo came back changed"
            if hot.future(b"no deadline").result(timeout=_SELF_CHECK_S) != b"inf":
                return "a call without a deadline has one"
            if hot.future(b"refuse", timeout=_SELF_CHECK_S).code() is not grpc.StatusCode.ABORTED:
                return "a refusal came back changed"
            leaving = hot.future(b"hold", timeout=_SELF_CHECK_S)
            if not _soon(lambda: bool(held)):
                return "a call did not arrive"
            leaving.cancel()  # type: ignore[no-untyped-call]
            if not _soon(lambda: held[0].gone):
                return "a caller who left was not noticed"
            held[0].reply(b"too late")
        if not _soon(lambda: not ingress.open_calls):
            return "calls do not end"
        return None if ingress.is_alive else "the loop thread died"
    finally:
        server.stop(grace=0).wait(_SELF_CHECK_S)
        ingress.end()


def _soon(condition: Callable[[], bool]) -> bool:
    deadline_s = time.monotonic() + _SELF_CHECK_S
    while not condition():
        if time.monotonic() > deadline_s:
            return False
        time.sleep(0.001)
    return True
