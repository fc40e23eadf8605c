"""`headrace.v1.MonitorService`: prediction streams and outcomes in, to the monitor's thread."""

import math
import time
from collections.abc import Iterator
from concurrent import futures
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from headrace.errors import Draining, InvalidRequest, Overloaded, ServingError, StartupError
from headrace.monitoring.monitor import Monitor
from headrace.monitoring.records import PredictionRows, from_wire, parse_prediction_id
from headrace.monitoring.thread import MonitorThread
from headrace.rpc.server import refuse_taken_port
from headrace.rpc.status import status_of
from headrace.settings import join_address
from headrace.v1 import monitor_service_pb2 as pb
from headrace.v1 import monitor_service_pb2_grpc as pb_grpc

SERVICE = "headrace.v1.MonitorService"

THREADS = 64
"""Gateways take turns: each ships for some milliseconds, twice a second."""

MESSAGE_BYTES_MAX = 64 << 20
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

    def RecordPredictions(  # noqa: N802 gRPC's name
        self, request_iterator: Iterator[pb.RecordPredictionsRequest], context: grpc.ServicerContext
    ) -> pb.RecordPredictionsResponse:
        """Take a shipment; a full queue makes the gateway wait."""
        taken = 0
        try:
            for request in request_iterator:
                batches = _batches(request)
                rows = sum(batch.rows for batch in batches)
                self._put_patiently(_Fold(request, batches, rows), context)
                taken += rows
        except ServingError as error:
            _abort(context, error)
        return pb.RecordPredictionsResponse(row_count=taken)

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
        while True:
            try:
                self._thread.put(work, PATIENCE_S)
            except Overloaded:
                if context.is_active():
                    continue
                raise Draining("the stream has ended") from None
            return


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
            maximum_concurrent_rpcs=THREADS,
            options=[
                ("grpc.so_reuseport", 0),
                ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
            ],
        )
        pb_grpc.add_MonitorServiceServicer_to_server(MonitorServicer(thread), self._server)
        self._health = health.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        for name in ("", SERVICE):
            self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        address = join_address(host, port)
        try:
            self.port = self._server.add_insecure_port(address)
        except RuntimeError:
            raise StartupError(f"--grpc-address {address}: cannot be listened on") from None

    def start(self) -> None:
        """Begin to take calls."""
        self._server.start()

    def stop(self, grace_s: float) -> None:
        """Take no more; whatever is taken already is in the thread's queue."""
        self._health.enter_graceful_shutdown()
        self._server.stop(grace_s).wait(grace_s + 5)


class _Fold:
    """One message on its way to the monitor's thread."""

    def __init__(
        self, request: pb.RecordPredictionsRequest, batches: list[PredictionRows], rows: int
    ) -> None:
        self._source = request.source
        self._sent_before, self._dropped = request.rows_sent_before, request.rows_dropped
        self._batches = batches
        self._rows = rows

    def __call__(self, monitor: Monitor) -> None:
        now_s = time.time()
        lost = monitor.source_seen(self._source, self._sent_before, self._dropped, self._rows)
        if lost is None:
            return
        for batch in self._batches:
            monitor.fold(batch, now_s)
        if lost:
            monitor.lose(lost, [(batch.model, batch.version) for batch in self._batches])


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
