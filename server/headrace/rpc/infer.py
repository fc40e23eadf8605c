"""`inference.GRPCInferenceService/ModelInfer` as a hot method: protobuf in, requests out, and back.

Source: Open Inference Protocol and Triton's behaviour where it is silent: raw contents out, always;
id and resolved version echoed; requested outputs in request order.
"""

import math
import time
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError
from tritonclient.grpc import service_pb2

from headrace.catalog import Catalog
from headrace.errors import InvalidRequest, InvalidTensor, ServingError
from headrace.predict import AnsweredBatch, Request, ServedModel
from headrace.rpc.ingress import HotCall
from headrace.rpc.status import status_of
from headrace.rpc.wire import delimited, tag
from headrace.telemetry.metrics import Metrics
from headrace.tensors import NUMPY_DTYPES, CheckedInputs, GivenTensor, encode

PATH = "/inference.GRPCInferenceService/ModelInfer"

_ID = tag(3)
_RAW_OUTPUT = tag(6)
_MEMO_SIZE_MAX = 4_096

_TYPED_CONTENTS = {
    "BOOL": "bool_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}
"""Where typed contents of each datatype travel; FP16 travels only raw."""


class ModelInfer:
    """
    The hot method.

    Args:
        catalog: Returns the models as they are now.
        metrics: Counts what is refused.
    """

    path = PATH

    def __init__(self, catalog: Callable[[], Catalog], metrics: Metrics) -> None:
        self._catalog = catalog
        self._metrics = metrics

    def accept(self, call: HotCall, message: bytes) -> None:
        """Parse, check and queue one request; refuse it when it cannot be served."""
        try:
            request = service_pb2.ModelInferRequest.FromString(message)
            model = self._catalog().find(request.model_name, request.model_version)
            inputs = request.inputs
            if inputs and model.join is not None and inputs[0].shape:
                model.check_rows(inputs[0].shape[0])
            checked = model.signature.check(_given(request, model.name))
            outputs = request.outputs
            selection = model.signature.check_outputs(
                [_output_name(output, model.name) for output in outputs] if outputs else ()
            )
            deadline_s = call.deadline_s
            if request.parameters:
                deadline_s = min(deadline_s, _queue_deadline_s(request.parameters))
            model.submit(
                _InferRequest(call, self._metrics, checked, deadline_s, request.id, selection)
            )
        except ServingError as error:
            self._refuse(call, error)
        except DecodeError:
            self._refuse(call, InvalidRequest("the message is not a ModelInferRequest"))
        except Exception as error:
            self._refuse(call, error)

    def _refuse(self, call: HotCall, error: Exception) -> None:
        status = status_of(error)
        self._metrics.rpc_error("ModelInfer", status.code.name)
        call.refuse(status)


class _InferRequest(Request):
    """A `ModelInfer` call in the queue."""

    __slots__ = ("_call", "_id", "_metrics", "_selection")

    def __init__(
        self,
        call: HotCall,
        metrics: Metrics,
        inputs: CheckedInputs,
        deadline_s: float,
        request_id: str,
        selection: tuple[int, ...],
    ) -> None:
        super().__init__(inputs, deadline_s)
        self._call = call
        self._metrics = metrics
        self._id = request_id
        self._selection = selection

    def expired(self, now_s: float) -> bool:
        return self._call.gone or self.deadline_s <= now_s

    def answer(self, batch: AnsweredBatch, start: int, prediction_id: str) -> None:
        stop = start + self.rows
        parts = [_constant_part(batch, self._selection, self.rows)]
        if self._id:
            parts.append(delimited(_ID, self._id.encode()))
        parts.extend((_PREDICTION_ID, prediction_id.encode()))
        if batch.missing_per_row is not None and batch.stale_per_row is not None:
            parts.append(
                _count_parameter("missing_features", sum(batch.missing_per_row[start:stop]))
            )
            parts.append(_count_parameter("stale_features", sum(batch.stale_per_row[start:stop])))
        outputs = batch.outputs
        parts.extend([delimited(_RAW_OUTPUT, outputs[i].raw(start, stop)) for i in self._selection])
        self._call.reply(b"".join(parts))

    def fail(self, error: ServingError) -> None:
        status = status_of(error)
        self._metrics.rpc_error("ModelInfer", status.code.name)
        self._call.refuse(status)


def _given(request: Any, model: str) -> list[GivenTensor]:
    raws = request.raw_input_contents
    if not raws:
        return [
            GivenTensor(t.name, t.datatype, tuple(t.shape), _typed(t, model))
            for t in request.inputs
        ]
    if len(raws) != len(request.inputs):
        raise InvalidTensor(
            f"expected {len(request.inputs)} raw input contents for model '{model}', "
            f"got {len(raws)}: one for each input, in order"
        )
    given = []
    for tensor, raw in zip(request.inputs, raws, strict=True):
        if tensor.HasField("contents"):
            raise InvalidTensor(
                "contents field must not be specified when using raw_input_contents "
                f"for '{tensor.name}' for model '{model}'"
            )
        given.append(GivenTensor(tensor.name, tensor.datatype, tuple(tensor.shape), raw))
    return given


def _typed(tensor: Any, model: str) -> bytes:
    """Turn typed contents into raw bytes."""
    if "shared_memory_region" in tensor.parameters:
        raise InvalidTensor(
            f"input '{tensor.name}' for model '{model}' is in shared memory, "
            "which this server does not offer"
        )
    attribute = _TYPED_CONTENTS.get(tensor.datatype)
    if attribute is None:
        raise InvalidTensor(
            f"input '{tensor.name}' for model '{model}' has data-type '{tensor.datatype}', "
            "which has no typed contents; send raw_input_contents"
        )
    for field, _ in tensor.contents.ListFields():
        if field.name != attribute:
            raise InvalidTensor(
                f"input '{tensor.name}' for model '{model}' has data-type '{tensor.datatype}' "
                f"and its values in '{field.name}'; expected '{attribute}'"
            )
    values = getattr(tensor.contents, attribute)
    if tensor.datatype == "BYTES":
        array = np.empty(len(values), np.object_)
        array[:] = list(values)
        return encode(array)
    try:
        return np.array(values, NUMPY_DTYPES[tensor.datatype]).tobytes()
    except OverflowError:
        raise InvalidTensor(
            f"input '{tensor.name}' for model '{model}' has a value out of range "
            f"for '{tensor.datatype}'"
        ) from None


def _output_name(output: Any, model: str) -> str:
    for parameter in output.parameters:
        if parameter == "classification" or parameter.startswith("shared_memory"):
            raise InvalidTensor(
                f"output '{output.name}' for model '{model}' asks for '{parameter}', "
                "which this server does not offer"
            )
    return str(output.name)


def _queue_deadline_s(parameters: Any) -> float:
    """Read Triton's reserved `timeout`, in microseconds; other `triton_` parameters are refused."""
    for name in parameters:
        if name.startswith("triton_"):
            raise InvalidRequest(f"parameter '{name}' is reserved")
    timeout_us = parameters["timeout"].int64_param if "timeout" in parameters else 0
    return time.time() + timeout_us / 1e6 if timeout_us > 0 else math.inf


def _constant_part(batch: AnsweredBatch, selection: tuple[int, ...], rows: int) -> bytes:
    """Serialize what all replies of one shape have in common, once."""
    model = batch.model
    memo: dict[Any, bytes] = model.edge_memo
    key = (selection, rows, batch.output_shapes)
    part = memo.get(key)
    if part is None:
        part = _serialize_constant_part(model, batch, selection, rows)
        if len(memo) >= _MEMO_SIZE_MAX:  # variable shapes: start over rather than grow
            memo.clear()
        memo[key] = part
    return part


def _serialize_constant_part(
    model: ServedModel, batch: AnsweredBatch, selection: Sequence[int], rows: int
) -> bytes:
    reply = service_pb2.ModelInferResponse(model_name=model.name, model_version=model.version)
    for i in selection:
        block = batch.outputs[i]
        shape = (rows, *block.trailing) if model.signature.max_batch_size else block.trailing
        reply.outputs.add(name=block.spec.name, datatype=block.spec.datatype, shape=shape)
    return bytes(reply.SerializeToString())


@lru_cache(maxsize=8_192)
def _count_parameter(name: str, count: int) -> bytes:
    reply = service_pb2.ModelInferResponse()
    reply.parameters[name].int64_param = count
    return bytes(reply.SerializeToString())


def _prediction_id_prefix() -> bytes:
    """Everything of the `prediction_id` parameter but the id, whose length never changes."""
    reply = service_pb2.ModelInferResponse()
    reply.parameters["prediction_id"].string_param = "0" * Request.PREDICTION_ID_LENGTH
    return bytes(reply.SerializeToString())[: -Request.PREDICTION_ID_LENGTH]


_PREDICTION_ID = _prediction_id_prefix()
