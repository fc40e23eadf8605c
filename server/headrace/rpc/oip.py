"""The Open Inference Protocol's ordinary methods: live, ready, metadata, configuration."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import grpc
from tritonclient.grpc import model_config_pb2, service_pb2

import headrace
from headrace.catalog import Catalog, ModelEntry
from headrace.errors import ModelUnavailable
from headrace.predict import ServedModel
from headrace.rpc.status import status_of
from headrace.tensors import TensorSpec

SERVICE = "inference.GRPCInferenceService"

EXTENSIONS = ("model_configuration", "binary_tensor_data", "parameters")
"""Only what is implemented. Source: Triton, "Extensions" of the KServe protocol."""

RequestT = TypeVar("RequestT")


class OipServicer:
    """
    Answers what is asked rarely, on the ordinary server's threads.

    Args:
        catalog: Returns the models as they are now.
        is_ready: Whether the server as a whole is ready.
    """

    def __init__(self, catalog: Callable[[], Catalog], is_ready: Callable[[], bool]) -> None:
        self._catalog = catalog
        self._is_ready = is_ready

    def handler(self) -> "grpc.GenericRpcHandler[Any, Any]":
        """Return the handler to add to a server; methods not named here are UNIMPLEMENTED."""
        return grpc.method_handlers_generic_handler(
            SERVICE,
            {
                "ServerLive": _unary(self.server_live, service_pb2.ServerLiveRequest),
                "ServerReady": _unary(self.server_ready, service_pb2.ServerReadyRequest),
                "ModelReady": _unary(self.model_ready, service_pb2.ModelReadyRequest),
                "ServerMetadata": _unary(self.server_metadata, service_pb2.ServerMetadataRequest),
                "ModelMetadata": _unary(self.model_metadata, service_pb2.ModelMetadataRequest),
                "ModelConfig": _unary(self.model_config, service_pb2.ModelConfigRequest),
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

    def _find(self, request: Any) -> tuple[ModelEntry, ServedModel]:
        catalog = self._catalog()
        served = catalog.find(request.name, request.version)
        entry = catalog.entry(request.name)
        if entry.config is None:
            raise ModelUnavailable(f"model '{request.name}' has no configuration")
        return entry, served


def _unary(answer: Callable[[Any], Any], request_class: Any) -> "grpc.RpcMethodHandler[Any, Any]":
    def behave(request: Any, context: grpc.ServicerContext) -> Any:
        try:
            return answer(request)
        except Exception as error:
            status = status_of(error)
            context.set_trailing_metadata(status.trailing)
            context.abort(status.code, status.details)

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
