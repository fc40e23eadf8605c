"""A model on another server of the Open Inference Protocol: Triton, KServe, another Headrace.

One call per batch, with the batch's rows as raw contents. grpc reconnects by itself; while nobody
answers, requests fail at once with UNAVAILABLE.

Source: Open Inference Protocol, gRPC; Triton's `ModelConfig` extension for the batch size.
"""

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import grpc
import numpy as np
import structlog
from numpy.typing import NDArray
from tritonclient.grpc import service_pb2, service_pb2_grpc

from headrace.errors import (
    BackendError,
    BackendUnavailable,
    DeadlineExceeded,
    InvalidTensor,
    ModelLoadError,
    NotYetLoadable,
    Overloaded,
    ServingError,
)
from headrace.tensors import (
    NUMPY_DTYPES,
    TensorSpec,
    check_bytes,
    encode,
    iterate_bytes,
)

_LOG = structlog.get_logger(__name__)

LOAD_TIMEOUT_S = 5.0
"""For each question about the model."""

MAX_MESSAGE_BYTES = 256 << 20

_OPTIONS = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.enable_http_proxy", 0),  # the address is the server's
)


class RemoteModel(Protocol):
    """Where the model is: `repository.config.RemoteModel`."""

    @property
    def address(self) -> str: ...

    @property
    def model(self) -> str: ...

    @property
    def version(self) -> str: ...

    @property
    def is_tls(self) -> bool: ...

    @property
    def root_certificates(self) -> str | None: ...

    @property
    def timeout_s(self) -> float: ...


class OipBackend:
    """
    One model of another server. See `backends.base.Backend`; made by `load_oip`.

    Args:
        model: The name used in messages.
        remote: Where it is.
        channel: To the server; owned by this object from now on.
        inputs: What the model takes there.
        outputs: What it is asked for.
        max_batch_size: What the server says; None when it does not.

    Attributes:
        max_batch_size: As given.
    """

    is_remote = True

    def __init__(
        self,
        model: str,
        remote: RemoteModel,
        channel: grpc.Channel,
        inputs: Sequence[TensorSpec],
        outputs: Sequence[TensorSpec],
        max_batch_size: int | None,
    ) -> None:
        self.inputs = tuple(inputs)
        self.outputs = tuple(outputs)
        self.max_batch_size = max_batch_size
        self._model = model
        self._remote = remote
        self._channel = channel
        self._infer = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer
        self._log_again_s = 0.0

    def infer(
        self,
        inputs: Mapping[str, NDArray[np.generic]],
        timeout_s: float | None = None,
        traceparent: str | None = None,
    ) -> Sequence[NDArray[np.generic]]:
        """
        Run the model once, there.

        Raises:
            BackendUnavailable: nobody answers, or not within the model's own limit.
            DeadlineExceeded: not within `timeout_s`, which is no longer than that.
            Overloaded: the server has too much to do.
            BackendError: it failed on these inputs, or answered something else.
        """
        request = service_pb2.ModelInferRequest(
            model_name=self._remote.model, model_version=self._remote.version
        )
        for spec in self.inputs:
            array = inputs[spec.name]
            request.inputs.add(name=spec.name, datatype=spec.datatype, shape=array.shape)
            try:
                request.raw_input_contents.append(encode(np.asarray(array, spec.dtype)))
            except (TypeError, ValueError):
                raise self._failed() from None
        for spec in self.outputs:
            request.outputs.add(name=spec.name)
        limit_s = self._remote.timeout_s
        is_hurried = timeout_s is not None and timeout_s <= limit_s
        try:
            reply = self._infer(
                request,
                timeout=timeout_s if is_hurried else limit_s,
                metadata=None if traceparent is None else (("traceparent", traceparent),),
            )
        except grpc.RpcError as error:
            raise self._as_error(error, is_hurried=is_hurried) from None
        given = {output.name: i for i, output in enumerate(reply.outputs)}
        try:
            return [_read(spec, reply, given[spec.name]) for spec in self.outputs]
        except (KeyError, IndexError, ValueError, InvalidTensor) as error:
            self._log(f"unexpected answer: {error}")
            raise self._failed() from None

    def close(self) -> None:
        """Close the connection."""
        self._channel.close()

    def _as_error(self, error: Any, *, is_hurried: bool) -> ServingError:
        code = error.code()
        self._log(f"{code.name}: {error.details()}")
        if code is grpc.StatusCode.UNAVAILABLE:
            return BackendUnavailable(f"the server of model '{self._model}' does not answer")
        if code is grpc.StatusCode.DEADLINE_EXCEEDED:
            late = f"the server of model '{self._model}' did not answer in time"
            return DeadlineExceeded(late) if is_hurried else BackendUnavailable(late)
        if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
            return Overloaded(f"the server of model '{self._model}' has too much to do")
        return self._failed()

    def _failed(self) -> BackendError:
        return BackendError(f"model '{self._model}' failed on this batch")

    def _log(self, reason: str) -> None:
        # Callers can make it fail as often as they like; the log shows one failure a second.
        now_s = time.monotonic()
        if now_s >= self._log_again_s:
            self._log_again_s = now_s + 1.0
            _LOG.warning("oip_failed", model=self._model, error=reason)


def load_oip(model: str, remote: RemoteModel, version: Path) -> OipBackend:
    """
    Connect to a model on another server and ask for its signature.

    Args:
        model: The name used in messages.
        remote: Where it is.
        version: The version's folder, where the certificates are.

    Raises:
        NotYetLoadable: the server does not answer, or the model is not ready there.
        ModelLoadError: it has tensors that no request can carry, or the certificates are unusable.
    """
    channel = _connect(remote, version)
    try:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        try:
            metadata = stub.ModelMetadata(
                service_pb2.ModelMetadataRequest(name=remote.model, version=remote.version),
                timeout=LOAD_TIMEOUT_S,
            )
        except grpc.RpcError as error:
            code = error.code()
            _LOG.warning("oip_load_failed", model=model, code=code.name, error=error.details())
            if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
                raise NotYetLoadable("the model's server does not answer") from None
            raise NotYetLoadable(f"the model's server does not have it ({code.name})") from None
        inputs = [_spec("input", tensor) for tensor in metadata.inputs]
        outputs = [_spec("output", tensor) for tensor in metadata.outputs]
        max_batch_size = _ask_max_batch_size(stub, remote)
    except BaseException:
        channel.close()
        raise
    return OipBackend(model, remote, channel, inputs, outputs, max_batch_size)


def _connect(remote: RemoteModel, version: Path) -> grpc.Channel:
    if not remote.is_tls:
        return grpc.insecure_channel(remote.address, options=_OPTIONS)
    authorities = None
    if remote.root_certificates is not None:
        try:
            authorities = (version / remote.root_certificates).read_bytes()
        except OSError as error:
            raise ModelLoadError(f"{remote.root_certificates}: {error.strerror}") from None
    credentials = grpc.ssl_channel_credentials(root_certificates=authorities)
    return grpc.secure_channel(remote.address, credentials, options=_OPTIONS)


def _ask_max_batch_size(stub: Any, remote: RemoteModel) -> int | None:
    try:
        reply = stub.ModelConfig(
            service_pb2.ModelConfigRequest(name=remote.model, version=remote.version),
            timeout=LOAD_TIMEOUT_S,
        )
    except grpc.RpcError:  # an extension: not every server has it
        return None
    return int(reply.config.max_batch_size)


def _spec(kind: str, tensor: Any) -> TensorSpec:
    if tensor.datatype not in NUMPY_DTYPES:
        raise ModelLoadError(
            f"{kind} '{tensor.name}' of the remote model is {tensor.datatype}; "
            f"expected one of {', '.join(NUMPY_DTYPES)}"
        )
    return TensorSpec(tensor.name, tensor.datatype, tuple(tensor.shape))


def _read(spec: TensorSpec, reply: Any, i: int) -> NDArray[np.generic]:
    """
    Turn one output into an array.

    Raises:
        ValueError: it is not what the model declares, or has no raw contents.
        IndexError: likewise.
        InvalidTensor: likewise.
    """
    output = reply.outputs[i]
    if output.datatype != spec.datatype:
        raise ValueError(f"output '{spec.name}' is {output.datatype}")
    raw, shape = reply.raw_output_contents[i], tuple(output.shape)
    if any(dim < 0 for dim in shape):
        raise ValueError(f"output '{spec.name}' has the shape {list(shape)}")
    if spec.datatype == "BYTES":
        check_bytes(raw, math.prod(shape), spec.name, "")
        elements = np.empty(math.prod(shape), np.object_)
        elements[:] = list(iterate_bytes(raw))
        return elements.reshape(shape)
    return np.frombuffer(raw, spec.dtype).reshape(shape)
