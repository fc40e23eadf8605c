"""Makes a model version ready to serve: from a folder to a checked and warmed `ServedModel`."""

from collections.abc import Callable
from dataclasses import replace

import structlog

from headrace.backends.base import Backend
from headrace.backends.oip import load_oip
from headrace.backends.onnx_runtime import load_onnx
from headrace.backends.padded import PaddedBackend
from headrace.backends.warm_up import warm_up
from headrace.batching.batcher import Batcher
from headrace.batching.codel import Codel
from headrace.batching.policy import BatchPolicy, LevelPolicy
from headrace.errors import ModelLoadError
from headrace.features.join import FeatureJoin
from headrace.features.plans import FeaturePlans, Selection
from headrace.features.skew_log import SkewLog
from headrace.features.store import OnlineStore
from headrace.monitoring.records import BatchRecord
from headrace.predict import ServedModel
from headrace.reply_order import ReplyOrder
from headrace.repository.completion import complete, with_batch_size
from headrace.repository.config import ModelConfig, parse_config
from headrace.repository.queueing import check_parts, max_queue_size
from headrace.repository.scan import VersionFolder, read_config
from headrace.repository.validate import check_golden
from headrace.request import Request
from headrace.settings import ServeSettings
from headrace.shape_buckets import ShapeBuckets
from headrace.telemetry.calls import CallRecorder
from headrace.telemetry.feature_metrics import ViewMetrics
from headrace.telemetry.metrics import Metrics
from headrace.tensors import Signature

_LOG = structlog.get_logger(__name__)


class VersionLoader:
    """
    Loads versions for one server.

    Args:
        settings: Limits that versions get.
        plans: For models that name a feature service; without them they are refused.
        store: Where their features are read.
        metrics: Each version gets its own numbers.
        record: Is given every answered batch.
        calls: Is told of sampled calls.
        view_metrics: Statuses and ages of their features.
        skew_log: Keeps the features of sampled rows.
    """

    def __init__(
        self,
        settings: ServeSettings,
        plans: FeaturePlans | None,
        store: OnlineStore | None,
        metrics: Metrics,
        record: Callable[[BatchRecord], None] | None = None,
        calls: CallRecorder | None = None,
        view_metrics: ViewMetrics | None = None,
        skew_log: SkewLog | None = None,
    ) -> None:
        self._view_metrics = view_metrics
        self._skew_log = skew_log
        self._record = record
        self._calls = calls
        self._settings = settings
        self._plans = plans
        self._store = store
        self._metrics = metrics

    def load(self, name: str, version: VersionFolder) -> tuple[ModelConfig, ServedModel]:
        """
        Load one version and put it through its checks; it is not started.

        Args:
            name: The model's name.
            version: Its files do not change any more; `config.pbtxt` is beside its folder.

        Raises:
            ModelLoadError: it cannot serve, and why.
        """
        config = parse_config(read_config(version.path.parent), name)
        backend: Backend
        if config.remote is not None:
            backend = load_oip(config.name, config.remote, version.path)
            config = with_batch_size(config, backend.max_batch_size)
        elif version.has_model:
            backend = load_onnx(version.model_path, config)
        else:
            raise ModelLoadError("model.onnx is missing")
        padded = None
        if config.allowed_batch_sizes:
            backend = padded = PaddedBackend(config.name, backend, config.allowed_batch_sizes)
        try:
            config = complete(config, backend.inputs, backend.outputs)
            check_parts(config.max_request_rows, config.max_batch_size, self._queue_sizes(config))
            if config.without_effect:
                _LOG.warning(
                    "config_without_effect", model=config.name, settings=config.without_effect
                )
            check_golden(version.path, backend, is_coarse=config.uses_tf32)
            join = self._join(config)
            warm_up(
                backend,
                config.max_batch_size,
                config.preferred_batch_sizes,
                config.allowed_batch_sizes,
                () if config.shape_buckets is None else config.shape_buckets.shapes(),
            )
        except BaseException:
            backend.close()
            raise
        inputs = config.inputs if join is None else join.inputs
        if config.remote is None:  # ONNX strings are UTF-8: found out here, it disturbs no batch
            inputs = tuple(
                replace(spec, is_text=spec.datatype == "BYTES" and not spec.element_bytes_max)
                for spec in inputs
            )
        signature = Signature(
            *(config.name, inputs, config.outputs, config.max_batch_size, config.max_request_rows)
        )
        metrics = self._metrics.model(config.name, str(version.number))
        batcher = self._batcher(config)
        order = self._order(config, version.number)
        served = ServedModel(
            name=config.name,
            version=str(version.number),
            signature=signature,
            backend=backend,
            batcher=batcher,
            metrics=metrics,
            join=join,
            store=self._store if join is not None else None,
            buckets=(
                None
                if config.shape_buckets is None
                else ShapeBuckets(config.shape_buckets, signature)
            ),
            order=order,
            executor_count=executor_count(config),
            overlapping_count=overlapping_count(config),
            latency_slo_s=config.latency_slo_s,
            feature_timeout_s=self._settings.feature_timeout_s,
            max_entities=self._settings.max_entities,
            max_feature_age_s=config.max_feature_age_s,
            record=self._record,
            calls=self._calls,
            view_metrics=self._view_metrics,
            skew_log=self._skew_log,
        )
        metrics.queue = batcher
        metrics.padding = padded
        metrics.order = order
        return config, served

    def revision(self, config: ModelConfig) -> str:
        """Describe what of a model lies outside its files: when it changes, load it anew."""
        if config.feature_service is None or self._plans is None:
            return ""
        try:
            return self._plans.compile(Selection(config.feature_service)).digest
        except ModelLoadError as error:
            return str(error)

    def _queue_sizes(self, config: ModelConfig) -> list[int]:
        """Return how many requests may wait: in all, then on each level that has a limit."""
        levels = config.queue_levels
        own = [level.max_queue_size for level in levels if level.max_queue_size]
        return [max_queue_size(levels) or self._settings.max_queue_size, *own]

    def _batcher(self, config: ModelConfig) -> Batcher[Request]:
        return Batcher(
            BatchPolicy(
                config.max_batch_size,
                config.max_queue_delay_s,
                config.preferred_batch_sizes,
                config.allowed_batch_sizes,
            ),
            max_queue_size=self._queue_sizes(config)[0],
            max_queue_bytes=self._settings.max_queue_bytes,
            levels=[LevelPolicy(*level) for level in config.queue_levels],
            default_level=config.default_priority_level,
            executors=executor_count(config),
            overlapping=overlapping_count(config),
            is_fair=self._settings.caller_header is not None,
            codel=None if config.queue_control is None else Codel(*config.queue_control),
        )

    def _order(self, config: ModelConfig, version: int) -> ReplyOrder | None:
        if not config.preserve_ordering:
            return None
        if self._settings.caller_header is not None:
            _LOG.warning(
                "callers_wait_for_one_another", model=config.name, setting="preserve_ordering"
            )
        running = (executor_count(config) + overlapping_count(config)) * config.max_batch_size
        return ReplyOrder(
            f"replies-{config.name}-{version}",
            self._queue_sizes(config)[0] + running,
            self._settings.max_queue_bytes,
        )

    def _join(self, config: ModelConfig) -> FeatureJoin | None:
        if config.feature_service is None:
            return None
        if self._plans is None:
            raise ModelLoadError(
                f"needs feature service '{config.feature_service}', and the server has no "
                "--feature-repo"
            )
        return FeatureJoin(
            plan=self._plans.compile(Selection(config.feature_service)),
            model_inputs=config.inputs,
            model=config.name,
            feature_order=config.feature_order,
            missing_features=config.missing_features,
            max_batch_size=config.max_batch_size,
        )


def executor_count(config: ModelConfig) -> int:
    """Two for an instance on a GPU: one batch is copied and assembled while the other computes."""
    return config.instance_count * (1 if config.gpu_device is None else 2)


def overlapping_count(config: ModelConfig) -> int:
    """One for each instance whose features are read: the next batch's, while this one's come."""
    return 0 if config.feature_service is None else config.instance_count
