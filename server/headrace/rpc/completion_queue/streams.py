"""Streams on grpcio's own loop thread: any number of them on one thread.

A stream is one call with a `ReceiveMessage` under way while it may take more, one `SendMessage`
under way while there is something to send, and a `ReceiveCloseOnServer` from its beginning to its
end, so that a caller who leaves is noticed at once.
"""

import math
import threading
import time
from collections.abc import Sequence
from typing import Any

import grpc
import structlog

from headrace.errors import Overloaded
from headrace.rpc.completion_queue.core import FAR_FUTURE_S, NO_STATE, Taker, cancel, cygrpc
from headrace.rpc.exchange import Exchange
from headrace.rpc.ingress import STALLED_S, HotStream, Metadata
from headrace.rpc.status import Status, status_of
from headrace.rpc.stream_message import StreamMessage

_LOG = structlog.get_logger(__name__)

STREAMS_MAX = 4_096
"""Open at once; one more is refused with RESOURCE_EXHAUSTED. An idle one costs 20 KiB."""

_OK = Status(grpc.StatusCode.OK, "")
_INTERNAL = Status(grpc.StatusCode.INTERNAL, "internal error")
_TOO_MANY = f"{STREAMS_MAX} streams are already open at this server"


class Streams:
    """
    The open streams of an ingress. Any thread may call.

    Args:
        server: Kept alive as long as any stream.
    """

    def __init__(self, server: grpc.Server) -> None:
        self._server = server
        self._state: Any = server._state  # type: ignore[attr-defined]
        self._lock = threading.Lock()
        self._open: set[_Stream] = set()
        self.refusal: Status | None = None
        """With which new streams are answered; None while they are welcome."""

    def taker(self, method: HotStream) -> Taker:
        """Return what asks for the streams of one method."""
        return _StreamTaker(self, self._state, method)

    def drain(self, status: Status) -> None:
        """Refuse new streams; end each open one when the messages that it took are answered."""
        self.refusal = status
        for stream in self._all():
            stream.end(status)

    @property
    def messages_under_way(self) -> int:
        """Messages that are not answered yet, or whose answers a reader is still taking."""
        now_s = time.perf_counter()
        return sum([stream.messages_under_way(now_s) for stream in self._all()])

    def __len__(self) -> int:
        return len(self._open)

    def add(self, stream: "_Stream") -> None:
        """Count a stream that begins."""
        with self._lock:
            self._open.add(stream)

    def discard(self, stream: "_Stream") -> None:
        """Count it no more."""
        with self._lock:
            self._open.discard(stream)

    def _all(self) -> "Sequence[_Stream]":
        with self._lock:
            return list(self._open)


class _StreamTaker(Taker):
    """Asks C-core for streams of one method and begins each."""

    __slots__ = ("_method", "_streams")

    def __init__(self, streams: Streams, state: Any, method: HotStream) -> None:
        super().__init__(state, method.path)
        self._streams = streams
        self._method = method

    def on_call(self, event: Any) -> Any:
        if not event.success:  # the server stops: outstanding requests come back
            return NO_STATE
        try:
            self.ask()
            stream = _Stream(self._streams, event)
            if len(self._streams) >= STREAMS_MAX:
                stream.turn_away(status_of(Overloaded(_TOO_MANY)))
            elif self._streams.refusal is not None:
                stream.turn_away(self._streams.refusal)
            else:
                stream.begin(self._method)
        except Exception:
            _LOG.exception("ingress_failed", where="on_stream")
            cancel(event.call)
        return NO_STATE


class _Stream:
    """One stream. Its tags run on the loop thread, its answers come from any."""

    __slots__ = (
        "_accept",
        "_call",
        "_event",
        "_exchange",
        "_is_over",
        "_is_receiving",
        "_last",
        "_lock",
        "_progress_s",
        "_streams",
        "_unanswered",
        "deadline_s",
        "gone",
    )

    def __init__(self, streams: Streams, event: Any) -> None:
        self._streams = streams
        self._call = event.call
        self._event = event
        deadline_s = event.call_details.deadline
        self.deadline_s = deadline_s if deadline_s < FAR_FUTURE_S else math.inf
        self.gone = False
        self._lock = threading.Lock()
        self._exchange = Exchange()
        self._unanswered: set[StreamMessage] = set()
        self._last: Status | None = None  # with which it ends when everything is answered
        self._is_over = False  # its status is on its way, or nobody would hear it
        self._is_receiving = False
        self._progress_s = 0.0

    @property
    def metadata(self) -> Metadata:
        return self._event.invocation_metadata  # type: ignore[no-any-return]

    def turn_away(self, status: Status) -> None:
        """End it before it has begun."""
        self._is_over = True
        operations = (
            cygrpc.ReceiveCloseOnServerOperation(0),
            cygrpc.SendInitialMetadataOperation(None, 0),
            _status_operation(status),
        )
        self._start(operations, self._on_status, "turn away")

    def begin(self, method: HotStream) -> None:
        self._streams.add(self)
        close = (cygrpc.ReceiveCloseOnServerOperation(0),)
        if not self._start(close, self._on_close, "watch"):
            self._streams.discard(self)  # its close would have done so
            return
        self._accept = method.begin(self.metadata)
        self._is_receiving = True
        first = (
            cygrpc.SendInitialMetadataOperation(None, 0),
            cygrpc.ReceiveMessageOperation(0),
        )
        self._start(first, self._on_message, "begin")
        refusal = self._streams.refusal
        if refusal is not None:  # said while this one was not yet among those that were told
            self.end(refusal)

    def answer(self, message: StreamMessage, answer: bytes) -> None:
        with self._lock:
            if not self._settle(message) or self._is_over:
                return
            self._exchange.answer(message.size, answer)
            going = self._exchange.take()
            if going is not None:
                self._progress_s = time.perf_counter()
        if going is not None:
            self._send(going)

    def refuse(self, message: StreamMessage, status: Status) -> None:
        with self._lock:
            if not self._settle(message):
                return
        self._end_early(status)

    def end(self, status: Status) -> None:
        """Take no more messages, and end when those that were taken are answered."""
        with self._lock:
            if self._last is None:
                self._last = status
        self._end_if_settled()

    def messages_under_way(self, now_s: float) -> int:
        with self._lock:
            exchange = self._exchange
            if exchange.is_sending and now_s - self._progress_s > STALLED_S:
                return exchange.unanswered
            return exchange.under_way

    def _on_message(self, event: Any) -> Any:
        try:
            self._is_receiving = False
            message = event.batch_operations[-1].message()
            if message is not None:
                self._take(message)
            elif event.success:  # the caller sends no more
                self.end(_OK)
            # Else it has left, or sent too much: the close says so.
        except Exception:
            _LOG.exception("ingress_failed", where="on_stream_message")
            self._end_internal()
        return NO_STATE

    def _take(self, message: bytes) -> None:
        call = StreamMessage(self, len(message))
        with self._lock:
            if self._last is not None or self._is_over:
                return  # it came too late; the status tells its sender
            self._exchange.accept(len(message))
            self._unanswered.add(call)
        self._accept(call, message)
        self._receive()

    def _settle(self, message: StreamMessage) -> bool:
        self._unanswered.discard(message)
        return message.settle()

    def _receive(self) -> None:
        """Ask for the next message if there is room; on the loop thread only."""
        with self._lock:
            if (
                self._is_receiving
                or self._is_over
                or self._last is not None
                or not self._exchange.has_room
            ):
                return
            self._is_receiving = True
        self._start((cygrpc.ReceiveMessageOperation(0),), self._on_message, "receive")

    def _send(self, answer: bytes) -> None:
        self._start((cygrpc.SendMessageOperation(answer, 0),), self._on_sent, "send")

    def _on_sent(self, _event: Any) -> Any:
        # Whether it was sent: an answer that was not is followed by the close.
        try:
            with self._lock:
                self._exchange.sent()
                going = None if self._is_over else self._exchange.take()
                self._progress_s = time.perf_counter()
            if going is not None:
                self._send(going)
            else:
                self._end_if_settled()
            self._receive()
        except Exception:
            _LOG.exception("ingress_failed", where="on_stream_sent")
            self._end_internal()
        return NO_STATE

    def _end_if_settled(self) -> None:
        with self._lock:
            last = self._last
            if last is None or self._is_over or self._exchange.under_way:
                return
            self._is_over = True
        self._start((_status_operation(last),), self._on_status, "end")

    def _on_status(self, _event: Any) -> Any:
        return NO_STATE

    def _on_close(self, _event: Any) -> Any:
        try:
            self.gone = True  # or it was ended: either way nobody hears an answer
            with self._lock:
                self._is_over = True
                self._exchange.close()
                left, self._unanswered = self._unanswered, set()
            self._streams.discard(self)
            for message in left:
                message.leave()
        except Exception:
            _LOG.exception("ingress_failed", where="on_stream_close")
        return NO_STATE

    def _start(self, operations: tuple[Any, ...], tag: Any, what: str) -> bool:
        """Start a batch; a call for which that fails is ended, and its close tidies up."""
        try:
            error = self._call.start_server_batch(operations, tag)
        except Exception as raised:
            error = repr(raised)
        if error:
            with self._lock:
                self._is_over = True
            _LOG.error("stream_failed", where=what, error=error)
            cancel(self._call)
        return not error

    def _end_early(self, status: Status) -> None:
        """Leave unanswered what is; send the answers that were given, then the status."""
        with self._lock:
            if self._exchange.is_closed:
                return
            self._last = status
            self._exchange.close(drop_answers=False)
        self._end_if_settled()

    def _end_internal(self) -> None:
        try:
            self._end_early(_INTERNAL)
        except Exception:
            _LOG.exception("ingress_failed", where="end_stream")


def _status_operation(status: Status) -> Any:
    code = status.code.value[0]
    return cygrpc.SendStatusFromServerOperation(status.trailing, code, status.details, 0)
