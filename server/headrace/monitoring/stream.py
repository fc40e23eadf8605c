"""The gateway's side of the prediction stream: finished batches out, never in anybody's way.

Batches are written down as they gather, a little at a time, and shipped twice a second in one short
client-streaming call. A call that stayed open would cost a sixth of the gateway's throughput: the
thread that waits in it polls the same epoll set as the server's own loop, takes events from it and
has to hand them over.
"""

import secrets
import threading
import time
from collections import deque
from typing import Any

import grpc
import structlog

from headrace.monitoring.records import BatchRecord, to_wire
from headrace.v1 import monitor_service_pb2 as pb

_LOG = structlog.get_logger(__name__)

METHOD = "/headrace.v1.MonitorService/RecordPredictions"

WRITE_PERIOD_S = 0.1
"""Batches of so long are written into one message: their columns are joined once."""

SHIP_PERIOD_S = 0.5
MESSAGE_BYTES_MAX = 4 << 20
"""Records of one message, about. More follows in the next one."""

SHIPMENT_BYTES_MAX = 16 << 20
"""Messages of one call, about."""

CALL_TIMEOUT_S = 2.0
"""A monitor that hangs is noticed after that."""

RETRY_S = (0.5, 5.0)
"""First pause after a failure, and the longest one."""


class PredictionStream:
    """
    Ships records to a monitor on a thread of its own.

    `put` never blocks and never fails: what does not fit the queue is dropped, newest first, and
    counted. Every row that was put is sent, dropped or refused in the end. A monitor that is away,
    hangs or comes back disturbs nobody. What it has not acknowledged is sent again; it knows by
    the row count what it has already.

    Args:
        address: The monitor's host:port.
        max_queue_bytes: Most bytes of records that wait, written down or not.
    """

    def __init__(self, address: str, *, max_queue_bytes: int) -> None:
        self._address = address
        self._max_queue_bytes = max_queue_bytes
        self._source = secrets.token_hex(8)
        self._lock = threading.Lock()
        self._queue: deque[BatchRecord] = deque()
        self._queued_bytes = 0
        self._messages: deque[tuple[bytes, int]] = deque()
        """Written down and not acknowledged, with their rows. The thread's own."""
        self._rows_written = 0
        self.rows_sent = 0
        """Acknowledged by the monitor."""
        self.rows_dropped = 0
        """Did not fit the queue, or still waited when there was no more time."""
        self.rows_refused = 0
        """The monitor will never take them, or they could not be written down."""
        self.is_connected = False
        """Whether the monitor took the last shipment."""
        self._is_careful = False  # one message per call, to find the one that is refused
        self._stop_at_s = 0.0
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="prediction-stream", daemon=True)

    def put(self, record: BatchRecord) -> None:
        """Queue a finished batch, or drop it. Any thread may call it."""
        with self._lock:
            waiting = self._queued_bytes + record.byte_count
            if waiting > self._max_queue_bytes:
                self.rows_dropped += record.rows
                return
            self._queued_bytes = waiting
            self._queue.append(record)

    @property
    def queued_bytes(self) -> int:
        """Bytes that wait."""
        return self._queued_bytes

    def start(self) -> None:
        """Begin to ship."""
        self._thread.start()

    def stop(self, timeout_s: float) -> None:
        """Ship what waits as far as the monitor takes it in time; end."""
        self._stop_at_s = time.monotonic() + timeout_s
        self._stopping.set()
        if self._thread.ident is not None:
            self._thread.join(timeout_s)

    def _run(self) -> None:
        options = [
            ("grpc.enable_http_proxy", 0),  # it is one of us
            ("grpc.max_send_message_length", 64 << 20),
            ("grpc.max_reconnect_backoff_ms", int(RETRY_S[1] * 1e3)),
        ]
        pause_s, ship_at_s = RETRY_S[0], time.monotonic()
        with grpc.insecure_channel(self._address, options=options) as channel:
            record = channel.stream_unary(METHOD, None, pb.RecordPredictionsResponse.FromString)
            while True:
                is_last = self._stopping.wait(WRITE_PERIOD_S)
                self._write_down()
                if not is_last and time.monotonic() < ship_at_s:
                    continue
                failure = self._ship(record)
                if is_last:
                    while self._messages and failure is None and time.monotonic() < self._stop_at_s:
                        failure = self._ship(record)
                    self.rows_dropped += sum(rows for _, rows in self._messages)
                    return
                if failure is None:
                    more_s = 0.0 if self._messages else SHIP_PERIOD_S
                    pause_s, ship_at_s = RETRY_S[0], time.monotonic() + more_s
                else:
                    _LOG.warning("prediction_stream_broke", reason=failure, retry_in_s=pause_s)
                    ship_at_s = time.monotonic() + pause_s
                    pause_s = min(2 * pause_s, RETRY_S[1])

    def _ship(self, record: Any) -> str | None:
        """Send messages, oldest first, in one call; return why it failed."""
        messages, size = [], 0
        for message in self._messages:
            messages.append(message)
            size += len(message[0])
            if size > SHIPMENT_BYTES_MAX or self._is_careful:
                break
        if not messages and self.is_connected:
            return None
        try:
            record(iter([message for message, _ in messages]), timeout=CALL_TIMEOUT_S)
        except grpc.RpcError as error:
            self.is_connected = False
            if error.code() in _HOPELESS:  # one of them would be refused for ever
                if len(messages) == 1:
                    self.rows_refused += messages[0][1]
                    self._forget(messages)
                self._is_careful = len(messages) > 1
            return str(error.code().name)
        self.is_connected = True
        self._is_careful = self._is_careful and len(self._messages) > 1
        self.rows_sent += sum(rows for _, rows in messages)
        self._forget(messages)
        return None

    def _forget(self, messages: list[tuple[bytes, int]]) -> None:
        for _ in messages:
            self._messages.popleft()
        with self._lock:
            self._queued_bytes -= sum(len(message) for message, _ in messages)

    def _write_down(self) -> None:
        """Turn queued records into messages. A little at a time: it holds up the other threads."""
        while records := self._take():
            size = sum(record.byte_count for record in records)
            rows = sum(record.rows for record in records)
            written = b""
            try:
                written = pb.RecordPredictionsRequest(
                    source=self._source,
                    rows_sent_before=self._rows_written,
                    rows_dropped=self.rows_dropped,
                    batches=to_wire(records),
                ).SerializeToString()
                self._messages.append((written, rows))
            except Exception:  # noqa: BLE001 what cannot be written must not end the stream
                self.rows_refused += rows
                _LOG.exception("prediction_stream_failed", rows=rows)
            self._rows_written += rows  # those that could not be written count as lost
            with self._lock:
                self._queued_bytes += len(written) - size

    def _take(self) -> list[BatchRecord]:
        records: list[BatchRecord] = []
        size = 0
        with self._lock:
            while self._queue and size < MESSAGE_BYTES_MAX:
                records.append(self._queue.popleft())
                size += records[-1].byte_count
        return records


_HOPELESS = (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.UNIMPLEMENTED)
