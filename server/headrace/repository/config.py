"""A model's `config.pbtxt`: parsed and checked; `completion` holds it against the model.

Source: Triton, `model_config.proto` and "Model Configuration"; for the parameters of the ONNX
Runtime backend, "Model Config Options" in that backend's README.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from google.protobuf import text_format
from google.protobuf.message import Message
from tritonclient.grpc import model_config_pb2

from headrace.repository.parameters import (
    FEATURE_PARAMETERS,
    REMOTE_PARAMETERS,
    Parameters,
    shown,
    wrong,
)
from headrace.repository.placement import gpu_device, gpu_options, instance_count
from headrace.repository.policy import VersionPolicy
from headrace.repository.queueing import (
    QueueControl,
    QueueLevel,
    allowed_batch_sizes,
    preferred_batch_sizes,
    preserve_ordering,
    queue_control,
    queue_delay_s,
    queue_levels,
)
from headrace.repository.shapes import BucketRules, shape_buckets
from headrace.tensors import TensorSpec

PLATFORM = "onnxruntime_onnx"
BACKEND = "onnxruntime"
REMOTE_BACKEND = "oip"
"""Headrace's own: the model runs on another server of the Open Inference Protocol."""

MODEL_FILENAME = "model.onnx"

MAX_THREADS = 1024
MAX_FEATURES = 10_000
MAX_REQUEST_ROWS = 1 << 20

_DATATYPES = {
    "TYPE_BOOL": "BOOL",
    "TYPE_UINT8": "UINT8",
    "TYPE_UINT16": "UINT16",
    "TYPE_UINT32": "UINT32",
    "TYPE_UINT64": "UINT64",
    "TYPE_INT8": "INT8",
    "TYPE_INT16": "INT16",
    "TYPE_INT32": "INT32",
    "TYPE_INT64": "INT64",
    "TYPE_FP16": "FP16",
    "TYPE_FP32": "FP32",
    "TYPE_FP64": "FP64",
    "TYPE_STRING": "BYTES",
}
DATA_TYPES = {datatype: data_type for data_type, datatype in _DATATYPES.items()}

# What this module reads or refuses. Everything else in a file is `without_effect`.
_READ = {
    "name",
    "platform",
    "backend",
    "default_model_filename",
    "max_batch_size",
    "parameters",
    "input.name",
    "input.data_type",
    "input.dims",
    "output.name",
    "output.data_type",
    "output.dims",
    "instance_group.name",
    "instance_group.kind",
    "instance_group.count",
    "instance_group.gpus",
    "dynamic_batching.preferred_batch_size",
    "dynamic_batching.max_queue_delay_microseconds",
    "dynamic_batching.default_queue_policy",
    "dynamic_batching.priority_levels",
    "dynamic_batching.default_priority_level",
    "dynamic_batching.preserve_ordering",
    "dynamic_batching.priority_queue_policy",
    "optimization.graph.level",
    "version_policy",
}
_READ_IN_PART = {path.rpartition(".")[0] for path in _READ} | {"optimization"}

MissingFeaturePolicy = Literal["nan", "default", "reject"]
ExecutionMode = Literal["sequential", "parallel"]
GraphOptimization = Literal["all", "extended", "basic", "disabled"]

_MISSING_FEATURE_POLICIES: dict[str, MissingFeaturePolicy] = {
    "nan": "nan",
    "default": "default",
    "reject": "reject",
}
_EXECUTION_MODES: dict[str, ExecutionMode] = {"0": "sequential", "1": "parallel"}
_GRAPH_OPTIMIZATIONS: dict[int, GraphOptimization] = {
    0: "all",
    -1: "basic",
    1: "extended",
    2: "disabled",
}
_SWITCHES = {"0": False, "1": True, "false": False, "true": True}


@dataclass(frozen=True, slots=True)
class RemoteModel:
    """
    Where a model runs, when it is elsewhere.

    Args:
        address: host:port of the server.
        model: Its name there.
        version: Its version there; empty for the server's choice.
        is_tls: Whether to talk TLS.
        root_certificates: File in the version's folder with the authorities to trust; the
            system's when None.
        timeout_s: Longest that one batch may take, when no caller's deadline ends sooner.
    """

    address: str
    model: str
    version: str = ""
    is_tls: bool = False
    root_certificates: str | None = None
    timeout_s: float = 1.0


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """
    What a model's folder says about serving it.

    Args:
        name: The folder's name.
        max_batch_size: Most rows in a batch; 0 for a model without a batch dimension.
        inputs: What the ONNX model takes, −1 for the batch dimension first when there is one.
            Empty when the file does not say; `complete` fills it.
        outputs: What callers get, in reply order; a part of the ONNX model's outputs. As `inputs`.
        max_queue_delay_s: Longest wait for a better batch; 0 sends at once what waits.
        preferred_batch_sizes: Row counts worth waiting for, ascending.
        allowed_batch_sizes: Row counts that the model is run with, ascending; empty for all.
        queue_levels: How requests of each priority level wait, of level 1 first.
        default_priority_level: Of a request that names none.
        preserve_ordering: Whether replies leave in the order in which requests came.
        max_request_rows: Most rows in one request, which is split over several batches; 0 for no
            more than one batch holds.
        shape_buckets: How requests of different shapes share a batch; None if they do not.
        queue_control: What is done about a queue that stands; None for nothing.
        instance_count: Executors that run the model side by side.
        version_policy: Which versions serve.
        remote: Where the model runs, when it is elsewhere.
        gpu_device: Which GPU it runs on; None for the CPU.
        gpu_options: What it sets there, in the names and values of ONNX Runtime's CUDA provider.
        feature_service: Feast feature service joined to each row.
        feature_order: Names of the input's columns; None for the service's own order.
        missing_features: What the model gets for a missing feature.
        max_feature_age_s: Older values are missing; None leaves it to each view's own TTL.
        latency_slo_s: Time budget of a request whose caller sets no deadline, in seconds. Checked
            and shown; nothing acts on it before there is admission control.
        intra_op_thread_count: Threads inside one operator; 0 lets ONNX Runtime take every core.
            1 by default, unlike Triton's 0: a small model gains nothing from a second thread, and
            thread pools of several models would fight over the same cores.
        inter_op_thread_count: Threads across operators, in parallel mode only; 0 as above.
        execution_mode: Whether independent operators may run side by side.
        graph_optimization: How far ONNX Runtime rewrites the graph.
        enable_mem_arena: Whether freed memory is kept for the next run.
        enable_mem_pattern: Whether allocations of a run are planned from the last one.
        without_effect: Settings that the file has and this server does not use, for the log.
        message: The `inference.ModelConfig` message itself. Not to be changed.
    """

    name: str
    max_batch_size: int = 0
    inputs: tuple[TensorSpec, ...] = ()
    outputs: tuple[TensorSpec, ...] = ()
    max_queue_delay_s: float = 0.0
    preferred_batch_sizes: tuple[int, ...] = ()
    allowed_batch_sizes: tuple[int, ...] = ()
    queue_levels: tuple[QueueLevel, ...] = (QueueLevel(),)
    default_priority_level: int = 1
    preserve_ordering: bool = False
    max_request_rows: int = 0
    shape_buckets: BucketRules | None = None
    queue_control: QueueControl | None = None
    instance_count: int = 1
    version_policy: VersionPolicy = field(default_factory=VersionPolicy)
    remote: RemoteModel | None = None
    gpu_device: int | None = None
    gpu_options: tuple[tuple[str, str], ...] = ()
    feature_service: str | None = None
    feature_order: tuple[str, ...] | None = None
    missing_features: MissingFeaturePolicy = "nan"
    max_feature_age_s: float | None = None
    latency_slo_s: float | None = None
    intra_op_thread_count: int = 1
    inter_op_thread_count: int = 1
    execution_mode: ExecutionMode = "sequential"
    graph_optimization: GraphOptimization = "all"
    enable_mem_arena: bool = True
    enable_mem_pattern: bool = True
    without_effect: tuple[str, ...] = ()
    message: Any = field(default_factory=model_config_pb2.ModelConfig, compare=False, repr=False)

    @property
    def uses_tf32(self) -> bool:
        """Whether FP32 products keep ten bits of their factors, as many as FP16 has."""
        return ("use_tf32", "1") in self.gpu_options


def parse_config(text: str, model_name: str) -> ModelConfig:
    """
    Read `config.pbtxt`.

    A setting that would change what the model answers and that this server does not have is an
    error; one that only tunes is listed in `without_effect`.

    Args:
        text: The file's text; empty when there is no file.
        model_name: The folder's name.

    Raises:
        ModelLoadError: the text is not an `inference.ModelConfig`, or asks for what cannot be done.
    """
    message = _parse_text(text)
    if message.name not in ("", model_name):
        raise wrong(f"name is {shown(message.name)}; expected '{model_name}', as the folder")
    _refuse_unsupported(message)
    if message.max_batch_size < 0:
        raise wrong(f"max_batch_size is {message.max_batch_size}; expected 0 or more")
    message.name = model_name
    parameters = Parameters(message)
    feature_service = parameters.text("feature_service")
    if feature_service is None:
        for key in FEATURE_PARAMETERS:
            if parameters.text(key) is not None:
                raise wrong(f"parameter '{key}' needs the parameter 'feature_service'")
    elif parameters.text("shape_buckets") is not None:
        raise wrong("parameter 'shape_buckets' does not go with 'feature_service'")
    latency_slo_ms = parameters.positive("latency_slo_ms")
    device = gpu_device(message.instance_group)
    tuning = gpu_options(parameters)
    config = ModelConfig(
        name=model_name,
        max_batch_size=message.max_batch_size,
        inputs=_tensors("input", message.input, message.max_batch_size),
        outputs=_tensors("output", message.output, message.max_batch_size),
        max_queue_delay_s=queue_delay_s(message.dynamic_batching),
        preferred_batch_sizes=preferred_batch_sizes(message.dynamic_batching),
        allowed_batch_sizes=allowed_batch_sizes(parameters.text("allowed_batch_sizes")),
        queue_levels=queue_levels(message.dynamic_batching),
        default_priority_level=message.dynamic_batching.default_priority_level or 1,
        preserve_ordering=preserve_ordering(message.dynamic_batching),
        max_request_rows=parameters.count("max_request_rows", 0, MAX_REQUEST_ROWS),
        shape_buckets=shape_buckets(parameters.text("shape_buckets")),
        queue_control=queue_control(parameters, queue_delay_s(message.dynamic_batching)),
        instance_count=instance_count(message.instance_group),
        gpu_device=device,
        gpu_options=() if device is None else tuning,
        version_policy=_version_policy(message.version_policy),
        remote=_remote(message, parameters, model_name),
        feature_service=feature_service,
        feature_order=_feature_order(parameters.text("feature_order")),
        missing_features=parameters.choice(
            "missing_features", _MISSING_FEATURE_POLICIES, default="nan"
        ),
        max_feature_age_s=parameters.positive("max_feature_age_s"),
        latency_slo_s=None if latency_slo_ms is None else latency_slo_ms / 1000,
        intra_op_thread_count=parameters.count("intra_op_thread_count", 1, MAX_THREADS),
        inter_op_thread_count=parameters.count("inter_op_thread_count", 1, MAX_THREADS),
        execution_mode=parameters.choice("execution_mode", _EXECUTION_MODES, default="sequential"),
        graph_optimization=_graph_optimization(message.optimization.graph.level),
        enable_mem_arena=parameters.choice("enable_mem_arena", _SWITCHES, default=True),
        enable_mem_pattern=parameters.choice("enable_mem_pattern", _SWITCHES, default=True),
        without_effect=tuple(
            sorted(
                {
                    *_unread(message),
                    *parameters.unknown(),
                    *(f"parameters.{key}" for key, _ in tuning if device is None),
                }
            )
        ),
        message=message,
    )
    check_batching(config)
    return config


def _parse_text(text: str) -> Any:
    message = model_config_pb2.ModelConfig()
    try:
        text_format.Parse(text, message)
    except text_format.ParseError as error:
        # The message repeats the position and quotes the line; neither is wanted twice.
        reason = re.sub(r"^\d+:\d+ : ", "", str(error))
        reason = re.sub(r"^'.*': (?=[A-Z])", "", reason, flags=re.DOTALL)
        line, column = error.GetLine(), error.GetColumn()
        where = f"line {line}, column {column}: " if line else ""
        raise wrong(f"{where}{reason[:300]}") from None
    return message


def _refuse_unsupported(message: Any) -> None:
    if message.backend not in ("", BACKEND, REMOTE_BACKEND):
        raise wrong(
            f"backend is {shown(message.backend)}; expected '{BACKEND}', or '{REMOTE_BACKEND}' for "
            "a model on another server"
        )
    for value, accepted, key in (
        (message.platform, "" if message.backend == REMOTE_BACKEND else PLATFORM, "platform"),
        (message.default_model_filename, MODEL_FILENAME, "default_model_filename"),
    ):
        if value not in ("", accepted):
            raise wrong(f"{key} is {shown(value)}; expected '{accepted}'")
    for is_there, key in (
        (message.HasField("sequence_batching"), "sequence_batching"),
        (message.HasField("ensemble_scheduling"), "ensemble_scheduling"),
        (message.model_transaction_policy.decoupled, "model_transaction_policy.decoupled"),
        (message.batch_input, "batch_input"),
        (message.batch_output, "batch_output"),
        (message.cc_model_filenames, "cc_model_filenames"),
        (message.model_operations.op_library_filename, "model_operations.op_library_filename"),
        (message.model_repository_agents.agents, "model_repository_agents"),
        (
            message.optimization.execution_accelerators.ListFields(),
            "optimization.execution_accelerators",
        ),
    ):
        if is_there:
            raise wrong(f"{key} is not supported by this server")


def _remote(message: Any, parameters: Parameters, model_name: str) -> RemoteModel | None:
    if message.backend != REMOTE_BACKEND:
        for key in REMOTE_PARAMETERS:
            if parameters.text(key) is not None:
                raise wrong(f"parameter '{key}' needs backend: \"{REMOTE_BACKEND}\"")
        return None
    address = parameters.text("oip_address")
    if address is None or not re.fullmatch(r"[^\s/]+:[0-9]{1,5}", address):
        raise wrong("backend 'oip' needs the parameter 'oip_address', host:port")
    version = parameters.text("oip_version") or ""
    if not re.fullmatch(r"[0-9]{0,18}", version):
        raise wrong(f"parameter 'oip_version' is {shown(version)}; expected a number")
    certificates = parameters.text("oip_tls_root_certificates")
    if certificates is not None and not re.fullmatch(r"[\w-][\w.-]*", certificates):
        raise wrong("parameter 'oip_tls_root_certificates' is not a file in the version's folder")
    return RemoteModel(
        address,
        parameters.text("oip_model") or model_name,
        version,
        is_tls=parameters.choice("oip_tls", _SWITCHES, default=False) or certificates is not None,
        root_certificates=certificates,
        timeout_s=parameters.positive("oip_timeout_s") or 1.0,
    )


def _version_policy(message: Any) -> VersionPolicy:
    if message.HasField("specific"):
        numbers = frozenset(message.specific.versions)
        if not numbers or min(numbers) < 1:
            raise wrong("version_policy.specific needs versions, each above 0")
        return VersionPolicy("specific", numbers=numbers)
    if message.HasField("all"):
        return VersionPolicy("all")
    return VersionPolicy("latest", max(1, message.latest.num_versions))


def _unread(message: Message, path: str = "") -> Iterator[str]:
    for descriptor, value in message.ListFields():
        name = path + descriptor.name
        if name in _READ_IN_PART:
            for part in [value] if isinstance(value, Message) else value:
                yield from _unread(part, name + ".")
        elif name not in _READ:
            yield name


def _tensors(kind: str, entries: Sequence[Any], max_batch_size: int) -> tuple[TensorSpec, ...]:
    specs: dict[str, TensorSpec] = {}
    for entry in entries:
        if not entry.name:
            raise wrong(f"an {kind} has no name")
        if entry.name in specs:
            raise wrong(f"{kind} '{entry.name}' is listed twice")
        data_type = model_config_pb2.DataType.Name(entry.data_type)
        if data_type == "TYPE_INVALID":
            raise wrong(f"{kind} '{entry.name}' has no data_type")
        if data_type not in _DATATYPES:
            raise wrong(
                f"{kind} '{entry.name}' has data_type {data_type}; "
                f"expected one of {', '.join(_DATATYPES)}"
            )
        _refuse_unsupported_tensor(kind, entry)
        for dim in entry.dims:
            if dim != -1 and dim < 1:
                raise wrong(f"{kind} '{entry.name}' has the dim {dim}; expected -1 or above 0")
        batch = (-1,) if max_batch_size else ()
        specs[entry.name] = TensorSpec(entry.name, _DATATYPES[data_type], (*batch, *entry.dims))
    return tuple(specs.values())


def _refuse_unsupported_tensor(kind: str, entry: Any) -> None:
    if entry.HasField("reshape"):
        raise wrong(
            f"reshape of {kind} '{entry.name}' is not supported by this server; give the model's "
            "own dims (none for one value per row)"
        )
    for key in ("is_shape_tensor", "allow_ragged_batch", "optional", "is_non_linear_format_io"):
        if getattr(entry, key, False):  # an output has a part of them
            raise wrong(f"{key} of {kind} '{entry.name}' is not supported by this server")


def _feature_order(text: str | None) -> tuple[str, ...] | None:
    if text is None:
        return None
    expected = "expected a JSON list of feature names, each once"
    try:
        names = json.loads(text)
    except (ValueError, RecursionError):
        raise wrong(f"parameter 'feature_order' is not JSON; {expected}") from None
    if (
        not isinstance(names, list)
        or not 0 < len(names) <= MAX_FEATURES
        or not all(isinstance(name, str) and name for name in names)
        or len(set(names)) != len(names)
    ):
        raise wrong(f"parameter 'feature_order' is {shown(text)}; {expected}")
    return tuple(names)


def _graph_optimization(level: int) -> GraphOptimization:
    if level not in _GRAPH_OPTIMIZATIONS:
        raise wrong(f"optimization.graph.level is {level}; expected -1, 0, 1 or 2")
    return _GRAPH_OPTIMIZATIONS[level]


def check_batching(config: ModelConfig) -> None:
    """
    Check what depends on the batch size.

    Raises:
        ModelLoadError: it does not fit.
    """
    if config.max_batch_size == 0:
        if not config.inputs and not config.outputs:
            return  # `complete` will say
        if config.allowed_batch_sizes:
            raise wrong("parameter 'allowed_batch_sizes' needs a max_batch_size above 0")
        if config.max_request_rows:
            raise wrong("parameter 'max_request_rows' needs a max_batch_size above 0")
        if config.message.HasField("dynamic_batching"):
            raise wrong("dynamic_batching needs a max_batch_size above 0")
    elif config.allowed_batch_sizes[-1:] not in ((), (config.max_batch_size,)):
        raise wrong(
            f"parameter 'allowed_batch_sizes' ends with {config.allowed_batch_sizes[-1]}; "
            f"expected max_batch_size, {config.max_batch_size}, as the last"
        )
    elif 0 < config.max_request_rows <= config.max_batch_size:
        raise wrong(
            f"parameter 'max_request_rows' is {config.max_request_rows}; expected more than "
            f"max_batch_size, {config.max_batch_size}, or 0: only a larger request is split"
        )
    elif config.preferred_batch_sizes[-1:] > (config.max_batch_size,):
        raise wrong(
            f"preferred_batch_size has {config.preferred_batch_sizes[-1]}; "
            f"expected at most max_batch_size, {config.max_batch_size}"
        )
