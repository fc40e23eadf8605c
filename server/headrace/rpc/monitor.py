"""`headrace.v1.MonitorService`: prediction streams and outcomes in, to the monitor's thread."""

import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from headrace.errors import Draining, InvalidRequest, Overloaded, ServingError, StartupError
from headrace.monitoring.monitor import Monitor
from headrace.monitoring.records import PredictionRows, from_wire, parse_prediction_id
from headrace.monitoring.thread import MonitorThread
from headrace.ports import refuse_taken_port
from headrace.rpc.status import status_of
from headrace.settings import join_address
from headrace.v1 import monitor_service_pb2 as pb
from headrace.v1 import monitor_service_pb2_grpc as pb_grpc

SERVICE = "headrace.v1.MonitorService"

THREADS = 64
"""Gateways take turns: each ships for some milliseconds, twice a second."""

CALLS_MAX = 1_024
"""Open at once, those that watch health among them."""

STREAMS_MAX = 48
"""At once; the other threads are for outcomes and health. One more is refused, and comes again."""

STREAM_TIME_MAX_S = 10.0
"""Of one shipment, however little it sends. Gateways give up after two seconds."""

REAP_PERIOD_S = 0.5
MESSAGE_BYTES_MAX = 64 << 20
HELD_BYTES_MAX = 256 << 20
"""Of messages that wait for the monitor's thread; the next ones wait in their gateways."""

KEEPALIVE_S = 30
"""How soon a gateway that has vanished without a word is noticed."""

OUTCOMES_MAX = 10_000
SOURCE_LENGTH_MAX = 64
BATCHES_MAX = 1_000
PATIENCE_S = 0.5
"""How long to wait for a place in the queue before looking whether the stream is still there."""

OUTCOME_TIMEOUT_S = 10.0


class MonitorServicer(pb_grpc.MonitorServiceServicer):  # type: ignore[misc]
    """
    The service.

    Args:
        thread: Owns the monitor.
    """

    def __init__(self, thread: MonitorThread) -> None:
        self._thread = thread
        self._room = threading.Condition()
        self._held_bytes = 0
        self._streams: dict[int, tuple[grpc.ServicerContext, float]] = {}

    def RecordPredictions(  # noqa: N802 gRPC's name
        self, request_iterator: Iterator[pb.RecordPredictionsRequest], context: grpc.ServicerContext
    ) -> pb.RecordPredictionsResponse:
        """Take a shipment; a full queue makes the gateway wait."""
        taken = 0
        with self._room:
            if len(self._streams) >= STREAMS_MAX:
                _abort(context, Overloaded(f"{STREAMS_MAX} shipments are on their way already"))
            self._streams[id(context)] = context, time.monotonic() + STREAM_TIME_MAX_S
        try:
            for request in request_iterator:
                batches = _batches(request)
                rows = sum(batch.rows for batch in batches)
                self._put_patiently(_Fold(request, batches, rows, self._release), context)
                taken += rows
        except ServingError as error:
            _abort(context, error)
        finally:
            with self._room:
                self._streams.pop(id(context), None)
        return pb.RecordPredictionsResponse(row_count=taken)

    def end_overdue_streams(self) -> None:
        """Cancel shipments that have had their time: one that sends nothing holds a thread."""
        now_s = time.monotonic()
        with self._room:
            overdue = [context for context, end_s in self._streams.values() if end_s < now_s]
        for context in overdue:
            context.cancel()  # type: ignore[no-untyped-call]

    def ReportOutcomes(  # noqa: N802 gRPC's name
        self, request: pb.ReportOutcomesRequest, context: grpc.ServicerContext
    ) -> pb.ReportOutcomesResponse:
        """Join outcomes, all or none."""
        try:
            outcomes, unknown = _outcomes(request)
            counts = self._thread.ask(lambda monitor: monitor.join(outcomes), OUTCOME_TIMEOUT_S)
        except ServingError as error:
            _abort(context, error)
            raise AssertionError from None  # abort raises
        return pb.ReportOutcomesResponse(
            joined_count=counts.joined,
            duplicate_count=counts.duplicate,
            conflicting_count=counts.conflicting,
            unknown_count=counts.unknown + unknown,
        )

    def _put_patiently(self, work: "_Fold", context: grpc.ServicerContext) -> None:
        with self._room:
            while self._held_bytes and self._held_bytes + work.byte_count > HELD_BYTES_MAX:
                self._room.wait(PATIENCE_S)
                if not context.is_active():
                    raise Draining("the stream has ended")
            self._held_bytes += work.byte_count
        while True:
            try:
                self._thread.put(work, PATIENCE_S)
            except Overloaded:
                if context.is_active():
                    continue
                self._release(work.byte_count)
                raise Draining("the stream has ended") from None
            except ServingError:
                self._release(work.byte_count)
                raise
            return

    def _release(self, byte_count: int) -> None:
        with self._room:
            self._held_bytes -= byte_count
            self._room.notify_all()


class MonitorServer:
    """
    The monitor's gRPC port.

    Args:
        host: To listen on.
        port: 0 takes a free one.
        thread: Owns the monitor.

    Raises:
        StartupError: the address cannot be listened on.
    """

    def __init__(self, host: str, port: int, thread: MonitorThread) -> None:
        refuse_taken_port("--grpc-address", host, port)
        self._server = grpc.server(
            futures.ThreadPoolExecutor(THREADS, thread_name_prefix="monitor-rpc"),
            maximum_concurrent_rpcs=CALLS_MAX,
            options=[
                ("grpc.so_reuseport", 0),
                ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
                ("grpc.keepalive_time_ms", KEEPALIVE_S * 1_000),
                ("grpc.keepalive_timeout_ms", KEEPALIVE_S * 1_000 // 3),
            ],
        )
        self._servicer = MonitorServicer(thread)
        pb_grpc.add_MonitorServiceServicer_to_server(self._servicer, self._server)
        # A Watch lasts as long as its caller likes: it must not hold a thread.
        self._health = health.HealthServicer(
            experimental_non_blocking=True,
            experimental_thread_pool=futures.ThreadPoolExecutor(1, thread_name_prefix="health"),
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        for name in ("", SERVICE):
            self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        address = join_address(host, port)
        try:
            self.port = self._server.add_insecure_port(address)
        except RuntimeError:
            raise StartupError(f"--grpc-address {address}: cannot be listened on") from None
        self._stopping = threading.Event()
        self._reaper = threading.Thread(target=self._reap, name="stream-reaper", daemon=True)

    def start(self) -> None:
        """Begin to take calls."""
        self._server.start()
        self._reaper.start()

    def stop(self, grace_s: float) -> None:
        """Take no more; whatever is taken already is in the thread's queue."""
        self._health.enter_graceful_shutdown()
        self._server.stop(grace_s).wait(grace_s + 5)
        self._stopping.set()
        if self._reaper.ident is not None:
            self._reaper.join(5)

    def _reap(self) -> None:
        while not self._stopping.wait(REAP_PERIOD_S):
            self._servicer.end_overdue_streams()


class _Fold:
    """
    One message on its way to the monitor's thread.

    Args:
        request: The message.
        batches: What is in it.
        rows: Of all batches.
        release: Is told its bytes when it is done with.
    """

    def __init__(
        self,
        request: pb.RecordPredictionsRequest,
        batches: list[PredictionRows],
        rows: int,
        release: Callable[[int], None],
    ) -> None:
        self.byte_count = request.ByteSize()
        self._source = request.source
        self._sent_before, self._dropped = request.rows_sent_before, request.rows_dropped
        self._batches = batches
        self._rows = rows
        self._release = release

    def __call__(self, monitor: Monitor) -> None:
        try:
            self._fold(monitor)
        finally:
            self._release(self.byte_count)

    def _fold(self, monitor: Monitor) -> None:
        now_s = time.time()
        lost = monitor.source_seen(self._source, self._sent_before, self._dropped, self._rows)
        if lost is None:
            return
        rows_of: Counter[tuple[str, int]] = Counter()
        for batch in self._batches:
            monitor.fold(batch, now_s)
            rows_of[batch.model, batch.version] += batch.rows
        # Nobody knows whose they were: most likely they are shared out as those that came.
        for version, rows in rows_of.items():
            if share := round(lost * rows / self._rows):
                monitor.lose(share, [version])


def _batches(request: pb.RecordPredictionsRequest) -> list[PredictionRows]:
    if not request.source or len(request.source) > SOURCE_LENGTH_MAX:
        raise InvalidRequest(f"expected a source of 1 to {SOURCE_LENGTH_MAX} characters")
    if len(request.batches) > BATCHES_MAX:
        raise InvalidRequest(f"a message has more than {BATCHES_MAX} batches")
    if max(request.rows_sent_before, request.rows_dropped) >= 1 << 62:
        raise InvalidRequest("a number of rows is out of range")
    try:
        return [from_wire(batch) for batch in request.batches]
    except ValueError as error:
        raise InvalidRequest(str(error)) from None


def _outcomes(
    request: pb.ReportOutcomesRequest,
) -> tuple[list[tuple[str, int, int, float]], int]:
    """Return the outcomes whose ids can be of predictions, and how many others there are."""
    if not 0 < len(request.outcomes) <= OUTCOMES_MAX:
        raise InvalidRequest(
            f"a request has {len(request.outcomes)} outcomes; expected 1 to {OUTCOMES_MAX}"
        )
    outcomes = []
    for outcome in request.outcomes:
        if not math.isfinite(outcome.value):
            raise InvalidRequest("an outcome's value is not finite")
        key = parse_prediction_id(outcome.prediction_id)
        if key is not None:
            outcomes.append((*key, outcome.value))
    return outcomes, len(request.outcomes) - len(outcomes)


def _abort(context: grpc.ServicerContext, error: ServingError) -> Any:
    status = status_of(error)
    context.set_trailing_metadata(status.trailing)
    context.abort(status.code, status.details)
