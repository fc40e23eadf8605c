"""`headrace.v1.PredictionService/Predict` as a hot method: columns in, requests out, and back."""

from collections.abc import Callable
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError

from headrace.batching.accounts import CallerAccounts
from headrace.batching.callers import NOBODY
from headrace.catalog import Catalog
from headrace.errors import Draining, InvalidRequest, InvalidTensor, ServingError
from headrace.features.plan import FeatureStatus
from headrace.predict import ServedModel
from headrace.request import AnsweredBatch, Request
from headrace.rpc.ingress import HotCall
from headrace.rpc.prediction_reply import write_reply
from headrace.rpc.refusal import refuse
from headrace.telemetry.calls import CallRecorder
from headrace.telemetry.trace_context import Trace
from headrace.tensors import CheckedInputs, GivenTensor, TensorSpec, encode
from headrace.v1 import prediction_service_pb2 as pb
from headrace.wire import refuse_costly_parse

METHOD = "headrace.v1.PredictionService/Predict"
PATH = f"/{METHOD}"

BYTES_VALUES = (3, 2, 7, 1)  # columns, values, bytes_values, values
MAX_TYPED_BYTES = 4 << 20  # ten thousand rows of fifty doubles
TOO_MUCH = "columns; send fewer rows in one request"

_COLUMN_KINDS: dict[str, tuple[str, ...]] = {
    "INT64": ("int64s",),
    "INT32": ("int32s",),
    "INT16": ("int32s",),
    "INT8": ("int32s",),
    "UINT64": ("int64s",),
    "UINT32": ("int64s",),
    "UINT16": ("int32s",),
    "UINT8": ("int32s",),
    "FP16": ("floats",),
    "FP32": ("floats",),
    "FP64": ("doubles", "floats"),
    "BOOL": ("bools",),
    "BYTES": ("strings", "bytes_values"),
}
"""The column kinds that fit each datatype without loss; the first is what messages ask for."""


class Predict:
    """
    The hot method; streams of such requests build on it.

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
        self._accounts = accounts
        self._request_class = PredictRequest
        self._catalog = catalog
        self._calls = calls
        self._sample = calls.sample

    def accept(self, call: HotCall, message: bytes) -> None:
        """Parse, check and queue one request; refuse it when it cannot be served."""
        trace = None if self._sample is None else self._sample(call.metadata)
        self.accept_sampled(call, message, trace)

    def accept_sampled(self, call: HotCall, message: bytes, trace: Trace | None) -> None:
        """As `accept`, when it is decided whether the call is traced."""
        catalog, accounts = self._catalog(), self._accounts
        try:
            caller = NOBODY if accounts is None else accounts.enter(call.metadata)
            refuse_costly_parse(message, BYTES_VALUES, MAX_TYPED_BYTES, TOO_MUCH)
            asked = pb.PredictRequest.FromString(message)
            version = str(asked.model_version) if asked.HasField("model_version") else ""
            model = catalog.find(asked.model_name, version)
            specs = {spec.name: spec for spec in model.signature.inputs}
            given = [_given(column, specs, model) for column in asked.columns]
            checked = model.signature.check(given)
            selection = model.signature.check_outputs(asked.output_names)
            request = self._request_class(
                *(call, self._calls, checked, selection),
                include_features=asked.include_features,
                byte_count=len(message),
            )
            request.trace = trace
            call.on_gone = request.leave
            if accounts is None:
                model.submit(request)
            else:
                accounts.pass_on(caller, request, model.submit)
        except Draining as error:
            if self._catalog() is catalog:  # the server stops
                self._refuse(call, error, trace)
            else:  # a version on its way out; its successor serves already
                self.accept_sampled(call, message, trace)
        except DecodeError:
            self._refuse(call, InvalidRequest("the message is not a PredictRequest"), trace)
        except Exception as error:
            self._refuse(call, error, trace)

    def _refuse(self, call: HotCall, error: Exception, trace: Trace | None) -> None:
        refuse(call, error, self._calls, self._request_class.method, trace)


class PredictRequest(Request):
    """A `Predict` call in the queue."""

    __slots__ = ("_call", "_calls", "_include_features", "_selection")

    method = METHOD

    def __init__(
        self,
        call: HotCall,
        calls: CallRecorder,
        inputs: CheckedInputs,
        selection: tuple[int, ...],
        *,
        include_features: bool,
        byte_count: int,
    ) -> None:
        super().__init__(inputs, call.deadline_s, call.arrival_s, byte_count)
        self._call = call
        self._calls = calls
        self._selection = selection
        self._include_features = include_features

    def expired(self, now_s: float) -> bool:
        return self._call.gone or self.deadline_s <= now_s

    def answer(self, batch: AnsweredBatch, start: int, prediction_id: str) -> None:
        reply = write_reply(
            batch,
            self._selection,
            start,
            start + self.rows,
            prediction_id=prediction_id,
            arrival_s=self.arrival_s,
            include_features=self._include_features,
        )
        self._call.reply(reply)

    def fail(self, error: ServingError) -> None:
        refuse(self._call, error, self._calls, self.method, self.trace, self)


def _given(column: Any, specs: dict[str, TensorSpec], model: ServedModel) -> GivenTensor:
    name = column.name
    kind = column.values.WhichOneof("kind")
    values = getattr(column.values, kind).values if kind else ()
    spec = specs.get(name)
    if spec is None:  # `check` says so, in the same words as for a tensor
        return GivenTensor(name, "", (len(values),), b"")
    if len(spec.shape) > 2 or (len(spec.shape) == 2 and spec.shape[1] not in (1, -1)):
        raise InvalidTensor(
            f"input '{name}' of model '{model.name}' has more than one value per row; "
            "use inference.GRPCInferenceService/ModelInfer"
        )
    model.check_rows(len(values))
    shape = (len(values), 1) if len(spec.shape) == 2 else (len(values),)
    accepted = _COLUMN_KINDS[spec.datatype]
    if spec.widens_int32:
        accepted = (*accepted, "int32s")
    if kind not in accepted:
        raise InvalidTensor(
            f"column '{name}' has {kind or 'no values'}, but model '{model.name}' expects "
            f"'{accepted[0]}' for {spec.datatype}"
        )
    model.signature.check_head(name, spec.datatype, shape)  # before any value is converted
    return GivenTensor(name, spec.datatype, shape, _raw(name, spec, values))


def _raw(name: str, spec: TensorSpec, values: Any) -> bytes:
    if spec.datatype == "BYTES":
        array = np.empty(len(values), np.object_)
        array[:] = list(values)
        return encode(array)
    try:
        return np.fromiter(values, spec.dtype, len(values)).tobytes()
    except OverflowError:
        raise InvalidTensor(
            f"column '{name}' has a value out of range for {spec.datatype}"
        ) from None


assert {FeatureStatus(number).name for number in range(1, 5)} == {
    name.removeprefix("FEATURE_STATUS_") for name in pb.FeatureStatus.keys()[1:]
}
