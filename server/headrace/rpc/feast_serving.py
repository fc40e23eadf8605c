"""Feast's own services: `feast.serving.ServingService` and `GrpcFeatureServer`.

Importing this imports Feast, which takes seconds: only where there is a feature repository.
"""

import weakref
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import feast
import grpc
from feast.protos.feast.serving import ServingService_pb2 as pb
from google.protobuf.message import DecodeError

from headrace.batching.accounts import CallerAccounts
from headrace.batching.callers import NOBODY
from headrace.errors import InvalidRequest, ServingError
from headrace.feature_reads import FeatureRead, FeatureReads, FeatureRequest
from headrace.features.plan import FeaturePlan, RequestColumn
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
from headrace.rpc.feast_reply import FeastReplies, FeastReplyPlan
from headrace.rpc.ingress import HotCall
from headrace.rpc.refusal import refuse
from headrace.telemetry.calls import CallRecorder
from headrace.telemetry.trace_context import Trace

SERVING_SERVICE = "feast.serving.ServingService"
FEATURE_SERVER = "GrpcFeatureServer"
"""The service of `feast listen`; it has no package."""

SELECTIONS_MAX = 256
"""Remembered; callers' lists are few. The one that was not asked for the longest makes room."""

SELECTION_BYTES_MAX = 64 << 10
"""Of a list that is remembered."""

_ACCEPTED: dict[ValueType, tuple[str, ...]] = {
    ValueType.INT64: ("int64_val", "int32_val"),
    ValueType.INT32: ("int32_val", "int64_val"),
    ValueType.UNIX_TIMESTAMP: ("unix_timestamp_val", "int64_val", "int32_val"),
    ValueType.STRING: ("string_val",),
    ValueType.BYTES: ("bytes_val",),
    ValueType.DOUBLE: ("double_val", "float_val", "int64_val", "int32_val"),
    ValueType.FLOAT: ("float_val", "double_val", "int64_val", "int32_val"),
    ValueType.BOOL: ("bool_val",),
}
"""
Integers are taken at any width: Feast itself would look for another entity. Its client sends what
Python has, so that numbers of an on-demand view are doubles or integers whatever is declared.
"""


class GetOnlineFeatures:
    """
    The hot method, under either service's name.

    Args:
        service: `SERVING_SERVICE` or `FEATURE_SERVER`.
        reads: Takes the requests.
        plans: What there is.
        calls: Decides which calls are traced, and is told of those that fail.
        as_feast: Whether to answer with Feast's own statuses.
        accounts: Know the callers; None where it makes no difference who calls.
    """

    def __init__(
        self,
        service: str,
        reads: FeatureReads,
        plans: FeaturePlans,
        calls: CallRecorder,
        *,
        as_feast: bool,
        accounts: CallerAccounts | None = None,
    ) -> None:
        self._accounts = accounts
        self._service = service
        self.method = f"{service}/GetOnlineFeatures"
        self.path = f"/{self.method}"
        self.plans = plans
        self._reads = reads
        self.calls = calls
        self._sample = calls.sample
        self._as_feast = as_feast
        self._reply_plans: weakref.WeakKeyDictionary[FeaturePlan, FeastReplyPlan] = (
            weakref.WeakKeyDictionary()
        )

    def accept(self, call: HotCall, message: bytes) -> None:
        """Parse and queue one request; refuse it when it cannot be served."""
        trace = None if self._sample is None else self._sample(call.metadata)
        accounts = self._accounts
        try:
            caller = NOBODY if accounts is None else accounts.enter(call.metadata)
            refuse_large(message)
            asked = pb.GetOnlineFeaturesRequest.FromString(message)
            columns = _columns(asked)
            refuse_many(asked.feature_service, len(asked.features.val), len(columns))
            rows = equal_length([len(column.val) for column in columns.values()])
            self._reads.check_rows(rows)
            request = _Request(self, call, asked, columns, rows, len(message), trace)
            call.on_gone = request.leave
            if accounts is None:
                self._reads.submit(request)
            else:
                accounts.pass_on(caller, request, self._reads.submit)
        except DecodeError:
            error = InvalidRequest("the message is not a GetOnlineFeaturesRequest")
            refuse(call, error, self.calls, self.method, trace)
        except Exception as error:
            refuse(call, error, self.calls, self.method, trace)

    def replies(self, read: FeatureRead) -> FeastReplies:
        """Return the replies to a batch: the same object for each of its requests."""
        replies: FeastReplies | None = read.shared.get(self._as_feast)
        if replies is None:
            reply_plan = self._reply_plans.get(read.plan)
            if reply_plan is None:
                reply_plan = FeastReplyPlan(read.plan, as_feast=self._as_feast)
                self._reply_plans[read.plan] = reply_plan
            replies = read.shared[self._as_feast] = FeastReplies(reply_plan, read)
        return replies

    def tells_versions(self, asked: Any) -> bool:
        """Say whether a reply names the views' versions, which `feast listen` never does."""
        is_told = not self._as_feast or self._service != FEATURE_SERVER
        return is_told and bool(asked.include_feature_view_version_metadata)


class _Request(FeatureRequest):
    """A `GetOnlineFeatures` call in the queue."""

    __slots__ = ("_asked", "_call", "_columns", "_found", "_owner")

    def __init__(
        self,
        owner: GetOnlineFeatures,
        call: HotCall,
        asked: Any,
        columns: Mapping[str, Any],
        rows: int,
        byte_count: int,
        trace: Trace | None,
    ) -> None:
        super().__init__(
            _selection(asked),
            rows,
            deadline_s=call.deadline_s,
            arrival_s=call.arrival_s,
            byte_count=byte_count,
            trace=trace,
        )
        self._owner = owner
        self._call = call
        self._asked = asked
        self._columns = columns
        self._found: dict[str, Any] = {}

    @property
    def method(self) -> str:
        return self._owner.method

    def column_values(self, column: RequestColumn) -> list[Any]:
        accepted = _ACCEPTED[column.value_type]
        values = []
        for row, value in enumerate(self.found(column).val):
            kind = value.WhichOneof("val")
            if kind not in accepted:
                raise wrong_type(column, row, (kind or "").removesuffix("_val").upper())
            values.append(getattr(value, kind))
        if column.value_type is ValueType.STRING:
            values = [text.encode() for text in values]
        check_values(column, values)
        return values

    def expired(self, now_s: float) -> bool:
        return self._call.gone or self.deadline_s <= now_s

    def answer(self, read: FeatureRead, start: int) -> None:
        entities = [self.found(key).SerializeToString() for key in read.plan.join_keys]
        self._call.reply(
            self._owner.replies(read).message(
                start,
                start + self.rows,
                entities,
                with_versions=self._owner.tells_versions(self._asked),
            )
        )

    def fail(self, error: ServingError) -> None:
        refuse(self._call, error, self._owner.calls, self._owner.method, self.trace)

    def found(self, column: RequestColumn) -> Any:
        """Return a column, sent under its own name or its entity's. What was found once stays."""
        found = self._found.get(column.name)
        if found is not None:
            return found
        found = self._columns.get(column.name)
        if found is None and column.is_key:
            join_keys = self._owner.plans.entity_join_keys
            names = [name for name in self._columns if join_keys.get(name) == column.name]
            found = self._columns[names[0]] if names else None
        if found is None:
            raise missing_column(column, self._columns)
        self._found[column.name] = found
        return found


def _columns(asked: Any) -> dict[str, Any]:
    """
    Return what a request carries by name, `RepeatedValue`s: entities, and request-time data.

    Feast's Python client sends both as entities; its Go server takes either.
    """
    columns = {name: asked.entities[name] for name in asked.entities}
    if asked.request_context:
        for name in asked.request_context:
            columns.setdefault(name, asked.request_context[name])
    return columns


def _selection(asked: Any) -> Selection:
    """Return what is asked for: the same object for the same list, which is found faster."""
    features = asked.features.SerializeToString()
    full = bool(asked.full_feature_names)
    if len(features) > SELECTION_BYTES_MAX:
        return Selection(asked.feature_service, tuple(asked.features.val), full)
    return _known_selection(asked.feature_service, features, full)


@lru_cache(maxsize=SELECTIONS_MAX)
def _known_selection(service: str, features: bytes, full_feature_names: bool) -> Selection:  # noqa: FBT001 a cache's key
    return Selection(service, tuple(pb.FeatureList.FromString(features).val), full_feature_names)


def info_handler() -> "grpc.GenericRpcHandler[Any, Any]":
    """Serve `ServingService/GetFeastServingInfo`: which Feast this is."""

    def get_info(_request: Any, _context: grpc.ServicerContext) -> Any:
        return pb.GetFeastServingInfoResponse(version=feast.__version__)

    return grpc.method_handlers_generic_handler(
        SERVING_SERVICE,
        {
            "GetFeastServingInfo": grpc.unary_unary_rpc_method_handler(
                get_info,
                request_deserializer=pb.GetFeastServingInfoRequest.FromString,
                response_serializer=pb.GetFeastServingInfoResponse.SerializeToString,
            )
        },
    )
