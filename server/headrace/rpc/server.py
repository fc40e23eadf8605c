"""The gRPC port: hot methods on the chosen ingress, everything else on an ordinary server."""

import threading
import time
from collections.abc import Callable, Iterable
from concurrent import futures
from typing import TYPE_CHECKING

import grpc
import structlog
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from headrace.batching.accounts import CallerAccounts
from headrace.catalog import Catalog
from headrace.errors import Draining, StartupError
from headrace.ports import refuse_taken_port
from headrace.rpc import infer, log_settings, oip, prediction, stream_infer, stream_predict
from headrace.rpc.completion_queue import self_check
from headrace.rpc.completion_queue.ingress import CompletionQueueIngress
from headrace.rpc.ingress import HotMethod, HotStream, Ingress
from headrace.rpc.status import status_of
from headrace.rpc.threads import ThreadIngress
from headrace.rpc.unread import Unread
from headrace.settings import join_address
from headrace.telemetry.calls import CallRecorder
from headrace.telemetry.metrics import Metrics

if TYPE_CHECKING:
    from headrace.rpc.feature_services import FeatureServices

_LOG = structlog.get_logger(__name__)

CONTROL_THREADS = 8
"""For the ordinary methods: health, metadata, reflection."""

CALLS_ON_THREADS_MAX = 2_048
"""
Calls that have a thread or wait for one; one more is refused with RESOURCE_EXHAUSTED. On the
completion queue hot calls are none of them, nor is a health Watch once it has begun.
"""

PENDING_CALLS_MAX = 16_384
"""
Calls that have reached grpcio and that nobody has asked it for yet. It cancels some at random from
1,000 on and all from 3,000, by default, and a caller cannot tell why: one connection may have more.
Far above that, so that whoever is too many hears it from us, with pushback.
"""

POLITE_S = 0.25
"""
How long new calls are refused before the port closes. Those that reach it while gRPC itself stops
are CANCELLED, which clients do not retry; by then, callers should have learned to go elsewhere.
"""

STOP_GRACE_S = 0.2
"""Hot calls have ended by then; an open health Watch would make any grace last to its end."""

SERVICES = (oip.SERVICE, "headrace.v1.PredictionService", health.SERVICE_NAME)


class GrpcServer:
    """
    The port and everything on it.

    `start`, then `leave` (health says NOT_SERVING, calls are still served), then `refuse_new`, then
    `stop`.

    Args:
        host: To listen on.
        port: 0 takes a free one.
        ingress: `completion-queue` or `threads`.
        catalog: Returns the models as they are now.
        repository: Loads and unloads them on request.
        change_log_level: On request; None where callers may not.
        is_ready: Whether the server as a whole is ready.
        metrics: Counts.
        calls: Is told of calls that fail, and decides which are traced.
        max_message_bytes: In and out.
        max_concurrent_streams: Calls that one connection may have under way.
        with_reflection: Whether to serve reflection.
        features: The services that read features as they are; None without a feature repository.
        accounts: Know the callers; None where it makes no difference who calls.
        shares_port: Whether other processes listen on the port too; whoever starts them holds it.

    Raises:
        StartupError: the address cannot be listened on.
    """

    def __init__(
        self,
        *,
        host: str,
        port: int,
        ingress: str,
        catalog: Callable[[], Catalog],
        repository: oip.Repository,
        is_ready: Callable[[], bool],
        metrics: Metrics,
        calls: CallRecorder,
        max_message_bytes: int,
        max_concurrent_streams: int,
        with_reflection: bool,
        change_log_level: log_settings.ChangeLevel | None = None,
        features: "FeatureServices | None" = None,
        accounts: CallerAccounts | None = None,
        shares_port: bool = False,
    ) -> None:
        if not shares_port:
            refuse_taken_port("--grpc-address", host, port)
        self._catalog = catalog
        self._is_ready = is_ready
        self._refusing_since_s = 0.0
        self._known_models: set[str] = set()
        self._saying = threading.Lock()
        ingress = _usable(ingress)
        self._server = grpc.server(
            futures.ThreadPoolExecutor(CONTROL_THREADS, thread_name_prefix="control"),
            # Calls beyond the pool's threads wait inside grpcio, out of sight of every other limit,
            # and as long as the threads are taken even those stay that were begun and reset.
            maximum_concurrent_rpcs=CALLS_ON_THREADS_MAX,
            options=[
                # grpcio would otherwise share a taken port silently.
                ("grpc.so_reuseport", int(shares_port)),
                ("grpc.max_concurrent_streams", max_concurrent_streams),
                # grpcio counts calls that are answered and not yet freed, which their client cannot
                # know of: one that makes use of all it may would be told UNAVAILABLE. What the
                # option is against, calls begun and reset at once, is bounded elsewhere: those that
                # nobody has taken yet by PENDING_CALLS_MAX, those on threads by
                # CALLS_ON_THREADS_MAX, and a hot call is over when its message fails to come.
                ("grpc.http.overload_protection", 0),
                ("grpc.server.max_pending_requests", PENDING_CALLS_MAX),
                ("grpc.server.max_pending_requests_hard_limit", PENDING_CALLS_MAX),
                ("grpc.max_receive_message_length", max_message_bytes),
                ("grpc.max_send_message_length", max_message_bytes),
            ],
        )
        hot = [
            HotMethod(method.path, method.accept, Unread(catalog, calls, method.path[1:]).glance)
            for method in (
                infer.ModelInfer(catalog, calls, accounts),
                prediction.Predict(catalog, calls, accounts),
            )
        ]
        streams = [
            HotStream(method.path, method.begin)
            for method in (
                stream_infer.ModelStreamInfer(catalog, calls, accounts),
                stream_predict.StreamPredict(catalog, calls, accounts),
            )
        ]
        self._features = features
        if features is not None:
            hot += features.hot_methods
            self._server.add_generic_rpc_handlers(features.handlers)
        self.ingress: Ingress = (
            ThreadIngress(self._server, hot, streams)
            if ingress == "threads"
            else CompletionQueueIngress(self._server, hot, streams)
        )
        metrics.open_calls = lambda: self.ingress.open_calls
        metrics.open_streams = lambda: self.ingress.open_streams
        self._health = health.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        self._server.add_generic_rpc_handlers(
            (oip.OipServicer(catalog, repository, is_ready, change_log_level).handler(),)
        )
        if with_reflection:
            more = () if features is None else features.names
            names = (*SERVICES, *more, reflection.SERVICE_NAME)
            reflection.enable_server_reflection(names, self._server)
        address = join_address(host, port)
        try:
            self.port = self._server.add_insecure_port(address)
        except RuntimeError:
            raise StartupError(f"--grpc-address {address}: cannot be listened on") from None

    def start(self) -> None:
        """Begin to serve."""
        self.update_health()
        self._server.start()
        self.ingress.begin()

    def update_health(self) -> None:
        """Say how the server, its services and its models are."""
        with self._saying:  # the last to look is the last to say
            catalog = self._catalog()
            self._say(["", *SERVICES], serving=self._is_ready())
            if self._features is not None:
                self._say(self._features.names, serving=self._features.is_ready())
            self._known_models |= catalog.entries.keys()
            for name in self._known_models:  # one that is gone does not serve
                self._say([name], serving=catalog.is_ready(name))

    def leave(self) -> None:
        """Say NOT_SERVING to whoever asks or watches, and go on serving."""
        self._health.enter_graceful_shutdown()

    def refuse_new(self) -> None:
        """Answer new hot calls with UNAVAILABLE; end streams with it once they are answered."""
        self._refusing_since_s = time.monotonic()
        self.ingress.refuse_new(status_of(Draining("this server is stopping")))

    def stop(self, timeout_s: float) -> int:
        """
        Wait until the hot calls have ended and new ones were refused for a while; close the port.

        Returns:
            Hot calls that had not ended in time.
        """
        deadline_s = time.monotonic() + timeout_s
        polite_until_s = self._refusing_since_s + POLITE_S
        while (now_s := time.monotonic()) < polite_until_s or (
            self.ingress.open_calls and now_s < deadline_s
        ):
            time.sleep(0.005)
        unfinished = self.ingress.open_calls
        stopped = self._server.stop(STOP_GRACE_S)
        if not stopped.wait(STOP_GRACE_S + 5):
            _LOG.warning("grpc_stop_timed_out")
        self.ingress.end()
        return unfinished

    def _say(self, names: Iterable[str], *, serving: bool) -> None:
        statuses = health_pb2.HealthCheckResponse
        for name in names:
            self._health.set(name, statuses.SERVING if serving else statuses.NOT_SERVING)


def _usable(ingress: str) -> str:
    """Return the ingress asked for, or the one that works with the installed grpcio."""
    if ingress == "threads":
        return ingress
    reason = self_check.unusable_because()
    if reason is None:
        return ingress
    _LOG.warning("ingress_fell_back", ingress="threads", reason=reason, grpcio=grpc.__version__)
    return "threads"
