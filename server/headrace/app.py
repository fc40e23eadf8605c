"""The composition root: builds every object of a gateway once, starts them, stops them in order."""

import signal
import threading
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING

import structlog

from headrace.backends.cuda import refuse_two_builds
from headrace.batching.accounts import CallerAccounts
from headrace.batching.quotas import Quotas
from headrace.catalog import Catalog, ModelEntry
from headrace.errors import FeatureStoreUnavailable, StartupError
from headrace.feature_reads import FeatureReads
from headrace.features.plans import FeaturePlans
from headrace.features.registry_watch import RegistryWatch
from headrace.features.repo import FeatureRepo, open_feature_repo
from headrace.features.skew_log import SkewLog
from headrace.features.store import OnlineStore
from headrace.garbage.collector import GarbageCollector
from headrace.loading import VersionLoader
from headrace.monitoring.stream import PredictionStream
from headrace.ports import refuse_taken_port
from headrace.repository.manager import RepositoryManager
from headrace.rpc.log_settings import ChangeLevel
from headrace.rpc.oip import Repository
from headrace.rpc.server import GrpcServer
from headrace.settings import ServeSettings, join_address, split_address
from headrace.telemetry.calls import CallRecorder
from headrace.telemetry.feature_metrics import (
    FeatureReadMetrics,
    RegistryMetrics,
    StoreMetrics,
    ViewMetrics,
)
from headrace.telemetry.http import HttpEndpoint
from headrace.telemetry.logs import set_log_level
from headrace.telemetry.metrics import Metrics
from headrace.telemetry.trace_context import Sampler
from headrace.telemetry.tracing import SpanExporter, tracing_rule

if TYPE_CHECKING:
    from headrace.rpc.feast_writes import FeatureWrites
    from headrace.rpc.feature_services import FeatureServices

_LOG = structlog.get_logger(__name__)

STREAM_STOP_S = 2.0
"""How long the last predictions may take to the monitor when stopping."""

CALLS_STOP_S = 2.0
"""How long the last spans may take to their collector when stopping."""

LOAD_STOP_S = 2.0
"""How long a load under way may take when stopping; it comes to nothing whatever it takes."""

GARBAGE_STOP_S = 2.0
"""How long a collection under way may take when stopping."""

SKEW_LOG_STOP_S = 5.0
"""How long the last rows may take to the skew log's folder when stopping."""

WATCH_PERIOD_S = 1.0
"""How often the threads that carry requests, and the feature store, are looked at."""


@dataclass(frozen=True, slots=True)
class WorkerPlace:
    """
    What makes a process one of several: it shares the gRPC port, and has no HTTP port.

    Args:
        number: From 1.
        loaded: Models that callers have had loaded before it came (`explicit` only).
        shared: Makes the repository that callers reach, of the control mode: what they change is
            changed everywhere.
        join: Called when all is loaded, and before anybody can connect, with what loads other
            models instead; returns when this process has what the others have.
        change_log_level: Changes it everywhere; see `rpc.log_settings.ChangeLevel`.
        leave: Called when new requests are refused: nobody waits for the others any more.
    """

    number: int
    loaded: Collection[str]
    shared: Callable[[str], Repository]
    join: Callable[[Callable[[Collection[str]], None]], None]
    change_log_level: ChangeLevel
    leave: Callable[[], None]


class Gateway:
    """
    One serving process.

    Construct it (loads models, binds ports), `start` it, and `run` it until a signal; or `start`
    and `stop` it from a test. A model that cannot be loaded does not keep the others from serving.

    Args:
        settings: Fixed for its life.
        place: Among several processes; None for one on its own.

    Raises:
        StartupError: a port, the model repository or the feature repository is unusable.
    """

    def __init__(self, settings: ServeSettings, place: WorkerPlace | None = None) -> None:
        self._settings = settings
        self._place = place
        self._stopping = threading.Event()
        self._hurry = threading.Event()
        refuse_two_builds()
        if place is None:
            for flag, address in (
                ("--grpc-address", settings.grpc_address),
                ("--http-address", settings.http_address),
            ):  # before minutes of loading
                refuse_taken_port(flag, *split_address(address))
        self.metrics = Metrics()
        self._garbage = GarbageCollector(is_idle=lambda: not self.metrics.open_calls())
        self.metrics.more.append(self._garbage.pauses)
        self._feature_repo: FeatureRepo | None = None
        self._store: OnlineStore | None = None
        if settings.feature_repo is not None:
            self._feature_repo = open_feature_repo(
                settings.feature_repo, settings.on_demand_modules or ""
            )
            self._store = self._feature_repo.online_store(
                cache_rows=settings.feature_cache_rows,
                hears_writes=settings.feature_cache_invalidation,
                timeout_s=settings.feature_timeout_s,
            )
        self._reads: FeatureReads | None = None
        self._writes: FeatureWrites | None = None
        view_metrics = ViewMetrics()
        self._features_readable = True
        self._needs_features = self._is_started = False
        self._catalog = Catalog([])
        self._stream: PredictionStream | None = None
        if settings.monitor_address is not None:
            self._stream = PredictionStream(
                settings.monitor_address, max_queue_bytes=settings.monitor_queue_bytes
            )
            self.metrics.stream = self._stream
        record = None if self._stream is None else self._stream.put
        self.calls = _call_recorder(self.metrics, None if place is None else place.number)
        self._accounts = self.metrics.accounts = _caller_accounts(settings)
        self._skew_log = _skew_log(settings)
        self.metrics.skew_log = self._skew_log
        self._plans: FeaturePlans | None = None
        self._registry: RegistryWatch | None = None
        if self._feature_repo is not None and self._store is not None:
            self._plans = FeaturePlans(self._feature_repo)
            self._registry = RegistryWatch(
                self._feature_repo, self._swap_registry, settings.registry_poll_s
            )
            self.metrics.more.append(RegistryMetrics(self._registry))
            self.metrics.more.append(StoreMetrics(self._store, lambda: self._features_readable))
            read_metrics = FeatureReadMetrics()
            self.metrics.more += [read_metrics, view_metrics]
            self._reads = FeatureReads(
                self._plans,
                self._store,
                read_metrics,
                view_metrics,
                self.calls,
                max_entities=settings.max_entities,
                max_queue_size=settings.max_queue_size,
                max_queue_bytes=settings.max_queue_bytes,
                timeout_s=settings.feature_timeout_s,
                skew_log=self._skew_log,
                is_fair=self._accounts is not None,
                codel_s=_feature_codel_s(settings),
            )
        loader = VersionLoader(
            settings,
            self._plans,
            self._store,
            self.metrics,
            record,
            self.calls,
            view_metrics,
            self._skew_log,
        )
        self.repository = RepositoryManager(
            settings.model_repository,
            load=loader.load,
            revision=loader.revision,
            publish=self._publish,
            on_load=self.metrics.model_load,
            mode=settings.model_control_mode,
            wanted=() if place is None else place.loaded,
            settle_s=settings.settle_s,
            poll_s=settings.repository_poll_s,
            retire_timeout_s=settings.drain_timeout_s,
        )
        self.repository.load_all()
        self._look_at_features()
        if place is not None:
            place.join(self.repository.want)
        host, port = split_address(settings.grpc_address)
        self.grpc = GrpcServer(
            host=host,
            port=port,
            ingress=settings.ingress,
            catalog=lambda: self._catalog,
            repository=self.repository if place is None else place.shared(self.repository.mode),
            change_log_level=_change_log_level(settings, place),
            is_ready=self.is_ready,
            features=self._feature_services(),
            accounts=self._accounts,
            metrics=self.metrics,
            calls=self.calls,
            max_message_bytes=settings.max_message_bytes,
            max_concurrent_streams=settings.max_concurrent_streams,
            with_reflection=settings.reflection,
            shares_port=place is not None,
        )
        self.grpc_address = join_address(host, self.grpc.port)
        self.http: HttpEndpoint | None = None
        self.http_address = ""
        if place is None:
            http_host, http_port = split_address(settings.http_address)
            self.http = HttpEndpoint(
                http_host, http_port, self.is_ready, self.metrics, notes=self.readiness_notes
            )
            self.http_address = join_address(http_host, self.http.port)
        self._feature_watch = threading.Thread(
            target=self._watch_features, name="feature-store-watch", daemon=True
        )

    @property
    def catalog(self) -> Catalog:
        """The models as they are now."""
        return self._catalog

    def is_ready(self) -> bool:
        """
        Whether requests are welcome: not stopping, and features readable if any model needs them.

        Every model that ever served still does, without looking: the repository's policy takes a
        version out of service only for another that serves, or because it was removed on purpose.
        """
        is_readable = self._features_readable or not self._needs_features
        return is_readable and not self._stopping.is_set()

    def start(self) -> None:
        """Begin to serve."""
        self._garbage.start()  # all that has been built is set aside
        if self._reads is not None:
            self._reads.start()
        if self._writes is not None:
            self._writes.start()
        self.grpc.start()
        if self.http is not None:
            self.http.start()
        self._is_started = True
        self._feature_watch.start()
        if self._registry is not None:
            self._registry.start()
        self.calls.start()
        if self._stream is not None:
            self._stream.start()
        if self._skew_log is not None:
            self._skew_log.start()
        self.repository.start()
        _LOG.info(
            "started",
            grpc_address=self.grpc_address,
            http_address=self.http_address,
            ingress=self.grpc.ingress.name,
            models=sorted({served.name for served in self._catalog.served()}),
        )

    def run(self, on_ready: Callable[[], None], asked: threading.Event | None = None) -> int:
        """
        Start, serve until SIGTERM or SIGINT, and stop; a second signal ends the process at once.

        Args:
            on_ready: Called once, when requests are served.
            asked: Set when it shall stop, by others than signals too.

        Returns:
            The exit code: 0 stopped as asked, 1 failed while running.
        """
        asked = threading.Event() if asked is None else asked
        has_signal = threading.Event()

        def on_signal(number: int, _frame: FrameType | None) -> None:
            if has_signal.is_set():
                signal.signal(number, signal.SIG_DFL)
                signal.raise_signal(number)
            has_signal.set()
            asked.set()

        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, on_signal)
        self.start()
        on_ready()
        while not asked.wait(WATCH_PERIOD_S):
            if not self.grpc.ingress.is_alive:
                _LOG.critical("ingress_died")
                return 1
            for served in self._catalog.served():
                if not served.is_alive:
                    _LOG.critical("executor_died", model=served.name, version=served.version)
                    return 1
            if self._reads is not None and not self._reads.is_alive:
                _LOG.critical("feature_reader_died")
                return 1
            if self._writes is not None and not self._writes.is_alive:
                _LOG.critical("feature_writer_died")
                return 1
        delay_s = self._settings.drain_delay_s
        _LOG.info("draining_started", drain_delay_s=delay_s)
        self._stopping.set()
        self.grpc.leave()
        self._hurry.wait(delay_s)  # a second signal ends it
        return 0 if self.stop() else 1

    def hurry(self) -> None:
        """Leave out the drain delay, or the rest of it: nobody is told where else to go."""
        self._hurry.set()

    def stop(self) -> bool:
        """
        Refuse new requests, finish those that were accepted, free everything.

        Returns:
            Whether every accepted request was answered in time.
        """
        self._stopping.set()
        deadline_s = time.monotonic() + self._settings.drain_timeout_s
        self.grpc.leave()
        self.grpc.refuse_new()
        if self._place is not None:
            self._place.leave()
        self.repository.stop(0)  # it may be in the middle of a load: the requests come first
        models = self._catalog.served()
        ended = self._reads is None or self._reads.stop(max(0.0, deadline_s - time.monotonic()))
        if self._writes is not None:
            ended &= self._writes.stop(max(0.0, deadline_s - time.monotonic()))
        for served in models:
            ended &= served.stop(max(0.0, deadline_s - time.monotonic()))
        unfinished = self.grpc.stop(max(0.0, deadline_s - time.monotonic()))
        if self.http is not None:
            self.http.stop()
        # A load may go on for long, and nobody wants it any more: what follows needs the time.
        self.repository.stop(min(LOAD_STOP_S, max(0.0, deadline_s - time.monotonic())))
        if self._feature_watch.ident is not None:
            self._feature_watch.join(max(0.0, deadline_s - time.monotonic()))
        if self._registry is not None:
            self._registry.stop(max(0.0, deadline_s - time.monotonic()))
        self.calls.stop(min(CALLS_STOP_S, max(0.0, deadline_s - time.monotonic())))
        if self._stream is not None:  # after the last batch
            self._stream.stop(min(STREAM_STOP_S, max(0.0, deadline_s - time.monotonic())))
        if self._skew_log is not None:  # likewise
            self._skew_log.stop(min(SKEW_LOG_STOP_S, max(0.0, deadline_s - time.monotonic())))
        for served in models:
            served.close()
        if self._store is not None:
            self._store.close()
        self._garbage.stop(GARBAGE_STOP_S)
        if unfinished or not ended:
            _LOG.error("requests_cut_off", requests=unfinished)
        _LOG.info("stopped")
        return ended and not unfinished

    def _watch_features(self) -> None:
        """
        Look at the store now and then. A name that does not resolve may take its time here.

        It ends when the gateway does, whatever goes wrong: nobody else would see the store return.
        """
        while not self._stopping.wait(WATCH_PERIOD_S):
            was_readable = self._features_readable
            self._look_at_features()
            if self._features_readable != was_readable:
                _LOG.warning("features_changed", readable=self._features_readable)
                try:
                    self.grpc.update_health()
                except Exception:  # noqa: BLE001 this thread must go on looking
                    _LOG.exception("health_not_updated")

    def _feature_services(self) -> "FeatureServices | None":
        """Serve features as they are; importing Feast's messages takes as long as Feast."""
        if self._reads is None or self._plans is None or self._feature_repo is None:
            return None
        from headrace.rpc.feast_writes import FeatureWrites  # noqa: PLC0415 imports Feast
        from headrace.rpc.feature_services import FeatureServices  # noqa: PLC0415 likewise

        self._writes = FeatureWrites(
            self._feature_repo, self.calls, is_allowed=self._settings.allow_feature_writes
        )
        return FeatureServices(
            self._reads,
            self._plans,
            self.calls,
            as_feast=self._settings.feast_compat,
            is_ready=lambda: self._features_readable and not self._stopping.is_set(),
            writes=self._writes,
            accounts=self._accounts,
        )

    def _look_at_features(self) -> None:
        if self._store is None:
            return
        try:
            self._store.check()
            self._features_readable = True
        except FeatureStoreUnavailable:
            self._features_readable = False
        except Exception:  # noqa: BLE001 a store that cannot be looked at cannot be relied on
            if self._features_readable:  # said once
                _LOG.exception("feature_store_check_failed")
            self._features_readable = False

    def _swap_registry(self, repo: FeatureRepo) -> None:
        assert self._plans is not None
        self._plans.swap(repo)
        self.repository.look_soon()

    def readiness_notes(self) -> list[str]:
        """What is not as it should be, and does not keep this server from serving."""
        if self._registry is not None and not self._registry.is_readable:
            return ["the feature registry cannot be read; its last good state is served"]
        return []

    def _publish(self, entries: Sequence[ModelEntry]) -> None:
        """Swap the models in, by one assignment; requests look them up anew each time."""
        before = self._catalog
        self._catalog = Catalog(entries)
        self._needs_features = any(served.join for served in self._catalog.served())
        serving = {(served.name, served.version) for served in self._catalog.served()}
        for served in before.served():
            if (served.name, served.version) not in serving:
                self.metrics.forget(served.name, served.version)
        if self._is_started:
            self._garbage.loaded()
            self.grpc.update_health()


def _change_log_level(settings: ServeSettings, place: WorkerPlace | None) -> ChangeLevel | None:
    if not settings.allow_log_settings:
        return None
    if place is not None:
        return place.change_log_level
    return lambda level, _timeout_s: set_log_level(level)


def _call_recorder(metrics: Metrics, worker: int | None) -> CallRecorder:
    """Build what tells of single calls; it traces when OpenTelemetry's environment asks for it."""
    rule = tracing_rule()
    if rule is None:
        calls = CallRecorder(metrics)
    else:
        calls = CallRecorder(metrics, Sampler(rule), SpanExporter(worker))
    metrics.calls = calls
    return calls


def _caller_accounts(settings: ServeSettings) -> CallerAccounts | None:
    if settings.caller_header is None:
        return None
    rate_per_s = settings.caller_rate_per_s
    if rate_per_s is None:
        return CallerAccounts(settings.caller_header)
    burst = max(1.0, rate_per_s) if settings.caller_burst is None else settings.caller_burst
    return CallerAccounts(settings.caller_header, Quotas(rate_per_s, burst))


def _feature_codel_s(settings: ServeSettings) -> tuple[float, float] | None:
    target_s = settings.feature_codel_target_s
    return None if target_s is None else (target_s, settings.feature_codel_interval_s)


def _skew_log(settings: ServeSettings) -> SkewLog | None:
    if settings.skew_log_dir is None:
        return None
    return SkewLog(
        settings.skew_log_dir,
        share=settings.skew_sample_share,
        max_queue_bytes=settings.skew_queue_bytes,
        file_rows=settings.skew_file_rows,
        file_s=settings.skew_file_s,
        folder_bytes=settings.skew_log_bytes,
    )


def open_gateway(settings: ServeSettings, place: WorkerPlace | None = None) -> Gateway:
    """
    Build a gateway; see there.

    Raises:
        StartupError: with one line that says why.
    """
    try:
        return Gateway(settings, place)
    except OSError as error:
        raise StartupError(str(error)) from None
