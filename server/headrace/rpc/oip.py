"""The Open Inference Protocol's ordinary methods: live, ready, metadata, the model repository."""

from collections.abc import Callable, Sequence
from concurrent import futures
from typing import Any, Protocol, TypeVar

import grpc
from tritonclient.grpc import model_config_pb2, service_pb2

import headrace
from headrace.catalog import Catalog, ModelEntry
from headrace.errors import (
    DeadlineExceeded,
    InvalidRequest,
    ModelLoadError,
    ModelUnavailable,
    NotReady,
    PreconditionFailed,
)
from headrace.predict import ServedModel
from headrace.rpc.log_settings import ChangeLevel, LogSettings
from headrace.rpc.status import status_of
from headrace.tensors import TensorSpec

SERVICE = "inference.GRPCInferenceService"

EXTENSIONS = (
    *("model_configuration", "model_repository", "binary_tensor_data", "parameters"),
    "logging",
)
"""Only what is implemented. Source: Triton, "Extensions" of the KServe protocol."""

NAME_BYTES_MAX = 255
"""Of a model that is loaded or unloaded, as of a folder. Source: `NAME_MAX`, limits.h."""

LOAD_TIMEOUT_S = 300.0
"""How long a call waits for the load that it asked for. The load goes on when its caller leaves."""

RequestT = TypeVar("RequestT")


class Repository(Protocol):
    """The part of `repository.manager.RepositoryManager` that callers can reach."""

    @property
    def mode(self) -> str: ...

    def load(self, name: str, timeout_s: float) -> None: ...

    def unload(self, name: str, timeout_s: float) -> None: ...


class OipServicer:
    """
    Answers what is asked rarely, on the ordinary server's threads.

    Args:
        catalog: Returns the models as they are now.
        repository: Loads and unloads on request.
        is_ready: Whether the server as a whole is ready.
        change_log_level: On request; None where callers may not.
    """

    def __init__(
        self,
        catalog: Callable[[], Catalog],
        repository: Repository,
        is_ready: Callable[[], bool],
        change_log_level: ChangeLevel | None = None,
    ) -> None:
        self._catalog = catalog
        self._repository = repository
        self._is_ready = is_ready
        self._log_settings = LogSettings(change_log_level)
        # Loads take their time: health and metadata must not wait behind them.
        self._slow_calls = futures.ThreadPoolExecutor(2, thread_name_prefix="model-control")
        self._log_calls = futures.ThreadPoolExecutor(1, thread_name_prefix="log-control")

    def handler(self) -> "grpc.GenericRpcHandler[Any, Any]":
        """Return the handler to add to a server; methods not named here are UNIMPLEMENTED."""
        return grpc.method_handlers_generic_handler(
            SERVICE,
            {
                "ServerLive": unary(self.server_live, service_pb2.ServerLiveRequest),
                "ServerReady": unary(self.server_ready, service_pb2.ServerReadyRequest),
                "ModelReady": unary(self.model_ready, service_pb2.ModelReadyRequest),
                "ServerMetadata": unary(self.server_metadata, service_pb2.ServerMetadataRequest),
                "ModelMetadata": unary(self.model_metadata, service_pb2.ModelMetadataRequest),
                "ModelConfig": unary(self.model_config, service_pb2.ModelConfigRequest),
                "RepositoryIndex": unary(self.repository_index, service_pb2.RepositoryIndexRequest),
                "LogSettings": unary(
                    self._log_settings.answer, service_pb2.LogSettingsRequest, self._log_calls
                ),
                "RepositoryModelLoad": unary(
                    self.repository_model_load,
                    service_pb2.RepositoryModelLoadRequest,
                    self._slow_calls,
                ),
                "RepositoryModelUnload": unary(
                    self.repository_model_unload,
                    service_pb2.RepositoryModelUnloadRequest,
                    self._slow_calls,
                ),
            },
        )

    def server_live(self, _request: Any) -> Any:
        return service_pb2.ServerLiveResponse(live=True)

    def server_ready(self, _request: Any) -> Any:
        return service_pb2.ServerReadyResponse(ready=self._is_ready())

    def model_ready(self, request: Any) -> Any:
        ready = self._catalog().is_ready(request.name, request.version)
        return service_pb2.ModelReadyResponse(ready=ready)

    def server_metadata(self, _request: Any) -> Any:
        return service_pb2.ServerMetadataResponse(
            name="headrace", version=headrace.__version__, extensions=EXTENSIONS
        )

    def model_metadata(self, request: Any) -> Any:
        entry, served = self._find(request)
        batched = bool(served.signature.max_batch_size)
        return service_pb2.ModelMetadataResponse(
            name=served.name,
            versions=[str(number) for number in sorted(entry.versions)],
            platform=entry.config.message.platform if entry.config else "",
            inputs=_metadata(served.signature.inputs, batched=batched),
            outputs=_metadata(served.signature.outputs, batched=batched),
        )

    def model_config(self, request: Any) -> Any:
        entry, served = self._find(request)
        assert entry.config is not None
        config = model_config_pb2.ModelConfig()
        config.CopyFrom(entry.config.message)
        config.name = served.name
        if served.join is not None:
            # Callers send entities; only the file describes the model's own inputs.
            del config.input[:]
            for spec in served.signature.inputs:
                config.input.add(
                    name=spec.name, data_type=_config_type(spec.datatype), dims=spec.shape[1:]
                )
        return service_pb2.ModelConfigResponse(config=config)

    def repository_index(self, request: Any) -> Any:
        """List every version with its state, and why it does not serve. Source: Triton."""
        reply = service_pb2.RepositoryIndexResponse()
        for entry in self._catalog().entries.values():
            states = dict.fromkeys(entry.versions, ("READY", ""))
            # A version whose newer files failed goes on serving: ready, with the reason.
            for number, reason in entry.failures.items():
                states[number] = (states.get(number, ("UNAVAILABLE",))[0], reason)
            if entry.loading is not None:
                states.setdefault(entry.loading, ("LOADING", ""))
            for number, (state, reason) in sorted(states.items()):
                if state == "READY" or not request.ready:
                    version = str(number) if number else ""
                    reply.models.add(name=entry.name, version=version, state=state, reason=reason)
        return reply

    def repository_model_load(self, request: Any) -> Any:
        if request.parameters:
            raise InvalidRequest("models are loaded as they lie in the repository: no parameters")
        self._change(self._repository.load, request.model_name)
        return service_pb2.RepositoryModelLoadResponse()

    def repository_model_unload(self, request: Any) -> Any:
        self._change(self._repository.unload, request.model_name)
        return service_pb2.RepositoryModelUnloadResponse()

    def _change(self, change: Callable[[str, float], None], name: str) -> None:
        if self._repository.mode != "explicit":
            raise NotReady(
                "explicit model load / unload is not allowed; start the server with "
                "--model-control-mode explicit"
            )
        size = len(name.encode())
        if size > NAME_BYTES_MAX:  # it would go to every worker, and into the log
            raise InvalidRequest(f"a model's name has at most {NAME_BYTES_MAX} bytes, not {size}")
        try:
            change(name, LOAD_TIMEOUT_S)
        except ModelLoadError as error:
            raise PreconditionFailed(str(error)) from None
        except TimeoutError:
            raise DeadlineExceeded(f"'{name}' is still on its way; see RepositoryIndex") from None

    def _find(self, request: Any) -> tuple[ModelEntry, ServedModel]:
        catalog = self._catalog()
        served = catalog.find(request.name, request.version)
        entry = catalog.entry(request.name)
        if entry.config is None:
            raise ModelUnavailable(f"model '{request.name}' has no configuration")
        return entry, served


def unary(
    answer: Callable[[Any], Any],
    request_class: Any,
    pool: futures.ThreadPoolExecutor | None = None,
) -> "grpc.RpcMethodHandler[Any, Any]":
    """
    Make the handler of an ordinary unary method.

    Args:
        answer: Turns a request into a reply; what it raises becomes the status.
        request_class: Of the messages.
        pool: Where it runs, if not with the others.
    """

    def behave(request: Any, context: grpc.ServicerContext) -> Any:
        try:
            return answer(request)
        except Exception as error:
            status = status_of(error)
            context.set_trailing_metadata(status.trailing)
            context.abort(status.code, status.details)

    if pool is not None:
        behave.experimental_thread_pool = pool  # type: ignore[attr-defined]
    return grpc.unary_unary_rpc_method_handler(
        behave,
        request_deserializer=request_class.FromString,
        response_serializer=lambda reply: reply.SerializeToString(),
    )


def _metadata(specs: Sequence[TensorSpec], *, batched: bool) -> list[Any]:
    return [
        service_pb2.ModelMetadataResponse.TensorMetadata(
            name=spec.name,
            datatype=spec.datatype,
            shape=(-1, *spec.shape[1:]) if batched else spec.shape,
        )
        for spec in specs
    ]


def _config_type(datatype: str) -> Any:
    name = {"BYTES": "STRING"}.get(datatype, datatype)
    return model_config_pb2.DataType.Value(f"TYPE_{name}")
