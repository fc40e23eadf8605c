"""Streams through grpcio's public API: two pool threads each, one to read and one to write."""

import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures

import grpc
import structlog

from headrace.errors import Overloaded
from headrace.rpc.exchange import Exchange
from headrace.rpc.ingress import STALLED_S, Accept, HotStream, Metadata
from headrace.rpc.status import Status, status_of
from headrace.rpc.stream_message import StreamMessage

_LOG = structlog.get_logger(__name__)

STREAMS_MAX = 256
"""Open at once, with two threads each; one more is refused with RESOURCE_EXHAUSTED."""

_SPARE_THREADS = 8
"""To refuse with, when all others have a stream."""

_NO_DEADLINE_S = 1e9
_OK = Status(grpc.StatusCode.OK, "")
_INTERNAL = Status(grpc.StatusCode.INTERNAL, "internal error")
_TOO_MANY = f"{STREAMS_MAX} streams are already open at this server"

StreamHandler = Callable[[Iterator[bytes], grpc.ServicerContext], Iterator[bytes]]


class ThreadStreams:
    """The open streams of a server. Their threads are their own: they starve no other call."""

    def __init__(self) -> None:
        self._writers = futures.ThreadPoolExecutor(
            STREAMS_MAX + _SPARE_THREADS, thread_name_prefix="stream-writer"
        )
        self._readers = futures.ThreadPoolExecutor(STREAMS_MAX, thread_name_prefix="stream-reader")
        self._lock = threading.Lock()
        self._open: set[_Stream] = set()
        self._refusal: Status | None = None

    def handler(self, method: HotStream) -> "grpc.RpcMethodHandler[bytes, bytes]":
        """Return what grpcio calls for a method's streams."""

        def behave(requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
            stream = _Stream(context)
            refusal = self._admit(stream)
            if refusal is not None:
                context.abort_with_status(AbortStatus(refusal))
            if not context.add_callback(lambda: self._ended(stream)):
                self._ended(stream)
            try:
                context.send_initial_metadata(())
                self._readers.submit(stream.read, requests, method)
                yield from stream.answers()
            finally:  # grpcio says so itself a moment later
                self._ended(stream)

        behave.experimental_thread_pool = self._writers  # type: ignore[attr-defined]
        return grpc.stream_stream_rpc_method_handler(behave)

    def drain(self, status: Status) -> None:
        """Refuse new streams; end each open one when the messages that it took are answered."""
        with self._lock:
            self._refusal = status
        for stream in self._all():
            stream.end(status)

    def shutdown(self) -> None:
        """End the threads, once their streams have ended."""
        self._writers.shutdown(wait=False)
        self._readers.shutdown(wait=False)

    @property
    def messages_under_way(self) -> int:
        """Messages that are not answered yet, or whose answers a reader is still taking."""
        now_s = time.perf_counter()
        return sum([stream.messages_under_way(now_s) for stream in self._all()])

    def __len__(self) -> int:
        return len(self._open)

    def _admit(self, stream: "_Stream") -> Status | None:
        with self._lock:
            if self._refusal is not None:
                return self._refusal
            if len(self._open) < STREAMS_MAX:
                self._open.add(stream)
                return None
        return status_of(Overloaded(_TOO_MANY))

    def _ended(self, stream: "_Stream") -> None:
        stream.left()
        with self._lock:
            self._open.discard(stream)

    def _all(self) -> "Sequence[_Stream]":
        with self._lock:
            return list(self._open)


class _Stream:
    """One stream: its reader takes messages, its writer sleeps until there is an answer to send."""

    def __init__(self, context: grpc.ServicerContext) -> None:
        self._context = context
        self._changed = threading.Condition()
        self._exchange = Exchange()
        self._unanswered: set[StreamMessage] = set()
        self._last: Status | None = None  # with which it ends when everything is answered
        self._progress_s = 0.0
        self.gone = False
        self.deadline_s = deadline_of(context)

    @property
    def metadata(self) -> Metadata:
        return metadata_of(self._context)

    def read(self, requests: Iterator[bytes], method: HotStream) -> None:
        """Take messages while there is room. The reader's whole life."""
        try:
            accept = method.begin(self.metadata)
            while self._wait_for_room():
                message = self._next_message(requests)
                if message is None:
                    self.end(_OK)
                    return
                self._take(message, accept)
        except Exception:
            _LOG.exception("ingress_failed", where="accept")
            self._end_early(_INTERNAL)

    def answers(self) -> Iterator[bytes]:
        """Yield answers in the order in which they are given; grpcio resumes once one is sent."""
        while (answer := self._next_answer()) is not None:
            yield answer
            with self._changed:
                self._exchange.sent()
                self._progress_s = time.perf_counter()
                self._changed.notify_all()
        last = self._last
        if last is not None and last is not _OK and not self.gone:
            self._context.abort_with_status(AbortStatus(last))

    def answer(self, message: StreamMessage, answer: bytes) -> None:
        with self._changed:
            if not self._settle(message):
                return
            self._exchange.answer(message.size, answer)
            self._changed.notify_all()

    def refuse(self, message: StreamMessage, status: Status) -> None:
        with self._changed:
            if not self._settle(message):
                return
        self._end_early(status)

    def end(self, status: Status) -> None:
        """Take no more messages, and end when those that were taken are answered."""
        with self._changed:
            if self._last is None:
                self._last = status
            self._changed.notify_all()

    def left(self) -> None:
        """Say that the call is over: its caller left, or it was ended."""
        with self._changed:
            self.gone = True
            self._exchange.close()
            left, self._unanswered = self._unanswered, set()
            self._changed.notify_all()
        for message in left:
            message.leave()

    def messages_under_way(self, now_s: float) -> int:
        with self._changed:
            exchange = self._exchange
            if exchange.is_sending and now_s - self._progress_s > STALLED_S:
                return exchange.unanswered
            return exchange.under_way

    def _wait_for_room(self) -> bool:
        with self._changed:
            while not self.gone and self._last is None:
                if self._exchange.has_room:
                    return True
                self._changed.wait()  # ends when the transport takes an answer, or with the call
            return False

    def _next_message(self, requests: Iterator[bytes]) -> bytes | None:
        try:
            return next(requests, None)
        except Exception:  # the call is over, and grpcio says so with an exception of its own
            return None

    def _take(self, message: bytes, accept: Accept) -> None:
        with self._changed:
            if self._last is not None or self.gone:
                return  # it came too late; the status tells its sender
            self._exchange.accept(len(message))
        call = StreamMessage(self, len(message))
        accept(call, message)
        # Only now: until it is in a queue it cannot leave it.
        with self._changed:
            has_left = self.gone
            if not has_left and not call.is_answered:
                self._unanswered.add(call)
        if has_left:
            call.leave()

    def _settle(self, message: StreamMessage) -> bool:
        self._unanswered.discard(message)
        return message.settle()

    def _next_answer(self) -> bytes | None:
        with self._changed:
            while not self.gone:
                answer = self._exchange.take()
                if answer is not None:
                    self._progress_s = time.perf_counter()
                    return answer
                if self._last is not None and not self._exchange.under_way:
                    return None
                self._changed.wait()  # ends when somebody answers, and when the call itself ends
            return None

    def _end_early(self, status: Status) -> None:
        """Leave unanswered what is; send the answers that were given, then the status."""
        with self._changed:
            if not self._exchange.is_closed:
                self._last = status
                self._exchange.close(drop_answers=False)
                self._changed.notify_all()


class AbortStatus(grpc.Status):
    """A status in the shape that `abort_with_status` takes."""

    def __init__(self, status: Status) -> None:
        self.code = status.code
        self.details = status.details
        self.trailing_metadata = status.trailing


def deadline_of(context: grpc.ServicerContext) -> float:
    """Return when a call's time is over, in Unix seconds; infinite for one without a deadline."""
    remaining_s = context.time_remaining()
    # For a call without a deadline it is None or centuries, depending on grpcio.
    if remaining_s is None or remaining_s >= _NO_DEADLINE_S:
        return math.inf
    return time.time() + remaining_s


def metadata_of(context: grpc.ServicerContext) -> Metadata:
    """Return what the caller sent besides messages."""
    return [(key, value) for key, value in context.invocation_metadata()]
