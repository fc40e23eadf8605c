"""The composition root: builds every object of a gateway once, starts them, stops them in order."""

import gc
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType

import structlog

from headrace.backends.onnx_runtime import load_onnx
from headrace.batching.batcher import Batcher
from headrace.batching.policy import BatchPolicy
from headrace.catalog import Catalog, ModelEntry
from headrace.errors import FeatureStoreUnavailable, ModelLoadError, StartupError
from headrace.features.join import FeatureJoin
from headrace.features.repo import FeatureRepo, open_feature_repo
from headrace.features.store import OnlineStore
from headrace.predict import Request, ServedModel
from headrace.repository.config import ModelConfig, complete, parse_config
from headrace.repository.scan import ModelFolder, VersionFolder, scan
from headrace.repository.validate import check_golden, check_manifest
from headrace.rpc.server import GrpcServer
from headrace.settings import ServeSettings, split_address
from headrace.telemetry.http import HttpEndpoint
from headrace.telemetry.metrics import Metrics
from headrace.tensors import Signature

_LOG = structlog.get_logger(__name__)

GC_THRESHOLD = 50_000
"""Container objects made, net, before the youngest generation is looked at."""

WATCH_PERIOD_S = 1.0
"""How often the threads that carry requests, and the feature store, are looked at."""


class Gateway:
    """
    One serving process.

    Construct it (loads models, binds ports), `start` it, and `run` it until a signal; or `start`
    and `stop` it from a test. A model that cannot be loaded does not keep the others from serving.

    Args:
        settings: Fixed for its life.

    Raises:
        StartupError: a port, the model repository or the feature repository is unusable.
    """

    def __init__(self, settings: ServeSettings) -> None:
        self._settings = settings
        self.metrics = Metrics()
        self._feature_repo: FeatureRepo | None = None
        self._store: OnlineStore | None = None
        folders = scan(settings.model_repository)
        if settings.feature_repo is not None:
            self._feature_repo = open_feature_repo(settings.feature_repo)
            self._store = self._feature_repo.online_store()
        self._features_readable = True
        self._catalog = Catalog([self._load(folder) for folder in folders])
        self._needs_features = any(served.join for served in self._catalog.served())
        self._look_at_features()
        host, port = split_address(settings.grpc_address)
        self.grpc = GrpcServer(
            host=host,
            port=port,
            ingress=settings.ingress,
            catalog=lambda: self._catalog,
            is_ready=self.is_ready,
            metrics=self.metrics,
            max_message_bytes=settings.max_message_bytes,
            with_reflection=settings.reflection,
        )
        http_host, http_port = split_address(settings.http_address)
        self.http = HttpEndpoint(http_host, http_port, self.is_ready, self.metrics)
        self.grpc_address = f"{host}:{self.grpc.port}"
        self.http_address = f"{http_host}:{self.http.port}"
        self._stopping = threading.Event()

    @property
    def catalog(self) -> Catalog:
        """The models as they are now."""
        return self._catalog

    def is_ready(self) -> bool:
        """Whether every model that served still does, and features are readable if needed."""
        return not self._stopping.is_set() and self._features_readable and self._catalog.all_ready()

    def start(self) -> None:
        """Begin to serve."""
        for served in self._catalog.served():
            served.start()
        _calm_the_collector()
        self.grpc.start()
        self.http.start()
        _LOG.info(
            "started",
            grpc_address=self.grpc_address,
            http_address=self.http_address,
            ingress=self.grpc.ingress.name,
            models=sorted({served.name for served in self._catalog.served()}),
        )

    def run(self, on_ready: Callable[[], None]) -> int:
        """
        Start, serve until SIGTERM or SIGINT, and stop; a second signal ends the process at once.

        Args:
            on_ready: Called once, when requests are served.

        Returns:
            The exit code: 0 stopped as asked, 1 failed while running.
        """
        asked = threading.Event()

        def on_signal(number: int, _frame: FrameType | None) -> None:
            if asked.is_set():
                signal.signal(number, signal.SIG_DFL)
                signal.raise_signal(number)
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
            was_readable = self._features_readable
            self._look_at_features()
            if self._features_readable != was_readable:
                _LOG.warning("features_changed", readable=self._features_readable)
                self.grpc.update_health()
        delay_s = self._settings.drain_delay_s
        _LOG.info("draining_started", drain_delay_s=delay_s)
        self._stopping.set()
        self.grpc.leave()
        time.sleep(delay_s)  # a second signal ends it
        return 0 if self.stop() else 1

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
        ended = True
        for served in self._catalog.served():
            ended &= served.stop(max(0.0, deadline_s - time.monotonic()))
        unfinished = self.grpc.stop(max(0.0, deadline_s - time.monotonic()))
        self.http.stop()
        for served in self._catalog.served():
            served.close()
        if self._store is not None:
            self._store.close()
        if unfinished or not ended:
            _LOG.error("requests_cut_off", requests=unfinished)
        _LOG.info("stopped")
        return ended and not unfinished

    def _look_at_features(self) -> None:
        if self._store is None or not self._needs_features:
            return
        try:
            self._store.check()
            self._features_readable = True
        except FeatureStoreUnavailable:
            self._features_readable = False

    def _load(self, folder: ModelFolder) -> ModelEntry:
        """Load the highest version that can serve; keep the reasons of those above it."""
        failures: dict[int, str] = {}
        try:
            config = _read_config(folder)
        except ModelLoadError as error:
            _report_failure(folder.name, None, error)
            return ModelEntry(folder.name, None, {}, {0: str(error)})
        for version in reversed(folder.versions):
            try:
                completed, served = self._load_version(config, version)
            except ModelLoadError as error:
                failures[version.number] = str(error)
                _report_failure(folder.name, version.number, error)
                continue
            _LOG.info("model_loaded", model=folder.name, version=version.number)
            return ModelEntry(folder.name, completed, {version.number: served}, failures)
        return ModelEntry(folder.name, config, {}, failures)

    def _load_version(
        self, config: ModelConfig, version: VersionFolder
    ) -> tuple[ModelConfig, ServedModel]:
        if version.reason is not None:
            raise ModelLoadError(version.reason)
        check_manifest(version.path)
        backend = load_onnx(version.model_path, config)
        try:
            config = complete(config, backend.inputs, backend.outputs)
            if config.without_effect:
                _LOG.warning(
                    "config_without_effect", model=config.name, settings=config.without_effect
                )
            check_golden(version.path, backend)
            join = self._join(config)
        except BaseException:
            backend.close()
            raise
        inputs = config.inputs if join is None else join.inputs
        metrics = self.metrics.model(config.name, str(version.number))
        batcher: Batcher[Request] = Batcher(
            BatchPolicy(
                config.max_batch_size, config.max_queue_delay_s, config.preferred_batch_sizes
            ),
            max_queue_size=config.max_queue_size or self._settings.max_queue_size,
        )
        served = ServedModel(
            name=config.name,
            version=str(version.number),
            signature=Signature(config.name, inputs, config.outputs, config.max_batch_size),
            backend=backend,
            batcher=batcher,
            metrics=metrics,
            join=join,
            store=self._store if join is not None else None,
            executor_count=config.instance_count,
            feature_timeout_s=self._settings.feature_timeout_s,
            max_entities=self._settings.max_entities,
            max_feature_age_s=config.max_feature_age_s,
        )
        metrics.queue_size = lambda: served.waiting
        return config, served

    def _join(self, config: ModelConfig) -> FeatureJoin | None:
        if config.feature_service is None:
            return None
        if self._feature_repo is None:
            raise ModelLoadError(
                f"needs feature service '{config.feature_service}', and the server has no "
                "--feature-repo"
            )
        return FeatureJoin(
            plan=self._feature_repo.compile(config.feature_service),
            model_inputs=config.inputs,
            model=config.name,
            feature_order=config.feature_order,
            missing_features=config.missing_features,
            max_batch_size=config.max_batch_size,
        )


def _calm_the_collector() -> None:
    """
    Let the cyclic garbage collector look at the request path rarely.

    Requests make no reference cycles, so counting references frees them; with Python's default of
    700 allocations the collector took 7 % of a small request's time.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(GC_THRESHOLD, 20, 20)


def _read_config(folder: ModelFolder) -> ModelConfig:
    if folder.reason is not None:
        raise ModelLoadError(folder.reason)
    return parse_config(folder.read_config(), folder.name)


def _report_failure(model: str, version: int | None, error: ModelLoadError) -> None:
    _LOG.error("model_load_failed", model=model, version=version, reason=str(error))


def open_gateway(settings: ServeSettings) -> Gateway:
    """
    Build a gateway.

    Raises:
        StartupError: with one line that says why.
    """
    try:
        return Gateway(settings)
    except OSError as error:
        raise StartupError(str(error)) from None
