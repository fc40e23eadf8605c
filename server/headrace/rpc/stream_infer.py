"""`inference.GRPCInferenceService/ModelStreamInfer` as a hot stream: `ModelInfer`, over and over.

Source: Triton's `stream_infer_handler.cc`, where the protocol is silent: an error has the request's
id, model and version in an otherwise empty `infer_response`; answers carry the parameter
`triton_final_response`, which is true for a model that answers once. Triton answers in the order of
asking; here that holds for messages without an id, which nothing else tells apart. Those with one
are answered as they finish.
"""

import threading
from collections import deque
from collections.abc import Callable

from tritonclient.grpc import service_pb2

from headrace.batching.accounts import CallerAccounts
from headrace.catalog import Catalog
from headrace.rpc.infer import InferRequest, ModelInfer
from headrace.rpc.ingress import Accept, HotCall, Metadata
from headrace.rpc.status import Status
from headrace.rpc.stream_message import WrappedMessage
from headrace.telemetry.calls import CallRecorder
from headrace.telemetry.trace_context import Trace
from headrace.wire import first_fields, tag, varint

METHOD = "inference.GRPCInferenceService/ModelStreamInfer"
PATH = f"/{METHOD}"

_INFER_RESPONSE = tag(
    service_pb2.ModelStreamInferResponse.DESCRIPTOR.fields_by_name["infer_response"].number
)


class ModelStreamInfer:
    """
    The hot stream.

    Args:
        catalog: Returns the models as they are now.
        calls: Decides which streams are traced, and is told of messages that fail.
        accounts: Know the callers; None where it makes no difference who calls.
    """

    path = PATH

    def __init__(
        self,
        catalog: Callable[[], Catalog],
        calls: CallRecorder,
        accounts: CallerAccounts | None = None,
    ) -> None:
        self._infer = _Infer(catalog, calls, accounts)
        self._calls = calls

    def begin(self, metadata: Metadata) -> Accept:
        """Begin a stream; whether its messages are traced is decided once."""
        calls = self._calls
        trace = None if calls.sample is None else calls.sample(metadata)
        return _InferStream(self._infer, calls, trace).accept


class _StreamedRequest(InferRequest):
    """A message in the queue."""

    __slots__ = ()

    method = METHOD


class _Infer(ModelInfer):
    """Takes the messages of all streams."""

    path = PATH

    def __init__(
        self,
        catalog: Callable[[], Catalog],
        calls: CallRecorder,
        accounts: CallerAccounts | None = None,
    ) -> None:
        super().__init__(catalog, calls, accounts)
        self._request_class = _StreamedRequest


class _InferStream:
    """One stream."""

    def __init__(self, infer: ModelInfer, calls: CallRecorder, trace: Trace | None) -> None:
        self._infer = infer
        self._another = calls.another
        self._trace = trace
        self._unnamed = _InOrder()

    def accept(self, call: HotCall, message: bytes) -> None:
        head, _ = first_fields(message, 3)
        order = None if head[2] else self._unnamed
        trace = self._trace
        if trace is not None and self._another is not None:
            trace = self._another(trace)
        self._infer.accept_sampled(_InferMessage(call, head, order), message, trace)


class _InferMessage(WrappedMessage):
    """One message; its answers are `ModelStreamInferResponse`s."""

    __slots__ = ("_head", "_order", "answer")

    def __init__(self, call: HotCall, head: list[bytes], order: "_InOrder | None") -> None:
        super().__init__(call)
        self._head = head
        self._order = order
        self.answer: bytes | None = None
        """Set when it has to wait for others."""
        if order is not None:
            order.add(self)

    def reply(self, message: bytes) -> None:
        length = varint(len(message) + len(_FINAL))
        self._answer(b"".join((_INFER_RESPONSE, length, message, _FINAL)))

    def refuse(self, status: Status) -> None:
        if self.gone:  # nobody reads it, and a lost stream has many at once
            self._answer(b"")
            return
        model, version, request_id = [field.decode(errors="replace") for field in self._head]
        # Triton's clients hand on nothing but the text.
        prefix = f"[request id: {request_id}] " if request_id else ""
        response = service_pb2.ModelStreamInferResponse(
            error_message=prefix + (status.details or status.code.name)
        )
        response.infer_response.MergeFromString(_FINAL)
        response.infer_response.model_name = model
        response.infer_response.model_version = version
        response.infer_response.id = request_id
        self._answer(response.SerializeToString())

    def send(self, answer: bytes) -> None:
        self._call.reply(answer)

    def _answer(self, answer: bytes) -> None:
        if self._order is None:
            self.send(answer)
        else:
            self._order.answer(self, answer)


class _InOrder:
    """Holds answers back until those to earlier messages are given. Any thread may call."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._messages: deque[_InferMessage] = deque()

    def add(self, message: _InferMessage) -> None:
        """Expect an answer to one more message."""
        with self._lock:
            self._messages.append(message)

    def answer(self, message: _InferMessage, answer: bytes) -> None:
        """Send an answer, unless the message has one, and those that waited for it."""
        with self._lock:
            if message.answer is not None:
                return
            message.answer = answer
            while self._messages and (first := self._messages[0].answer) is not None:
                self._messages.popleft().send(first)


def _final() -> bytes:
    response = service_pb2.ModelInferResponse()
    response.parameters["triton_final_response"].bool_param = True
    return bytes(response.SerializeToString())


_FINAL = _final()
