"""Hot calls through grpcio's public API: one pool thread waits for each call's answer.

Slower than the completion queue and with nothing private in it; what the server falls back to when
an installed grpcio does not have the private names.
"""

import threading
import time
from collections.abc import Callable, Sequence
from concurrent import futures

import grpc
import structlog

from headrace.rpc.ingress import HotMethod, HotStream, Metadata
from headrace.rpc.status import Status
from headrace.rpc.thread_streams import AbortStatus, ThreadStreams, deadline_of, metadata_of

_LOG = structlog.get_logger(__name__)

CALL_THREADS = 256
"""Each open call holds one; more calls wait for a thread inside grpcio."""


class ThreadIngress:
    """
    Registers the hot methods as ordinary handlers, with raw bytes in and out.

    Args:
        server: Not started yet.
        methods: Must not be registered with the server as well.
        streams: Likewise.
    """

    name = "threads"

    def __init__(
        self,
        server: grpc.Server,
        methods: Sequence[HotMethod],
        streams: Sequence[HotStream] = (),
    ) -> None:
        self._refusal: Status | None = None
        self._lock = threading.Lock()
        self._open = 0
        # A pool of its own: calls that wait for their batch must not starve health checks.
        self._pool = futures.ThreadPoolExecutor(CALL_THREADS, thread_name_prefix="hot-call")
        services: dict[str, dict[str, grpc.RpcMethodHandler[bytes, bytes]]] = {}
        for method in methods:
            service, name = method.path.strip("/").split("/")
            behaviour = self._behaviour(method)
            behaviour.experimental_thread_pool = self._pool  # type: ignore[attr-defined]
            services.setdefault(service, {})[name] = grpc.unary_unary_rpc_method_handler(behaviour)
        self._streams = ThreadStreams()
        for stream in streams:
            service, name = stream.path.strip("/").split("/")
            services.setdefault(service, {})[name] = self._streams.handler(stream)
        server.add_generic_rpc_handlers(
            tuple(
                grpc.method_handlers_generic_handler(service, handlers)
                for service, handlers in services.items()
            )
        )

    def begin(self) -> None:
        """Do nothing: the server hands calls over by itself."""

    def refuse_new(self, status: Status) -> None:
        """Answer new calls with `status`; end streams with it once they are answered."""
        self._refusal = status
        self._streams.drain(status)

    def end(self) -> None:
        """End the pool's threads, once their calls have ended."""
        self._pool.shutdown(wait=False)
        self._streams.shutdown()

    @property
    def open_calls(self) -> int:
        """Calls that have not ended yet, and messages of streams."""
        return self._open + self._streams.messages_under_way

    @property
    def open_streams(self) -> int:
        """Streams that have not ended yet."""
        return len(self._streams)

    @property
    def is_alive(self) -> bool:
        """Always: grpcio's handlers catch what is raised in them."""
        return True

    def _behaviour(self, method: HotMethod) -> Callable[[bytes, grpc.ServicerContext], bytes]:
        def behave(message: bytes, context: grpc.ServicerContext) -> bytes:
            with self._lock:
                self._open += 1
            try:
                call = _Call(context)
                if self._refusal is not None:
                    call.refuse(self._refusal)
                else:
                    _accept(method, call, message)
                    call.accepted()
                return call.finish()
            finally:
                with self._lock:
                    self._open -= 1

        return behave


def _accept(method: HotMethod, call: "_Call", message: bytes) -> None:
    try:
        refusal = None if method.glance is None else method.glance(call)
        if refusal is None:
            method.accept(call, message)
        else:
            call.refuse(refusal)
    except Exception:
        _LOG.exception("ingress_failed", where="accept")
        call.refuse(Status(grpc.StatusCode.INTERNAL, "internal error"))


class _Call:
    """One hot call; see `HotCall`. Its pool thread sleeps in `finish` until somebody answers."""

    def __init__(self, context: grpc.ServicerContext) -> None:
        self.arrival_s = time.perf_counter()
        self._context: grpc.ServicerContext | None = context
        self._lock = threading.Lock()
        self._answered = threading.Event()
        self._answer: bytes | Status = b""
        self._is_accepted = False
        self.gone = False
        self.deadline_s = deadline_of(context)
        self.on_gone: Callable[[], None] | None = None
        if not context.add_callback(self._left):
            self._left()

    @property
    def metadata(self) -> Metadata:
        assert self._context is not None
        return metadata_of(self._context)

    def reply(self, message: bytes) -> None:
        self._end(message)

    def refuse(self, status: Status) -> None:
        self._end(status)

    def accepted(self) -> None:
        """Say that `accept` has returned: whatever queue the call is in, it can leave now."""
        with self._lock:
            self._is_accepted = True
            has_left = self.gone
        if has_left:
            self._call_on_gone()

    def finish(self) -> bytes:
        self._answered.wait()  # ends when somebody answers, and when the call itself ends
        context, self._context = self._context, None  # it keeps a stream of the connection
        assert context is not None
        if isinstance(self._answer, bytes):
            return self._answer
        context.abort_with_status(AbortStatus(self._answer))
        raise AssertionError("abort returned")

    def _end(self, answer: bytes | Status) -> None:
        with self._lock:
            if not self._answered.is_set():
                self._answer = answer
                self.on_gone = None
                self._answered.set()

    def _left(self) -> None:
        with self._lock:
            self.gone = True
            self._answered.set()  # nobody hears it: the pool thread is free again
            may_leave = self._is_accepted
        if may_leave:
            self._call_on_gone()

    def _call_on_gone(self) -> None:
        on_gone, self.on_gone = self.on_gone, None
        if on_gone is not None:
            on_gone()
