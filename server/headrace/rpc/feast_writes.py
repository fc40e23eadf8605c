"""`GrpcFeatureServer/Push` and `WriteToOnlineStore`: writes through Feast, if allowed.

Importing this imports Feast, which takes seconds.
"""

import queue
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import structlog
from feast.protos.feast.serving import GrpcServer_pb2 as pb
from google.protobuf.message import DecodeError

from headrace.batching.leaving import ran_out
from headrace.errors import (
    CallerLeft,
    DeadlineExceeded,
    Draining,
    FeatureStoreUnavailable,
    InvalidRequest,
    Overloaded,
    PermissionDenied,
)
from headrace.features.feast_writer import FeastWriter, PushTo, moment
from headrace.features.repo import FeatureRepo
from headrace.rpc.ingress import HotCall, HotMethod
from headrace.rpc.refusal import refuse
from headrace.telemetry.calls import CallRecorder
from headrace.telemetry.trace_context import Trace

SERVICE = "GrpcFeatureServer"

WAITING_MAX = 64
"""Writes that wait for the one under way; one more is refused."""

TIMEOUT_S = 10.0
"""Longest that a write waits and works, from its arrival; then its caller is told so."""

ROW_BYTES_MAX = 1 << 20

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class _Write:
    """A call in the queue."""

    call: HotCall
    method: str
    message: bytes
    trace: Trace | None
    carry: Callable[[FeastWriter, bytes], bytes]


class FeatureWrites:
    """
    The writing methods of Feast's server. One write at a time, in the order of arrival.

    The calls are taken straight from the port and wait without a thread. `feature-writes` owns them
    and answers each within `TIMEOUT_S`; `feast-writer` is the only one that Feast can keep waiting.
    A caller that has left by its turn is not written. `start` begins both threads; `stop` refuses
    what waits, lets the write under way finish, and leaves `feast-writer` alone if it hangs: it is
    a daemon.

    Args:
        repo: Where to write.
        calls: Decides which calls are traced, and is told of those that fail.
        is_allowed: Whether to write at all.
    """

    def __init__(self, repo: FeatureRepo, calls: CallRecorder, *, is_allowed: bool) -> None:
        self._repo = repo
        self._calls = calls
        self._is_allowed = is_allowed
        self._writer: FeastWriter | None = None
        self._waiting: queue.Queue[_Write | None] = queue.Queue(WAITING_MAX)
        self._work: queue.Queue[tuple[Callable[[], bytes], Future[bytes]] | None] = queue.Queue(1)
        self._is_stopping = False
        self._threads = [
            threading.Thread(target=target, name=name, daemon=True)
            for target, name in ((self._run, "feature-writes"), (self._run_feast, "feast-writer"))
        ]
        self.hot_methods = [
            HotMethod(f"/{SERVICE}/{name}", partial(self._accept, f"{SERVICE}/{name}", carry))
            for name, carry in (("Push", _push), ("WriteToOnlineStore", _write))
        ]

    def start(self) -> None:
        """Begin to write."""
        if self._is_allowed:
            for thread in self._threads:
                thread.start()

    def stop(self, timeout_s: float) -> bool:
        """
        Refuse what waits, and wait for the write under way.

        Returns:
            Whether every write was answered in time.
        """
        self._is_stopping = True
        owner = self._threads[0]
        if owner.ident is None:
            return True
        with suppress(queue.Full):  # it looks at `_is_stopping` with each that it takes
            self._waiting.put_nowait(None)
        owner.join(timeout_s)
        return not owner.is_alive()

    @property
    def is_alive(self) -> bool:
        """Whether writes are answered, until `stop`."""
        return self._is_stopping or not self._is_allowed or self._threads[0].is_alive()

    def _accept(
        self,
        method: str,
        carry: Callable[[FeastWriter, bytes], bytes],
        call: HotCall,
        message: bytes,
    ) -> None:
        sample = self._calls.sample
        trace = None if sample is None else sample(call.metadata)
        try:
            self._check(message)
            self._waiting.put_nowait(_Write(call, method, message, trace, carry))
        except queue.Full:
            error = Overloaded(f"{WAITING_MAX} writes are already waiting")
            refuse(call, error, self._calls, method, trace)
        except Exception as error:
            refuse(call, error, self._calls, method, trace)

    def _check(self, message: bytes) -> None:
        if not self._is_allowed:
            raise PermissionDenied("this server only reads features; see --allow-feature-writes")
        if len(message) > ROW_BYTES_MAX:
            raise InvalidRequest(
                f"the row has {len(message)} bytes; at most {ROW_BYTES_MAX} are accepted"
            )
        if self._is_stopping:
            raise Draining("this server is stopping")

    def _run(self) -> None:
        while (write := self._waiting.get()) is not None:
            try:
                write.call.reply(self._outcome(write))
            except Exception as error:
                refuse(write.call, error, self._calls, write.method, write.trace)
            if self._is_stopping and self._waiting.empty():
                break
        self._leave_feast()

    def _leave_feast(self) -> None:
        try:
            self._work.put_nowait(None)
        except queue.Full:
            _log.warning("feast_writer_stuck")

    def _outcome(self, write: _Write) -> bytes:
        """Return a write's reply, or raise why there is none."""
        if self._is_stopping:
            raise Draining("this server is stopping")
        call = write.call
        unix_s = time.time()
        if call.gone and not ran_out(
            call.deadline_s - unix_s, time.perf_counter() - call.arrival_s
        ):
            raise CallerLeft("the caller left while the write waited; it was not done")
        if call.gone or call.deadline_s <= unix_s:
            raise DeadlineExceeded("the deadline passed while the write waited; it was not done")
        left_s = TIMEOUT_S - (time.perf_counter() - call.arrival_s)
        future: Future[bytes] = Future()
        work = partial(self._carry, write)
        try:
            self._work.put((work, future), timeout=max(0.0, left_s))
            left_s = TIMEOUT_S - (time.perf_counter() - call.arrival_s)
            return future.result(max(0.0, left_s))
        except (queue.Full, TimeoutError) as error:
            is_undone = isinstance(error, queue.Full) or future.cancel()
            raise FeatureStoreUnavailable(
                f"a feature store did not take a row within {TIMEOUT_S:g} s; "
                + ("this one was not written" if is_undone else "it may be written yet")
            ) from None

    def _carry(self, write: _Write) -> bytes:
        if self._writer is None:
            self._writer = FeastWriter(self._repo)
        try:
            return write.carry(self._writer, write.message)
        except DecodeError:
            raise InvalidRequest(f"the message is none of {write.method}") from None

    def _run_feast(self) -> None:
        while (work := self._work.get()) is not None:
            function, future = work
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)


def _push(writer: FeastWriter, message: bytes) -> bytes:
    request = pb.PushRequest.FromString(message)
    try:
        to = PushTo(request.to)
    except ValueError:
        expected = ", ".join(one.value for one in PushTo)
        raise InvalidRequest(f"to is '{request.to}'; expected {expected}") from None
    writer.push(
        request.stream_feature_view,
        _row(request),
        to,
        allow_registry_cache=request.allow_registry_cache,
    )
    return bytes(pb.PushResponse(status=True).SerializeToString())


def _write(writer: FeastWriter, message: bytes) -> bytes:
    request = pb.WriteToOnlineStoreRequest.FromString(message)
    writer.write(
        request.feature_view_name,
        _row(request),
        allow_registry_cache=request.allow_registry_cache,
    )
    return bytes(pb.WriteToOnlineStoreResponse(status=True).SerializeToString())


def _row(request: Any) -> dict[str, Any]:
    """Return the one row of a request, by column."""
    typed = request.typed_features
    if request.features and typed:
        raise InvalidRequest("features and typed_features are both set; expected one of them")
    if typed:
        return {name: _value(name, typed[name]) for name in typed}
    return dict(request.features)


def _value(name: str, message: Any) -> Any:
    """As Feast's `parse_typed`, but for timestamps: it takes their seconds for nanoseconds."""
    kind = message.WhichOneof("val")
    if kind in {None, "null_val"}:
        return None
    value = getattr(message, kind)
    if kind == "unix_timestamp_val":
        return moment(name, value)
    if hasattr(value, "val"):
        return dict(value.val) if isinstance(value.val, Mapping) else list(value.val)
    return value
