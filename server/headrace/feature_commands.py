"""`headrace features list` and `get`: what a running server reads, as people want to see it."""

import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import grpc
from rich.table import Table

from headrace.errors import StartupError
from headrace.features.feast_import import import_feast
from headrace.features.values import COLUMN_DATATYPES, ValueType
from headrace.presentation import cell, duration, strict_json
from headrace.row_arguments import Input, read_rows
from headrace.terminal import open_console, printable
from headrace.v1 import feature_service_pb2 as pb
from headrace.v1 import feature_service_pb2_grpc as pb_grpc
from headrace.v1.prediction_service_pb2 import FeatureStatus

ROWS_SHOWN = 20
_COLUMN_KINDS = {
    "INT64": "int64s",
    "INT32": "int32s",
    "BYTES": "strings",
    "FP64": "doubles",
    "FP32": "floats",
    "BOOL": "bools",
}
_STYLES = {"PRESENT": "", "OUTSIDE_MAX_AGE": "yellow", "NULL_VALUE": "dim", "NOT_FOUND": "red"}


class Found(NamedTuple):
    """
    One value.

    Args:
        value: None where there is none.
        status: Feast's name of its status.
        age_s: Since it was observed; None where unknown.
    """

    value: Any
    status: str
    age_s: float | None


def list_services(address: str, *, timeout_s: float, as_json: bool) -> int:
    """
    Show the feature services of a running server, and why some cannot be served.

    Returns:
        0.

    Raises:
        StartupError: nobody answers there, or it serves no features.
    """
    with _channel(address) as channel:
        stub = pb_grpc.FeatureServiceStub(channel)
        try:
            reply = stub.ListFeatureServices(pb.ListFeatureServicesRequest(), timeout=timeout_s)
        except grpc.RpcError as error:
            raise _refused(address, error) from None
    console = open_console(as_json=as_json)
    if as_json:
        services = [{"name": of.name, "reason": of.reason} for of in reply.feature_services]
        console.print(json.dumps(services))
        return 0
    table = Table("feature service", "state", "reason")
    for of in reply.feature_services:
        state = "UNAVAILABLE" if of.reason else "READY"
        table.add_row(printable(of.name), state, printable(of.reason))
    console.print(table)
    return 0


def get(
    address: str,
    selection: str,
    pairs: Sequence[str],
    *,
    full_feature_names: bool,
    timeout_s: float,
    as_json: bool,
) -> int:
    """
    Read features of a few entities from a running server and show them.

    Args:
        address: host:port of the gateway.
        selection: A feature service's name, or `view:feature,view:feature`.
        pairs: `join_key=value …`, as `read_rows` takes them.
        full_feature_names: Whether to name features `view__feature`.
        timeout_s: How long to wait.
        as_json: For machines.

    Returns:
        0 when it answered, 1 when it refused.

    Raises:
        StartupError: the request cannot be made: nobody answers, no such features, a join key is
            missing, unknown or not of its type.
    """
    chosen: dict[str, Any] = {"full_feature_names": full_feature_names}
    if ":" in selection:
        chosen["features"] = pb.FeatureReferences(references=selection.split(","))
    else:
        chosen["feature_service"] = selection
    with _channel(address) as channel:
        stub = pb_grpc.FeatureServiceStub(channel)
        try:
            metadata = stub.GetFeatureMetadata(
                pb.GetFeatureMetadataRequest(**chosen), timeout=timeout_s
            )
        except grpc.RpcError as error:
            raise _refused(address, error) from None
        keys = {
            column.name: COLUMN_DATATYPES[ValueType[column.value_type]]
            for column in (*metadata.join_keys, *metadata.data_columns)
        }
        inputs = [Input(name, datatype, ()) for name, datatype in keys.items()]
        columns = read_rows(printable(selection), inputs, pairs)
        request = pb.GetOnlineFeaturesRequest(include_event_times=True, **chosen)
        for name, datatype in keys.items():
            column = request.entities.add(name=name).values
            getattr(column, _COLUMN_KINDS[datatype]).values.extend(columns[name])
        try:
            reply = stub.GetOnlineFeatures(request, timeout=timeout_s)
        except grpc.RpcError as error:
            text = f"{error.code().name}: {printable(error.details())}"
            print(f"headrace features: {text}", file=sys.stderr)
            return 1
    rows = len(next(iter(columns.values()), (None,)))
    found = {of.name: _found(of, reply.event_times, rows) for of in reply.features}
    views = {of.name: of.view for of in metadata.features}
    if as_json:
        document = _document(columns, found, views, rows)
        open_console(as_json=True).print(json.dumps(strict_json(document), allow_nan=False))
    else:
        _show(columns, found, views, rows)
    return 0


def _found(of: Any, event_times: Any, rows: int) -> list[Found]:
    statuses = of.statuses or [FeatureStatus.FEATURE_STATUS_PRESENT] * rows
    names = [FeatureStatus.Name(one).removeprefix("FEATURE_STATUS_") for one in statuses]
    ages_s = [time.time() - at for at in event_times[of.view_index].event_times_s]
    return [
        Found(
            value if name in ("PRESENT", "OUTSIDE_MAX_AGE") else None,
            name,
            round(age_s, 3) if math.isfinite(age_s) else None,
        )
        for value, name, age_s in zip(_values(of), names, ages_s, strict=True)
    ]


def _values(of: Any) -> list[Any]:
    if of.WhichOneof("kind") == "serialized_values":
        return [_parsed(raw) for raw in of.serialized_values.values]
    kind = of.values.WhichOneof("kind")
    values = list(getattr(of.values, kind).values)
    return [v.decode(errors="replace") if isinstance(v, bytes) else v for v in values]


def _parsed(raw: bytes) -> Any:
    import_feast()
    from feast.protos.feast.types.Value_pb2 import Value  # noqa: PLC0415 seconds to import

    message = Value.FromString(raw)
    kind = message.WhichOneof("val")
    value: Any = getattr(message, kind) if kind else None
    return list(value.val) if hasattr(value, "val") else value


def _document(
    columns: Mapping[str, Sequence[Any]],
    found: Mapping[str, Sequence[Found]],
    views: Mapping[str, str],
    rows: int,
) -> list[dict[str, Any]]:
    return [
        {
            "entity": {name: values[row] for name, values in columns.items()},
            "features": {
                name: {**values[row]._asdict(), "view": views[name]}
                for name, values in found.items()
            },
        }
        for row in range(rows)
    ]


def _show(
    columns: Mapping[str, Sequence[Any]],
    found: Mapping[str, Sequence[Found]],
    views: Mapping[str, str],
    rows: int,
) -> None:
    console = open_console()
    for row in range(min(rows, ROWS_SHOWN)):
        entity = ", ".join(f"{name} {values[row]}" for name, values in columns.items())
        console.print(printable(entity or "no entity"), style="bold")
        table = Table()
        for heading in ("feature", "value", "status", "age", "view"):
            table.add_column(heading, justify="right" if heading in ("value", "age") else "left")
        for name, values in found.items():
            of = values[row]
            table.add_row(
                printable(name),
                "" if of.value is None else cell(of.value),
                of.status,
                "" if of.age_s is None else duration(of.age_s),
                printable(views[name]),
                style=_STYLES[of.status],
            )
        console.print(table)
    if rows > ROWS_SHOWN:
        console.print(f"… and {rows - ROWS_SHOWN} more rows; --json shows all")


def _channel(address: str) -> grpc.Channel:
    # Operators' proxies have no business between them and their own server.
    return grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)])


def _refused(address: str, error: Any) -> StartupError:
    code, details = error.code(), printable(error.details())
    if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
        return StartupError(
            f"--address {address}: {code.name}; is `headrace serve` running there? ({details})"
        )
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return StartupError(f"--address {address}: it serves no features; it has no --feature-repo")
    return StartupError(f"{code.name}: {details}")
