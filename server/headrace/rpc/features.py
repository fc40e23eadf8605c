"""`headrace.v1.FeatureService/GetOnlineFeatures` as a hot method: packed columns in and out."""

from collections.abc import Mapping
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from headrace.batching.accounts import CallerAccounts
from headrace.batching.callers import NOBODY
from headrace.errors import InvalidRequest, ServingError
from headrace.feature_reads import FeatureRead, FeatureReads, FeatureRequest
from headrace.features.plan import RequestColumn
from headrace.features.plans import FeaturePlans, Selection
from headrace.features.values import ValueType
from headrace.rpc.entities import (
    check_values,
    equal_length,
    missing_column,
    refuse_large,
    refuse_many,
    wrong_type,
)
from headrace.rpc.ingress import HotCall
from headrace.rpc.oip import unary
from headrace.rpc.packed_reply import PackedReplies
from headrace.rpc.refusal import refuse
from headrace.telemetry.calls import CallRecorder
from headrace.telemetry.trace_context import Trace
from headrace.v1 import feature_service_pb2 as pb

SERVICE = "headrace.v1.FeatureService"
METHOD = f"{SERVICE}/GetOnlineFeatures"

_ACCEPTED: dict[ValueType, tuple[str, ...]] = {
    ValueType.INT64: ("int64s", "int32s"),
    ValueType.INT32: ("int32s",),
    ValueType.UNIX_TIMESTAMP: ("int64s", "int32s"),
    ValueType.STRING: ("strings",),
    ValueType.BYTES: ("bytes_values",),
    ValueType.DOUBLE: ("doubles", "floats"),
    ValueType.FLOAT: ("floats",),
    ValueType.BOOL: ("bools",),
}


class GetOnlineFeatures:
    """
    The hot method.

    Args:
        reads: Takes the requests.
        calls: Decides which calls are traced, and is told of those that fail.
        accounts: Know the callers; None where it makes no difference who calls.
    """

    path = f"/{METHOD}"

    def __init__(
        self, reads: FeatureReads, calls: CallRecorder, accounts: CallerAccounts | None = None
    ) -> None:
        self._accounts = accounts
        self._reads = reads
        self._calls = calls
        self._sample = calls.sample

    def accept(self, call: HotCall, message: bytes) -> None:
        """Parse and queue one request; refuse it when it cannot be served."""
        trace = None if self._sample is None else self._sample(call.metadata)
        accounts = self._accounts
        try:
            caller = NOBODY if accounts is None else accounts.enter(call.metadata)
            refuse_large(message)
            asked = pb.GetOnlineFeaturesRequest.FromString(message)
            refuse_many(asked.feature_service, len(asked.features.references), len(asked.entities))
            columns = _columns(asked.entities)
            rows = equal_length(len(values) for _, values in columns.values())
            self._reads.check_rows(rows)
            request = _Request(call, self._calls, asked, columns, rows, len(message), trace)
            call.on_gone = request.leave
            if accounts is None:
                self._reads.submit(request)
            else:
                accounts.pass_on(caller, request, self._reads.submit)
        except DecodeError:
            error = InvalidRequest("the message is not a GetOnlineFeaturesRequest")
            refuse(call, error, self._calls, METHOD, trace)
        except Exception as error:
            refuse(call, error, self._calls, METHOD, trace)


class FeatureMetadataServicer:
    """
    The methods that say what there is; they may compile a plan, which takes milliseconds.

    Args:
        plans: Where it is.
    """

    def __init__(self, plans: FeaturePlans) -> None:
        self._plans = plans

    def handler(self) -> "grpc.GenericRpcHandler[Any, Any]":
        """Return the handler to add to a server."""
        return grpc.method_handlers_generic_handler(
            SERVICE,
            {
                "GetFeatureMetadata": unary(self.get_metadata, pb.GetFeatureMetadataRequest),
                "ListFeatureServices": unary(self.list_services, pb.ListFeatureServicesRequest),
            },
        )

    def get_metadata(self, asked: Any) -> Any:
        """Say what a selection takes and gives."""
        plan = self._plans.find(
            Selection(
                asked.feature_service,
                tuple(asked.features.references),
                bool(asked.full_feature_names),
            )
        )
        reply = pb.GetFeatureMetadataResponse()
        for key in plan.join_keys:
            reply.join_keys.add(name=key.name, value_type=key.value_type.name)
        for column in plan.data_columns:
            reply.data_columns.add(name=column.name, value_type=column.value_type.name)
        for feature in plan.features:
            reply.features.add(
                name=feature.name,
                view=plan.views[feature.view_index].label,
                value_type=feature.value_type.name,
                ttl_s=feature.ttl_s,
            )
        return reply

    def list_services(self, _asked: Any) -> Any:
        """List the feature services."""
        reply = pb.ListFeatureServicesResponse()
        for name in self._plans.services():
            reason = ""
            try:
                self._plans.find(Selection(name))
            except ServingError as error:
                reason = str(error)
            reply.feature_services.add(name=name, reason=reason)
        return reply


class _Request(FeatureRequest):
    """A `GetOnlineFeatures` call in the queue."""

    __slots__ = ("_call", "_calls", "_columns", "_with_times")

    method = METHOD

    def __init__(
        self,
        call: HotCall,
        calls: CallRecorder,
        asked: Any,
        columns: Mapping[str, tuple[str, Any]],
        rows: int,
        byte_count: int,
        trace: Trace | None,
    ) -> None:
        super().__init__(
            Selection(
                asked.feature_service,
                tuple(asked.features.references),
                bool(asked.full_feature_names),
            ),
            rows,
            deadline_s=call.deadline_s,
            arrival_s=call.arrival_s,
            byte_count=byte_count,
            trace=trace,
        )
        self._call = call
        self._calls = calls
        self._columns = columns
        self._with_times = asked.include_event_times

    def column_values(self, column: RequestColumn) -> list[Any]:
        given = self._columns.get(column.name)
        if given is None:
            raise missing_column(column, self._columns)
        kind, values = given
        if kind not in _ACCEPTED[column.value_type]:
            raise wrong_type(column, 0, kind)
        if column.value_type is ValueType.STRING:
            values = [text.encode() for text in values]
        check_values(column, values)
        return list(values)

    def expired(self, now_s: float) -> bool:
        return self._call.gone or self.deadline_s <= now_s

    def answer(self, read: FeatureRead, start: int) -> None:
        replies = read.shared.get(PackedReplies)
        if replies is None:
            replies = read.shared[PackedReplies] = PackedReplies(read)
        stop = start + self.rows
        self._call.reply(replies.message(start, stop, with_times=self._with_times))

    def fail(self, error: ServingError) -> None:
        refuse(self._call, error, self._calls, METHOD, self.trace)


def _columns(entities: Any) -> dict[str, tuple[str, Any]]:
    columns: dict[str, tuple[str, Any]] = {}
    for column in entities:
        if column.name in columns:
            raise InvalidRequest(f"column '{column.name}' is there twice")
        kind = column.values.WhichOneof("kind")
        columns[column.name] = kind or "", getattr(column.values, kind).values if kind else ()
    return columns
