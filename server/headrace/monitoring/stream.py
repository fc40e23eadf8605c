"""The gateway's side of the prediction stream: finished batches out, never in anybody's way."""

import secrets
import threading
import time
from collections import deque
from collections.abc import Iterator
from typing import Any

import grpc
import structlog

from headrace.monitoring.records import BatchRecord, to_wire
from headrace.v1 import monitor_service_pb2 as pb
from headrace.v1 import monitor_service_pb2_grpc as pb_grpc

_LOG = structlog.get_logger(__name__)

SHIP_PERIOD_S = 0.1
"""Batches of so long travel together: joining their columns costs per message, not per batch."""

MESSAGE_BYTES_MAX = 4 << 20
"""Rows of one message, about. More follows in the next one."""

RECONNECT_S = (0.5, 5.0)
"""First pause after a stream broke, and the longest one."""

KEEPALIVE_S = 5.0
"""A monitor that hangs is noticed after about twice that."""


class PredictionStream:
    """
    Ships records to a monitor on a thread of its own.

    `put` never blocks and never fails: what does not fit the queue is dropped, newest first, and
    counted. A monitor that is away, hangs or comes back disturbs nobody; rows that were on the way
    when a stream broke may be lost, and the monitor learns how many.

    Args:
        address: The monitor's host:port.
        max_queue_bytes: Most bytes of records that wait.
    """

    def __init__(self, address: str, *, max_queue_bytes: int) -> None:
        self._address = address
        self._max_queue_bytes = max_queue_bytes
        self._source = secrets.token_hex(8)
        self._lock = threading.Lock()
        self._queue: deque[BatchRecord] = deque()
        self._queued_bytes = 0
        self.rows_sent = 0
        """Handed to gRPC."""
        self.rows_dropped = 0
        """Did not fit the queue."""
        self.is_connected = False
        """Whether the last stream still stands, as far as is known."""
        self._stopping = threading.Event()
        self._stream = 0
        self._call: Any = None
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
        """Bytes of records that wait."""
        return self._queued_bytes

    def start(self) -> None:
        """Begin to ship."""
        self._thread.start()

    def stop(self, timeout_s: float) -> None:
        """Ship what waits if the monitor takes it in time; end."""
        self._stopping.set()
        if self._thread.ident is None:
            return
        self._thread.join(timeout_s)
        call = self._call
        if self._thread.is_alive() and call is not None:
            call.cancel()
            self._thread.join(1)

    def _run(self) -> None:
        options = [
            ("grpc.keepalive_time_ms", int(KEEPALIVE_S * 1e3)),
            ("grpc.keepalive_timeout_ms", int(KEEPALIVE_S * 1e3)),
            ("grpc.http2.max_pings_without_data", 0),
            ("grpc.enable_http_proxy", 0),  # it is one of us
            ("grpc.max_send_message_length", 64 << 20),
        ]
        pause_s = RECONNECT_S[0]
        with grpc.insecure_channel(self._address, options=options) as channel:
            record = pb_grpc.MonitorServiceStub(channel).RecordPredictions
            while True:
                began_s = time.monotonic()
                reason = self._ship_on_one_stream(channel, record)
                self.is_connected = False
                if self._stopping.is_set():
                    return
                if time.monotonic() - began_s > RECONNECT_S[1]:
                    pause_s = RECONNECT_S[0]  # it had worked
                _LOG.warning("prediction_stream_broke", reason=reason, retry_in_s=pause_s)
                if self._stopping.wait(pause_s):
                    return
                pause_s = min(2 * pause_s, RECONNECT_S[1])

    def _ship_on_one_stream(self, channel: grpc.Channel, record: Any) -> str:
        """Ship until the stream breaks or the end; return why it broke."""
        ready = grpc.channel_ready_future(channel)
        deadline_s = time.monotonic() + RECONNECT_S[1]
        while not self._is_ready(ready):
            if self._stopping.is_set() or time.monotonic() > deadline_s:
                ready.cancel()
                return "UNREACHABLE"
        self._stream += 1
        self.is_connected = True
        try:
            self._call = record.future(self._messages(self._stream))
            self._call.result()
        except grpc.RpcError as error:
            return str(error.code().name)
        except grpc.FutureCancelledError:
            return "CANCELLED"
        finally:
            self._stream += 1  # its iterator may still wait for something to ship
            self._call = None
        return "ended by the monitor"

    @staticmethod
    def _is_ready(ready: Any) -> bool:
        try:
            ready.result(timeout=0.1)
        except grpc.FutureTimeoutError:
            return False
        return True

    def _messages(self, stream: int) -> Iterator[pb.RecordPredictionsRequest]:
        """Yield messages until the end; run by gRPC, which asks for one when the last has gone."""
        while True:
            is_last = self._stopping.wait(SHIP_PERIOD_S)
            while True:
                if self._stream != stream:
                    return
                try:
                    message = self._next_message()
                except Exception:  # noqa: BLE001 what cannot be written must not end the stream
                    _LOG.exception("prediction_stream_failed")
                    continue
                if message is None:
                    break
                yield message
            if is_last:
                return

    def _next_message(self) -> pb.RecordPredictionsRequest | None:
        records: list[BatchRecord] = []
        size = 0
        with self._lock:
            while self._queue and size < MESSAGE_BYTES_MAX:
                record = self._queue.popleft()
                size += record.byte_count
                records.append(record)
            self._queued_bytes -= size
            dropped = self.rows_dropped
        if not records:
            return None
        rows = sum(record.rows for record in records)
        message = pb.RecordPredictionsRequest(
            source=self._source,
            rows_sent_before=self.rows_sent,
            rows_dropped=dropped,
            batches=to_wire(records),
        )
        self.rows_sent += rows
        return message
