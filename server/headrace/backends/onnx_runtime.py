"""ONNX Runtime in process, on the CPU or a GPU.

One session serves all executors of a model version: `run` is thread-safe and releases the
interpreter lock. What was measured, for a one-row batch of a small model: `run` with prepared
output names and run options costs less than I/O binding and far less than `OrtValue`s, and less
than a microsecond more than ONNX Runtime's own binding underneath.
"""

import threading
import time
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import onnxruntime
import structlog
from numpy.typing import NDArray

from headrace.backends import cuda
from headrace.errors import BackendError, InvalidTensor, ModelLoadError
from headrace.tensors import TensorSpec

_LOG = structlog.get_logger(__name__)

_DATATYPES = {
    "tensor(bool)": "BOOL",
    "tensor(uint8)": "UINT8",
    "tensor(uint16)": "UINT16",
    "tensor(uint32)": "UINT32",
    "tensor(uint64)": "UINT64",
    "tensor(int8)": "INT8",
    "tensor(int16)": "INT16",
    "tensor(int32)": "INT32",
    "tensor(int64)": "INT64",
    "tensor(float16)": "FP16",
    "tensor(float)": "FP32",
    "tensor(double)": "FP64",
    "tensor(string)": "BYTES",
}

_EXECUTION_MODES = {
    "sequential": onnxruntime.ExecutionMode.ORT_SEQUENTIAL,
    "parallel": onnxruntime.ExecutionMode.ORT_PARALLEL,
}
_GRAPH_OPTIMIZATIONS = {
    "all": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL,
    "extended": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    "basic": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "disabled": onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL,
}

# Its own lines go to stderr and name paths; whatever fails is raised as well, and logged here.
_FATAL = 4
onnxruntime.set_default_logger_severity(_FATAL)

# Building sessions side by side is not safe everywhere (onnxruntime issue 27089).
_LOADING = threading.Lock()


class SessionConfig(Protocol):
    """The part of a model's configuration that a session needs: `repository.config.ModelConfig`."""

    @property
    def name(self) -> str: ...

    @property
    def outputs(self) -> Sequence[TensorSpec]:
        """What callers may get; empty for everything that the model returns."""

    @property
    def gpu_device(self) -> int | None:
        """Which GPU; None for the CPU."""

    @property
    def gpu_options(self) -> Sequence[tuple[str, str]]:
        """What it sets there, in ONNX Runtime's names."""

    @property
    def intra_op_thread_count(self) -> int: ...

    @property
    def inter_op_thread_count(self) -> int: ...

    @property
    def execution_mode(self) -> Literal["sequential", "parallel"]: ...

    @property
    def graph_optimization(self) -> Literal["all", "extended", "basic", "disabled"]: ...

    @property
    def enable_mem_arena(self) -> bool: ...

    @property
    def enable_mem_pattern(self) -> bool: ...


class OnnxRuntimeBackend:
    """
    One loaded ONNX model. See `backends.base.Backend`; made by `load_onnx`.

    BYTES are text: ONNX strings are UTF-8. Outputs are freshly made, C-contiguous arrays.

    Args:
        model: The name used in messages.
        session: Owned by this object from now on.
        inputs: What the session takes.
        outputs: What it is asked for.
    """

    is_remote = False

    def __init__(
        self,
        model: str,
        session: onnxruntime.InferenceSession,
        inputs: Sequence[TensorSpec],
        outputs: Sequence[TensorSpec],
    ) -> None:
        self.inputs = tuple(inputs)
        self.outputs = tuple(outputs)
        self._model = model
        self._session = session
        self._run_options = onnxruntime.RunOptions()  # else made anew for each run
        self._output_names = [spec.name for spec in outputs]
        self._log_again_s = 0.0
        self._text_inputs = tuple(spec.name for spec in inputs if spec.datatype == "BYTES")

    def infer(
        self,
        inputs: Mapping[str, NDArray[np.generic]],
        timeout_s: float | None = None,  # noqa: ARG002 a run cannot be ended
        traceparent: str | None = None,  # noqa: ARG002 nothing is called
    ) -> Sequence[NDArray[np.generic]]:
        """
        Run the model once.

        Raises:
            InvalidTensor: a BYTES element is not UTF-8.
            BackendError: the model failed on these inputs.
        """
        if self._text_inputs:
            inputs = {**inputs, **{name: self._text(name, inputs) for name in self._text_inputs}}
        try:
            results: Sequence[NDArray[np.generic]] = self._session.run(
                self._output_names, inputs, self._run_options
            )
        except Exception as error:  # its exceptions share no other base
            self._log(error)
            raise BackendError(f"model '{self._model}' failed on this batch") from error
        return results

    def close(self) -> None:
        del self._session

    def _log(self, error: Exception) -> None:
        # Callers can make a model fail as often as they like; the log shows one failure a second.
        now_s = time.monotonic()
        if now_s >= self._log_again_s:
            self._log_again_s = now_s + 1.0
            _LOG.warning("onnx_runtime_failed", model=self._model, error=str(error))

    def _text(self, name: str, inputs: Mapping[str, NDArray[np.generic]]) -> NDArray[np.generic]:
        # ONNX Runtime takes `str(element)` of an object array: b"a" would become the text "b'a'".
        array = inputs[name]
        text = np.empty(array.size, np.object_)
        try:
            text[:] = [element.decode() for element in array.ravel().tolist()]
        except UnicodeDecodeError:
            raise InvalidTensor(
                f"input '{name}' for model '{self._model}' has BYTES elements that are not UTF-8"
            ) from None
        return text.reshape(array.shape)


def load_onnx(path: Path, config: SessionConfig) -> OnnxRuntimeBackend:
    """
    Load an ONNX model for the CPU, or for the GPU that it asks for and nothing else.

    Weights kept in files beside the model are read from its own folder or below; ONNX Runtime
    refuses every path and symbolic link that leads out of it. Custom operators are never loaded.

    Args:
        path: The `model.onnx`.
        config: Thread counts and graph options; when it lists outputs, only these are computed,
            and the others may be of any type.

    Raises:
        ModelLoadError: the GPU cannot be had; not a model, one for which ONNX Runtime lacks
            something, or one with an input or output that no request can carry (sequence, map,
            sparse tensor, bfloat16, …).
    """
    providers: list[Any] = ["CPUExecutionProvider"]
    with _LOADING:
        if config.gpu_device is not None:
            available = onnxruntime.get_available_providers()
            providers = cuda.providers(config.gpu_device, dict(config.gpu_options), available)
            cuda.check_device(config.gpu_device)
            _preload_cuda()
        try:
            session = onnxruntime.InferenceSession(
                path,
                _session_options(config),
                providers=providers,
                enable_fallback=0,
            )
        except Exception as error:  # its exceptions share no other base
            # Its text names absolute paths and source files: for the log only.
            _LOG.warning("onnx_runtime_load_failed", model=config.name, error=str(error))
            reason = type(error).__name__
            raise ModelLoadError(f"{path.name}: ONNX Runtime cannot load it ({reason})") from error
    if config.gpu_device is not None:
        cuda.check_session(session.get_providers())
        session.disable_fallback()
    listed = {spec.name for spec in config.outputs}
    return OnnxRuntimeBackend(
        config.name,
        session,
        [_spec("input", node) for node in session.get_inputs()],
        [
            _spec("output", node)
            for node in session.get_outputs()
            if not listed or node.name in listed
        ],
    )


@cache
def _preload_cuda() -> None:
    cuda.preload(onnxruntime.preload_dlls)


def _session_options(config: SessionConfig) -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = config.intra_op_thread_count
    options.inter_op_num_threads = config.inter_op_thread_count
    options.execution_mode = _EXECUTION_MODES[config.execution_mode]
    options.graph_optimization_level = _GRAPH_OPTIMIZATIONS[config.graph_optimization]
    options.enable_cpu_mem_arena = config.enable_mem_arena
    options.enable_mem_pattern = config.enable_mem_pattern
    options.log_severity_level = _FATAL
    # A pool that spins after each run takes its cores from the threads that feed it.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    return options


def _spec(kind: str, node: onnxruntime.NodeArg) -> TensorSpec:
    if node.type not in _DATATYPES:
        raise ModelLoadError(
            f"{kind} '{node.name}' of the model is {node.type}; "
            f"expected one of {', '.join(_DATATYPES)}"
        )
    # Named and unknown dimensions are text and None.
    shape = tuple(dim if isinstance(dim, int) and dim >= 0 else -1 for dim in node.shape)
    return TensorSpec(node.name, _DATATYPES[node.type], shape)
