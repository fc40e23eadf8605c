"""A gRPC load generator on bare HTTP/2 frames: each request with a body of its own.

    python http2.py --port 8500 --path /package.Service/Method --bodies FILE [--connections 4]
        [--in-flight 16] [--seconds 3] [--warm-up 1] [--rate 200]

A closed loop, unless a rate is given: then requests are sent when they are due, whether the others
have been answered or not, and latencies count from when they were due. One that the server's window
does not allow waits for it; those that are open at the end are waited for, and what is not answered
even then counts with its age.

h2load is faster and sends one body only, which would let a server that merges equal entities cheat.
This one keeps up with every server here, without a gRPC library in the way. It knows just as
much of the protocol as it needs: requests fit one DATA frame, header blocks are indexed after the
first one, as every gRPC client has them, and those of answers are not read. An answer is a success
if its stream carried a message and was closed by trailers; gRPC sends no message with an error.

Source: RFC 9113 (frames, flow control), RFC 7541 (literals with incremental indexing, indexed
fields), gRPC over HTTP/2.
"""

import argparse
import json
import selectors
import socket
import struct
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
END_STREAM, END_HEADERS, ACK = 0x1, 0x4, 0x1
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
WINDOW = 2**31 - 1
DEFAULT_WINDOW = 65_535
STALL_S = 5.0


@dataclass(slots=True)
class Results:
    """What the measured seconds saw."""

    requests: int = 0
    errors: int = 0
    latencies_s: list[float] = field(default_factory=list)


class Connection:
    """One HTTP/2 connection with a number of requests in flight."""

    def __init__(
        self,
        port: int,
        path: str,
        bodies: Sequence[bytes],
        in_flight: int,
        results: Results,
        *,
        is_paced: bool = False,
    ) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=STALL_S)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._headers = _header_block(path)
        self._bodies = bodies
        self._results = results
        self._next_body = id(self) % len(bodies)
        self._next_stream = 1
        self._is_paced = is_paced
        self._unsent = 0 if is_paced else in_flight
        self._due: deque[float] = deque()
        self._sent_at: dict[int, float] = {}
        self._answered: set[int] = set()
        self._credit = DEFAULT_WINDOW
        self._received = b""
        self.counting = False
        settings = struct.pack(">HI", 4, WINDOW)  # INITIAL_WINDOW_SIZE
        self.socket.sendall(
            PREFACE
            + _frame(SETTINGS, 0, 0, settings)
            + _frame(WINDOW_UPDATE, 0, 0, struct.pack(">I", WINDOW - DEFAULT_WINDOW))
        )
        self.send()

    def add_due(self, due_s: float) -> None:
        """Send a request that is due, as soon as the window allows."""
        self._due.append(due_s)
        self._unsent += 1
        self.send()

    def send(self) -> None:
        """Start as many requests as are due and the server's window allows."""
        out = []
        now_s = time.perf_counter()
        while self._unsent:
            body = self._bodies[self._next_body]
            if self._credit < len(body):
                break
            stream = self._next_stream
            stream_bytes = struct.pack(">I", stream)
            out.append(_head(len(self._headers), HEADERS, END_HEADERS) + stream_bytes)
            out.append(self._headers)
            out.append(_head(len(body), DATA, END_STREAM) + stream_bytes)
            out.append(body)
            self._credit -= len(body)
            self._sent_at[stream] = self._due.popleft() if self._is_paced else now_s
            self._next_stream += 2
            self._next_body = (self._next_body + 1) % len(self._bodies)
            self._unsent -= 1
            self._headers = _INDEXED_HEADERS
        if out:
            self.socket.sendall(b"".join(out))

    def receive(self) -> None:
        """Take what has come, and replace each finished request."""
        data = self._received + self.socket.recv(1 << 18)
        if len(data) == len(self._received):
            raise ConnectionError("the server closed the connection")
        position, end = 0, len(data)
        while end - position >= 9:
            length = int.from_bytes(data[position : position + 3], "big")
            if end - position < 9 + length:
                break
            kind, flags = data[position + 3], data[position + 4]
            stream = int.from_bytes(data[position + 5 : position + 9], "big")
            position += 9 + length
            if kind == HEADERS:
                if flags & END_STREAM:
                    self._finish(stream)
            elif kind == DATA:
                if length > 5:
                    self._answered.add(stream)
            else:
                self._control(kind, flags, stream, data[position - length : position])
        self._received = data[position:]
        self.send()

    @property
    def open_since_s(self) -> list[float]:
        """When the requests that are not answered yet were due, unsent ones included."""
        return [*self._sent_at.values(), *self._due]

    def _finish(self, stream: int) -> None:
        sent_s = self._sent_at.pop(stream)
        self._unsent += not self._is_paced
        is_answer = stream in self._answered
        self._answered.discard(stream)
        if self.counting:
            self._results.requests += 1
            self._results.errors += not is_answer
            self._results.latencies_s.append(time.perf_counter() - sent_s)

    def _control(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        if kind == WINDOW_UPDATE:
            if stream == 0:
                self._credit += int.from_bytes(payload, "big")
        elif kind == PING and not flags & ACK:
            self.socket.sendall(_frame(PING, ACK, 0, payload))
        elif kind == SETTINGS and not flags & ACK:
            self.socket.sendall(_frame(SETTINGS, ACK, 0, b""))
        elif kind == RST_STREAM:
            if stream in self._sent_at:
                self._finish(stream)
        elif kind == GOAWAY:
            raise ConnectionError("the server sent GOAWAY")


def run(
    port: int,
    path: str,
    bodies: Sequence[bytes],
    *,
    connections: int,
    in_flight: int,
    warm_up_s: float,
    seconds: float,
    rate_per_s: float | None = None,
) -> dict[str, float]:
    """
    Keep `connections` x `in_flight` requests in flight, or send `rate_per_s` evenly.

    Returns:
        `requests`, `requests_per_s`, `errors`, `mean_ms`, `p50_ms`, `p99_ms` of the seconds after
        the warm-up.

    Raises:
        TimeoutError: nothing came for `STALL_S`.
        ConnectionError: the server hung up.
    """
    results = Results()
    selector = selectors.DefaultSelector()
    is_paced = rate_per_s is not None
    opened = [
        Connection(port, path, bodies, in_flight, results, is_paced=is_paced)
        for _ in range(connections)
    ]
    for connection in opened:
        selector.register(connection.socket, selectors.EVENT_READ, connection)
    due_s = time.perf_counter()
    start_s = due_s + warm_up_s
    counting, sent = False, 0
    while (now_s := time.perf_counter()) < start_s + seconds:
        if not counting and now_s >= start_s:
            counting, start_s = True, now_s
            for connection in opened:
                connection.counting = True
        if rate_per_s is not None:
            while due_s <= now_s:
                opened[sent % connections].add_due(due_s)
                sent += 1
                due_s += 1 / rate_per_s
        ready = selector.select(max(0.0, due_s - now_s) if is_paced else STALL_S)
        if not ready and not is_paced:
            raise TimeoutError(f"nothing came for {STALL_S} s")
        for key, _ in ready:
            key.data.receive()
    took_s = time.perf_counter() - start_s
    answered = results.requests
    if is_paced:
        _wait_for_open(selector, opened)
        now_s = time.perf_counter()
        for connection in opened:
            results.latencies_s += [now_s - due_s for due_s in connection.open_since_s]
    for connection in opened:
        connection.socket.close()
    ordered = sorted(results.latencies_s)
    if not ordered:
        raise TimeoutError("nothing was answered")
    return {
        "requests": answered,
        "requests_per_s": answered / took_s,
        "errors": results.errors,
        "mean_ms": 1e3 * sum(ordered) / max(1, len(ordered)),
        "p50_ms": 1e3 * ordered[len(ordered) // 2],
        "p99_ms": 1e3 * ordered[len(ordered) * 99 // 100],
    }


def _wait_for_open(selector: selectors.BaseSelector, opened: Sequence[Connection]) -> None:
    """Take the answers to what was sent, for so long as any come within `STALL_S`."""
    while any(connection.open_since_s for connection in opened):
        ready = selector.select(STALL_S)
        if not ready:
            return
        for key, _ in ready:
            key.data.receive()


def write_bodies(path: Path, messages: Sequence[bytes]) -> None:
    """Write serialized messages for `--bodies`: each with gRPC's prefix and a 4-byte length."""
    with path.open("wb") as file:
        for message in messages:
            body = b"\0" + struct.pack(">I", len(message)) + message
            file.write(struct.pack(">I", len(body)) + body)


def read_bodies(path: Path) -> list[bytes]:
    """Read what `write_bodies` wrote."""
    data, position, bodies = path.read_bytes(), 0, []
    while position < len(data):
        (length,) = struct.unpack_from(">I", data, position)
        bodies.append(data[position + 4 : position + 4 + length])
        position += 4 + length
    return bodies


def _head(length: int, kind: int, flags: int) -> bytes:
    return length.to_bytes(3, "big") + bytes((kind, flags))


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return _head(len(payload), kind, flags) + struct.pack(">I", stream) + payload


def _header_block(path: str) -> bytes:
    """Return the first request's headers, which the server is to remember."""

    def text(value: str) -> bytes:
        encoded = value.encode()
        assert len(encoded) < 127
        return bytes((len(encoded),)) + encoded

    return b"".join(
        (
            b"\x83",  # :method: POST
            b"\x86",  # :scheme: http
            b"\x44" + text(path),  # :path
            b"\x41" + text("127.0.0.1"),  # :authority
            b"\x5f" + text("application/grpc"),  # content-type
            b"\x40" + text("te") + text("trailers"),
        )
    )


# The same, as the server has them now: the last one that was added is number 62.
_INDEXED_HEADERS = bytes((0x83, 0x86, 0x80 | 65, 0x80 | 64, 0x80 | 63, 0x80 | 62))


def main() -> int:
    """Run from the command line; print the results as JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--path", required=True)
    parser.add_argument("--bodies", type=Path, required=True)
    parser.add_argument("--connections", type=int, default=4)
    parser.add_argument("--in-flight", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--warm-up", type=float, default=1.0)
    parser.add_argument("--rate", type=float, help="requests/s in all, instead of a closed loop")
    options = parser.parse_args()
    results = run(
        options.port,
        options.path,
        read_bodies(options.bodies),
        connections=options.connections,
        in_flight=options.in_flight,
        warm_up_s=options.warm_up,
        seconds=options.seconds,
        rate_per_s=options.rate,
    )
    print(json.dumps(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
