"""One HTTP/2 connection on which requests are made and answers are read, without a gRPC library.

It knows just as much of the protocol as a load generator needs: requests fit one DATA frame, the
server's limits on streams and bytes are kept, answers are read as they are.

Source: RFC 9113 (frames, flow control, concurrency), gRPC over HTTP/2 ("Responses", "Errors").
"""

import math
import socket
import struct
import time
from collections import deque
from collections.abc import Sequence
from itertools import islice

import frames
from answers import Answers
from frames import DATA, END_HEADERS, END_STREAM, HEAD_BYTES, HEADERS
from header_blocks import HeaderBlocks
from record import OK, Record
from trailers import UNKNOWN, TrailerReader

RECEIVE_BYTES = 1 << 18
REFILL_BYTES = 1 << 29
WAITED_S = 0.001
"""Of a shorter wait the server is not told: it would be longer headers for all."""

_ENDS = (END_HEADERS, END_HEADERS | END_STREAM)

# gRPC over HTTP/2, "Errors"; all others are INTERNAL.
_CANCELLED, _DEADLINE_EXCEEDED, _INTERNAL = 1, 4, 13
_RESET_BY_CANCEL = -1
_STATUS_OF_RESET = {7: 14, 8: _RESET_BY_CANCEL, 11: 8}
"""
REFUSED_STREAM is UNAVAILABLE, ENHANCE_YOUR_CALM is RESOURCE_EXHAUSTED; CANCEL is CANCELLED, or
DEADLINE_EXCEEDED once the call's time is over.
"""


class Connection:
    """
    Sends requests in their turn, and notes in a record what becomes of them.

    A request that the server's limits do not allow waits for its turn. Request `number` has body
    `number % len(bodies)`.

    Args:
        port: On loopback.
        headers: Of every request.
        bodies: With gRPC's prefix.
        record: Of all connections.
        answers: Judges messages; None to take any.
        timeout_s: A request that has waited so long is not sent any more, and of one that has
            waited a while the server is told how much time is left.
        stall_s: Longest that the server may take to accept bytes, or to begin.

    Attributes:
        is_refilled: Whether every request that ends is followed by a new one (a closed loop).
        not_whole: Requests that were answered OK without exactly one whole message.

    Raises:
        ConnectionError: there is no server, or none that speaks HTTP/2.
        ValueError: a body does not fit a frame.
    """

    def __init__(
        self,
        port: int,
        headers: HeaderBlocks,
        bodies: Sequence[bytes],
        record: Record,
        *,
        answers: Answers | None = None,
        timeout_s: float | None = None,
        stall_s: float = 5.0,
    ) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=stall_s)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.is_refilled = False
        self.not_whole: list[int] = []
        self._header_blocks = headers
        self._headers = headers.first
        self._bodies = bodies
        self._record = record
        self._answers = answers
        self._timeout_s = timeout_s
        self._trailers = TrailerReader()
        self._waiting: deque[int] = deque()
        self._open: dict[int, int] = {}  # by stream
        self._messages: dict[int, bytes] = {}  # likewise: what came of each
        self._next_stream = 1
        self._credit = frames.DEFAULT_WINDOW
        self._streams_max = frames.LAST_STREAM
        self._frame_max = frames.DEFAULT_FRAME_SIZE
        self._stream_window = frames.DEFAULT_WINDOW
        self._consumed = 0
        self._received = b""
        self._has_settings = False
        try:
            self._greet()
        except BaseException:
            self.socket.close()
            raise

    @property
    def unfinished(self) -> int:
        """Requests that wait or are open."""
        return len(self._waiting) + len(self._open)

    def send(self, numbers: Sequence[int], now_s: float) -> None:
        """Send these requests, behind those that wait: as many as the server allows."""
        waiting = self._waiting
        waiting.extend(numbers)
        record, bodies, opened = self._record, self._bodies, self._open
        out = []
        while waiting and len(opened) < self._streams_max:
            number = waiting[0]
            headers = self._headers
            if self._timeout_s is not None and now_s - record.due_s[number] > WAITED_S:
                left_s = self._timeout_s - (now_s - record.due_s[number])
                if left_s <= 0:
                    waiting.popleft()
                    continue
                if headers is not self._header_blocks.first:
                    headers = self._header_blocks.with_timeout(left_s)
            body = bodies[number % len(bodies)]
            if self._credit < len(body):
                break
            waiting.popleft()
            stream = self._next_stream
            stream_bytes = struct.pack(">I", stream)
            out.append(frames.head(len(headers), HEADERS, END_HEADERS) + stream_bytes)
            out.append(headers)
            out.append(frames.head(len(body), DATA, END_STREAM) + stream_bytes)
            out.append(body)
            self._credit -= len(body)
            record.sent_s[number] = now_s
            opened[stream] = number
            self._next_stream = stream + 2
            self._headers = self._header_blocks.next
        if out:
            self.socket.sendall(b"".join(out))
        if waiting:
            for number in islice(reversed(waiting), min(len(waiting), len(numbers))):
                record.held[number] = 1

    def receive(self) -> None:
        """Take what has come; go on with those that wait."""
        finished = self._take(self.socket.recv(RECEIVE_BYTES))
        now_s = time.perf_counter()
        record = self._record
        for number, status in finished:
            record.done_s[number] = now_s
            if status == _RESET_BY_CANCEL:
                is_over = now_s - record.sent_s[number] >= (self._timeout_s or math.inf)
                status = _DEADLINE_EXCEEDED if is_over else _CANCELLED  # noqa: PLW2901
            record.statuses[number] = status
        if self.is_refilled:
            self.send([record.add(now_s) for _ in finished], now_s)
        elif self._waiting:
            self.send((), now_s)

    def _greet(self) -> None:
        """Begin, and wait for the server's limits."""
        self.socket.sendall(
            frames.PREFACE
            + frames.frame(
                frames.SETTINGS,
                0,
                0,
                frames.settings({frames.INITIAL_WINDOW_SIZE: frames.WINDOW_MAX}),
            )
            + self._window_update(frames.WINDOW_MAX - frames.DEFAULT_WINDOW)
        )
        while not self._has_settings:
            self._take(self.socket.recv(RECEIVE_BYTES))
        longest, most = max(map(len, self._bodies)), min(self._frame_max, self._stream_window)
        if longest > most:
            raise ValueError(f"a body of {longest} bytes; this server takes {most} in a frame")

    def _take(self, more: bytes) -> list[tuple[int, int]]:
        """Read frames; return the requests that ended, with their statuses."""
        if not more:
            raise ConnectionError("the server closed the connection")
        data = self._received + more if self._received else more
        messages, trailers = self._messages, self._trailers
        finished = []
        start, end = 0, len(data)
        while end - start >= HEAD_BYTES:
            stop = start + HEAD_BYTES + int.from_bytes(data[start : start + 3], "big")
            if stop > end:
                break
            kind, flags = data[start + 3], data[start + 4]
            stream = int.from_bytes(data[start + 5 : start + 9], "big")
            payload = data[start + HEAD_BYTES : stop]
            start = stop
            if kind == HEADERS:
                if flags not in _ENDS:
                    raise ValueError(f"a HEADERS frame with flags {flags:#x}")
                status = trailers.status(payload)
                if flags & END_STREAM:
                    self._finish(stream, UNKNOWN if status is None else status, finished)
            elif kind == DATA:
                messages[stream] = messages[stream] + payload if stream in messages else payload
                self._consumed += len(payload)
            else:
                self._control(kind, flags, stream, payload, finished)
        self._received = data[start:]
        if self._consumed > REFILL_BYTES:
            self.socket.sendall(self._window_update(self._consumed))
            self._consumed = 0
        return finished

    def _finish(self, stream: int, status: int, finished: list[tuple[int, int]]) -> None:
        number = self._open.pop(stream, None)
        message = self._messages.pop(stream, b"")
        if number is None:  # a reset of a stream that had ended
            return
        finished.append((number, status))
        if status == OK:
            if len(message) < 5 or int.from_bytes(message[1:5], "big") != len(message) - 5:
                self.not_whole.append(number)
            elif self._answers is not None:
                self._answers.check(number, message[5:])

    def _control(
        self, kind: int, flags: int, stream: int, payload: bytes, finished: list[tuple[int, int]]
    ) -> None:
        if kind == frames.WINDOW_UPDATE:
            if stream == 0:
                self._credit += int.from_bytes(payload, "big")
        elif kind == frames.PING and not flags & frames.ACK:
            self.socket.sendall(frames.frame(frames.PING, frames.ACK, 0, payload))
        elif kind == frames.SETTINGS and not flags & frames.ACK:
            self._obey(frames.read_settings(payload))
            self.socket.sendall(frames.frame(frames.SETTINGS, frames.ACK, 0))
        elif kind == frames.RST_STREAM:
            code = int.from_bytes(payload, "big")
            self._finish(stream, _STATUS_OF_RESET.get(code, _INTERNAL), finished)
        elif kind == frames.GOAWAY:
            raise ConnectionError("the server sent GOAWAY")

    def _obey(self, limits: dict[int, int]) -> None:
        self._has_settings = True
        self._streams_max = limits.get(frames.MAX_CONCURRENT_STREAMS, self._streams_max)
        self._frame_max = limits.get(frames.MAX_FRAME_SIZE, self._frame_max)
        self._stream_window = limits.get(frames.INITIAL_WINDOW_SIZE, self._stream_window)

    @staticmethod
    def _window_update(more: int) -> bytes:
        return frames.frame(frames.WINDOW_UPDATE, 0, 0, struct.pack(">I", more))
