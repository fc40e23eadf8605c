"""`inference.GRPCInferenceService/ModelInfer` as a hot method: protobuf in, requests out, and back.

Source: Open Inference Protocol and Triton's behaviour where it is silent: raw contents out, always;
id and resolved version echoed; requested outputs in request order.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from google.protobuf.message import DecodeError
from tritonclient.grpc import service_pb2

from headrace.batching.accounts import CallerAccounts
from headrace.batching.callers import NOBODY, Caller
from headrace.catalog import Catalog
from headrace.errors import Draining, InvalidRequest, InvalidTensor, ServingError
from headrace.request import AnsweredBatch, Request
from headrace.rpc.ingress import HotCall
from headrace.rpc.known_requests import KnownRequest, KnownRequests
from headrace.rpc.refusal import refuse
from headrace.telemetry.calls import CallRecorder
from headrace.telemetry.trace_context import Trace
from headrace.tensors import NUMPY_DTYPES, CheckedInputs, GivenTensor, Signature, encode
from headrace.wire import delimited, first_fields, refuse_costly_parse, tag, varint

METHOD = "inference.GRPCInferenceService/ModelInfer"
PATH = f"/{METHOD}"

_ID = tag(3)
_TYPED_BYTES = (5, 5, 8)  # inputs, contents, bytes_contents
_MAX_TYPED_BYTES = 1 << 20
_LARGE_BYTES = 64 << 10
"""Of a message that is judged by its model's name before it is parsed, which copies it."""

_RAW_OUTPUT = tag(6)


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
    The hot method; streams of the same messages build on it.

    Args:
        catalog: Returns the models as they are now.
        calls: Decides which calls are traced, and is told of those that fail.
        accounts: Know the callers; None where it makes no difference who calls.
    """

    path = PATH

    def __init__(
        self,
        catalog: Callable[[], Catalog],
        calls: CallRecorder,
        accounts: CallerAccounts | None = None,
    ) -> None:
        self._request_class = InferRequest
        self._accounts = accounts
        self._catalog = catalog
        self._calls = calls
        self._sample = calls.sample
        self._known = KnownRequests(catalog())

    def accept(self, call: HotCall, message: bytes) -> None:
        """Parse, check and queue one request; refuse it when it cannot be served."""
        trace = None if self._sample is None else self._sample(call.metadata)
        self.accept_sampled(call, message, trace)

    def accept_sampled(self, call: HotCall, message: bytes, trace: Trace | None) -> None:
        """As `accept`, when it is decided whether the call is traced."""
        catalog, accounts = self._catalog(), self._accounts
        try:
            caller = NOBODY if accounts is None else accounts.enter(call.metadata)
            requests = self._known
            if requests.catalog is not catalog:
                requests = self._known = KnownRequests(catalog)
            known = requests.find(message)
            if known is not None:
                request = _again(self._request_class, call, self._calls, message, known)
                request.trace = trace
                call.on_gone = request.leave
                if accounts is None:
                    known.model.submit(request)
                else:
                    accounts.pass_on(caller, request, known.model.submit)
            else:
                self._accept_unknown(call, message, requests, trace, caller)
        except Draining as error:
            if self._catalog() is catalog:  # the server stops
                self._refuse(call, error, trace)
            else:  # a version on its way out; its successor serves already
                self.accept_sampled(call, message, trace)
        except DecodeError:
            no_message = InvalidRequest("the message is not a ModelInferRequest")
            self._refuse(call, no_message, trace)
        except Exception as error:
            self._refuse(call, error, trace)

    def _accept_unknown(
        self,
        call: HotCall,
        message: bytes,
        known: KnownRequests,
        trace: Trace | None,
        caller: Caller,
    ) -> None:
        if len(message) > _LARGE_BYTES:
            _refuse_unparsed(call, message, known.catalog)
        refuse_costly_parse(
            message, _TYPED_BYTES, _MAX_TYPED_BYTES, "contents; send raw_input_contents"
        )
        request = service_pb2.ModelInferRequest.FromString(message)
        model = known.catalog.find(request.model_name, request.model_version)
        inputs = request.inputs
        if inputs and inputs[0].shape:
            model.check_rows(inputs[0].shape[0])
        given = _given(request, model.signature)
        checked = model.signature.check(given)
        outputs = request.outputs
        selection = model.signature.check_outputs(
            [_output_name(output, model.name) for output in outputs] if outputs else ()
        )
        queued = _queue_parameters(request.parameters) if request.parameters else None
        known.learn(message, request, model, given, checked, selection, queued)
        request_id = request.id.encode()
        checked_request = self._request_class(
            call, self._calls, checked, call.deadline_s, request_id, selection, len(message)
        )
        if queued is not None:
            checked_request.priority, checked_request.timeout_s = queued
        checked_request.trace = trace
        call.on_gone = checked_request.leave
        if self._accounts is None:
            model.submit(checked_request)
        else:
            self._accounts.pass_on(caller, checked_request, model.submit)

    def _refuse(self, call: HotCall, error: Exception, trace: Trace | None) -> None:
        refuse(call, error, self._calls, self._request_class.method, trace)


class InferRequest(Request):
    """A `ModelInfer` call in the queue."""

    __slots__ = ("_call", "_calls", "_id", "_selection")

    method = METHOD

    def __init__(
        self,
        call: HotCall,
        calls: CallRecorder,
        inputs: CheckedInputs,
        deadline_s: float,
        request_id: bytes,
        selection: tuple[int, ...],
        byte_count: int,
    ) -> None:
        super().__init__(inputs, deadline_s, call.arrival_s, byte_count)
        self._call = call
        self._calls = calls
        self._id = request_id
        self._selection = selection

    def expired(self, now_s: float) -> bool:
        return self._call.gone or self.deadline_s <= now_s

    def answer(self, batch: AnsweredBatch, start: int, prediction_id: str) -> None:
        rows = self.rows
        stop = start + rows
        frame = _frame(batch, self._selection, rows)
        parts = [frame.head, prediction_id.encode()]
        if self._id:
            parts.append(delimited(_ID, self._id))
        if batch.missing_per_row is not None and batch.stale_per_row is not None:
            parts.append(_counts(batch.missing_per_row, batch.stale_per_row, start, stop))
        outputs = batch.outputs
        for i, size, field in frame.outputs:
            raw = outputs[i].raw(start, stop)
            parts.append(field if len(raw) == size else _RAW_OUTPUT + varint(len(raw)))
            parts.append(raw)
        self._call.reply(b"".join(parts))

    def fail(self, error: ServingError) -> None:
        refuse(self._call, error, self._calls, self.method, self.trace, self)


def _refuse_unparsed(call: HotCall, message: bytes, catalog: Catalog) -> None:
    """
    Refuse what its model's queue would refuse whatever the rest of the message says.

    Raises:
        Overloaded: as it says.
    """
    (name, version), _ = first_fields(message, 2)
    model = catalog.serving(name.decode(errors="replace"), version.decode(errors="replace"))
    if model is None or not model.queue.pressure:
        return
    error = model.refuses(call.deadline_s, len(message))
    if error is not None:
        raise error.again()


def _again(
    request_class: type[InferRequest],
    call: HotCall,
    calls: CallRecorder,
    message: bytes,
    known: KnownRequest,
) -> InferRequest:
    """Make the request of a message that is known but for its id and its tensors' bytes."""
    raws = tuple([message[start:stop] for start, stop in known.raw_spans])
    span = known.id_span
    request = request_class(
        call,
        calls,
        CheckedInputs(known.rows, raws, known.trailing),
        call.deadline_s,
        b"" if span is None else message[span[0] : span[1]],
        known.selection,
        len(message),
    )
    if known.queued is not None:
        request.priority, request.timeout_s = known.queued
    return request


def _given(request: Any, signature: Signature) -> list[GivenTensor]:
    model, raws = signature.model, request.raw_input_contents
    if not raws:
        return [
            GivenTensor(t.name, t.datatype, tuple(t.shape), _typed(t, signature))
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


def _typed(tensor: Any, signature: Signature) -> bytes:
    """Turn typed contents into raw bytes; what cannot fit is refused before any of it is."""
    model = signature.model
    expected = signature.check_head(tensor.name, tensor.datatype, tuple(tensor.shape))
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
    if len(values) != expected:
        raise InvalidTensor(
            f"input '{tensor.name}' for model '{model}' has {len(values)} values in "
            f"'{attribute}'; its shape needs {expected}"
        )
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


def _queue_parameters(parameters: Any) -> tuple[int, float] | None:
    """
    Read Triton's reserved `priority` and `timeout`; other `triton_` parameters are refused.

    But for the wish for an empty final response: every model here answers once, so none is needed.

    Returns:
        The priority, 0 for the default, and the timeout in seconds, 0 for none; None for neither.
    """
    for name in parameters:
        if name.startswith("triton_") and name != "triton_enable_empty_final_response":
            raise InvalidRequest(f"parameter '{name}' is reserved")
    priority, timeout_us = (
        _whole(name, parameters[name]) if name in parameters else 0
        for name in ("priority", "timeout")
    )
    return (priority, max(0.0, timeout_us / 1e6)) if priority or timeout_us else None


def _whole(name: str, parameter: Any) -> int:
    """Return an integer: clients send it as int64 or, newer ones, as uint64."""
    kind = parameter.WhichOneof("parameter_choice")
    if kind not in ("int64_param", "uint64_param"):
        raise InvalidRequest(f"parameter '{name}' is no integer")
    return int(getattr(parameter, kind))


class _Frame(NamedTuple):
    """
    What all replies of one shape have in common.

    Args:
        head: Serialized fields, up to the prediction id's first character.
        outputs: Which outputs follow; how many bytes the raw contents had when this was made, and
            their field's tag and length.
    """

    head: bytes
    outputs: tuple[tuple[int, int, bytes], ...]


def _frame(batch: AnsweredBatch, selection: tuple[int, ...], rows: int) -> _Frame:
    key = (selection, rows, batch.output_shapes)
    frame: _Frame | None = batch.model.edge_memo.get(key)
    if frame is None:
        frame = batch.model.remember(key, _make_frame(batch, selection, rows))
    return frame


def _make_frame(batch: AnsweredBatch, selection: Sequence[int], rows: int) -> _Frame:
    model = batch.model
    reply = service_pb2.ModelInferResponse(model_name=model.name, model_version=model.version)
    outputs = []
    for i in selection:
        block = batch.outputs[i]
        shape = (rows, *block.trailing) if model.signature.max_batch_size else block.trailing
        reply.outputs.add(name=block.spec.name, datatype=block.spec.datatype, shape=shape)
        size = len(block.raw(0, rows))
        outputs.append((i, size, _RAW_OUTPUT + varint(size)))
    return _Frame(reply.SerializeToString() + _PREDICTION_ID, tuple(outputs))


def _counts(missing: Sequence[int], stale: Sequence[int], start: int, stop: int) -> bytes:
    if stop - start == 1:
        return _count_parameters(missing[start], stale[start])
    return _count_parameters(sum(missing[start:stop]), sum(stale[start:stop]))


@lru_cache(maxsize=8_192)
def _count_parameters(missing: int, stale: int) -> bytes:
    reply = service_pb2.ModelInferResponse()
    reply.parameters["missing_features"].int64_param = missing
    reply.parameters["stale_features"].int64_param = stale
    return bytes(reply.SerializeToString())


def _prediction_id_prefix() -> bytes:
    """Everything of the `prediction_id` parameter but the id, whose length never changes."""
    reply = service_pb2.ModelInferResponse()
    reply.parameters["prediction_id"].string_param = "0" * Request.PREDICTION_ID_LENGTH
    return bytes(reply.SerializeToString())[: -Request.PREDICTION_ID_LENGTH]


_PREDICTION_ID = _prediction_id_prefix()
