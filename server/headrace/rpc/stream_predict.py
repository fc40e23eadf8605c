"""`headrace.v1.PredictionService/StreamPredict` as a hot stream: `Predict`, over and over."""

from collections.abc import Callable

from google.protobuf.message import DecodeError
from google.rpc import status_pb2

from headrace.batching.accounts import CallerAccounts
from headrace.catalog import Catalog
from headrace.errors import InvalidRequest
from headrace.rpc.ingress import Accept, HotCall, Metadata
from headrace.rpc.prediction import BYTES_VALUES, MAX_TYPED_BYTES, TOO_MUCH, Predict, PredictRequest
from headrace.rpc.refusal import refuse
from headrace.rpc.status import Status
from headrace.rpc.stream_message import WrappedMessage
from headrace.telemetry.calls import CallRecorder
from headrace.telemetry.trace_context import Trace
from headrace.v1 import prediction_service_pb2 as pb
from headrace.wire import delimited, first_fields, refuse_costly_parse, tag

METHOD = "headrace.v1.PredictionService/StreamPredict"
PATH = f"/{METHOD}"

_ID = tag(pb.StreamPredictResponse.DESCRIPTOR.fields_by_name["id"].number)
_RESPONSE = tag(pb.StreamPredictResponse.DESCRIPTOR.fields_by_name["response"].number)
_ERROR = tag(pb.StreamPredictResponse.DESCRIPTOR.fields_by_name["error"].number)
_REQUEST = pb.StreamPredictRequest.DESCRIPTOR.fields_by_name["request"].number


class StreamPredict:
    """
    The hot stream.

    Args:
        catalog: Returns the models as they are now.
        calls: Decides which streams are traced, and is told of requests that fail.
        accounts: Know the callers; None where it makes no difference who calls.
    """

    path = PATH

    def __init__(
        self,
        catalog: Callable[[], Catalog],
        calls: CallRecorder,
        accounts: CallerAccounts | None = None,
    ) -> None:
        self._predict = _Predict(catalog, calls, accounts)
        self._calls = calls

    def begin(self, metadata: Metadata) -> Accept:
        """Begin a stream; whether its requests are traced is decided once."""
        calls = self._calls
        trace = None if calls.sample is None else calls.sample(metadata)

        def accept(call: HotCall, message: bytes) -> None:
            self._accept(call, message, trace)

        return accept

    def _accept(self, call: HotCall, message: bytes, stream_trace: Trace | None) -> None:
        trace = None
        if stream_trace is not None and self._calls.another is not None:
            trace = self._calls.another(stream_trace)
        try:
            request_id, request = _split(message)
        except InvalidRequest as error:
            refuse(_PredictMessage(call, b""), error, self._calls, METHOD, trace)
        else:
            self._predict.accept_sampled(_PredictMessage(call, request_id), request, trace)


class _StreamedRequest(PredictRequest):
    """A request in the queue."""

    __slots__ = ()

    method = METHOD


class _Predict(Predict):
    """Takes the requests of all streams."""

    path = PATH

    def __init__(
        self,
        catalog: Callable[[], Catalog],
        calls: CallRecorder,
        accounts: CallerAccounts | None = None,
    ) -> None:
        super().__init__(catalog, calls, accounts)
        self._request_class = _StreamedRequest


class _PredictMessage(WrappedMessage):
    """One request; its answers are `StreamPredictResponse`s."""

    __slots__ = ("_id",)

    def __init__(self, call: HotCall, request_id: bytes) -> None:
        super().__init__(call)
        self._id = request_id

    def reply(self, message: bytes) -> None:
        self._answer(delimited(_RESPONSE, message))

    def refuse(self, status: Status) -> None:
        if self.gone:  # nobody reads it, and a lost stream has many at once
            self._answer(b"")
            return
        # What unary callers get in their trailing metadata is the error, field for field.
        rich = dict(status.trailing).get("grpc-status-details-bin")
        if not isinstance(rich, bytes):
            message = status_pb2.Status(code=status.code.value[0], message=status.details)
            rich = message.SerializeToString()
        self._answer(delimited(_ERROR, rich))

    def _answer(self, answer: bytes) -> None:
        self._call.reply(delimited(_ID, self._id) + answer if self._id else answer)


def _split(message: bytes) -> tuple[bytes, bytes]:
    """
    Return the id and the serialized `PredictRequest` of a `StreamPredictRequest`.

    Raises:
        InvalidRequest: it is none.
    """
    (request_id, request), end = first_fields(message, 2)
    if end == len(message) and request_id.isascii():
        return request_id, request
    # Written in an unusual order, with fields of a later day, or an id that may not be text.
    refuse_costly_parse(message, (_REQUEST, *BYTES_VALUES), MAX_TYPED_BYTES, TOO_MUCH)
    try:
        asked = pb.StreamPredictRequest.FromString(message)
    except DecodeError:
        raise InvalidRequest("the message is not a StreamPredictRequest") from None
    return asked.id.encode(), asked.request.SerializeToString()
