"""`headrace predict`: rows from the command line, predictions from a running server."""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np
from rich.console import Console
from rich.table import Table
from tritonclient.grpc import service_pb2, service_pb2_grpc

from headrace.errors import StartupError
from headrace.presentation import cell, duration, strict_json
from headrace.row_arguments import Input, read_rows, shown
from headrace.tensors import NUMPY_DTYPES, encode, iterate_bytes
from headrace.terminal import open_console, printable
from headrace.v1 import prediction_service_pb2 as pb
from headrace.v1 import prediction_service_pb2_grpc as pb_grpc

ROWS_SHOWN = 50

_COLUMN_KINDS = {
    "INT64": "int64s",
    "INT32": "int32s",
    "INT16": "int32s",
    "INT8": "int32s",
    "UINT32": "int64s",
    "UINT16": "int32s",
    "UINT8": "int32s",
    "FP16": "floats",
    "FP32": "floats",
    "FP64": "doubles",
    "BOOL": "bools",
    "BYTES": "strings",
}
"""The kind of a `Predict` column that holds each datatype whole; UINT64 has none."""


_NOBODY = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)


@dataclass(frozen=True, slots=True)
class Answer:
    """
    What the server said.

    Args:
        model: Who answered.
        version: Its version.
        prediction_id: Row i is `id/i`.
        rows: How many.
        inputs: What was asked, by column.
        outputs: What was predicted, by column.
        features: What the model saw, by feature: value, status, age in seconds; when asked for.
        timings_ms: Where the time went in the server, when it says.
    """

    model: str
    version: str
    prediction_id: str
    rows: int
    inputs: dict[str, list[Any]]
    outputs: dict[str, list[Any]]
    features: dict[str, list[dict[str, Any]]]
    timings_ms: dict[str, float]


def predict(
    address: str,
    model: str,
    pairs: Sequence[str],
    *,
    version: str,
    with_features: bool,
    timeout_s: float,
    as_json: bool,
) -> int:
    """
    Ask a running server for predictions and show them.

    Args:
        address: host:port of the gateway.
        model: Its name.
        pairs: `column=value …`, as `read_rows` takes them.
        version: A number; empty for the server's choice.
        with_features: Whether to show what the model saw.
        timeout_s: How long to wait.
        as_json: For machines.

    Returns:
        0 predicted, 1 the server refused or failed.

    Raises:
        StartupError: the request cannot be made: nobody answers, no such model, a column is
            missing, unknown or not of its type.
    """
    # What a server says is text: no markup, and no emoji for what looks like their names.
    console = open_console(as_json=as_json)
    for what, given in (("--address", address), ("model", model)):
        if any("\ud800" <= character <= "\udfff" for character in given):  # bytes of argv
            raise StartupError(f"{what} {shown(given)} is not UTF-8")
    # Operators' proxies have no business between them and their own server.
    options = [("grpc.enable_http_proxy", 0)]
    with grpc.insecure_channel(address, options=options) as channel:
        inputs = _inputs(channel, address, model, version, timeout_s)
        columns = read_rows(printable(model), inputs, pairs)
        try:
            if all(of.has_one_value and of.datatype in _COLUMN_KINDS for of in inputs):
                answer = _ask(channel, model, version, inputs, columns, with_features, timeout_s)
            elif with_features:
                raise StartupError("--features is for models with one value per row and column")
            else:
                answer = _ask_tensors(channel, model, version, inputs, columns, timeout_s)
        except grpc.RpcError as error:
            text = f"{error.code().name}: {printable(error.details())}"
            print(f"headrace predict: {text}", file=sys.stderr)
            return 1
    if as_json:
        console.print(json.dumps(_as_json(answer), allow_nan=False))
    else:
        _show(console, answer)
    return 0


def _inputs(
    channel: grpc.Channel, address: str, model: str, version: str, timeout_s: float
) -> list[Input]:
    """Ask what the model takes."""
    stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
    try:
        metadata = stub.ModelMetadata(
            service_pb2.ModelMetadataRequest(name=model, version=version), timeout=timeout_s
        )
        config = stub.ModelConfig(
            service_pb2.ModelConfigRequest(name=model, version=version), timeout=timeout_s
        ).config
    except grpc.RpcError as error:
        if error.code() is grpc.StatusCode.NOT_FOUND:
            raise StartupError(
                f"{printable(error.details())}; it serves {_served(stub, timeout_s)}"
            ) from None
        details = printable(error.details())
        if error.code() in _NOBODY and not _is_live(stub, timeout_s):
            raise StartupError(
                f"--address {address}: {error.code().name}; is `headrace serve` running there? "
                f"({details})"
            ) from None
        if error.code() is grpc.StatusCode.UNAVAILABLE:
            details += "; `headrace models list` says why"
        raise StartupError(f"{error.code().name}: {details}") from None
    batched = config.max_batch_size > 0
    return [
        Input(of.name, of.datatype, tuple(of.shape)[1 if batched else 0 :], batched)
        for of in metadata.inputs
    ]


def _is_live(stub: Any, timeout_s: float) -> bool:
    """Return whether it is the server that refused, not the network."""
    try:
        return bool(stub.ServerLive(service_pb2.ServerLiveRequest(), timeout=timeout_s).live)
    except grpc.RpcError:
        return False


def _served(stub: Any, timeout_s: float) -> str:
    try:
        index = stub.RepositoryIndex(
            service_pb2.RepositoryIndexRequest(ready=True), timeout=timeout_s
        )
    except grpc.RpcError:
        return "nobody knows what"
    names = sorted({f"{m.name} {m.version}" for m in index.models if m.state == "READY"})
    return printable(", ".join(names[:20])) or "no model at all"


def _ask(
    channel: grpc.Channel,
    model: str,
    version: str,
    inputs: Sequence[Input],
    columns: Mapping[str, list[Any]],
    with_features: bool,  # noqa: FBT001 one caller's choice
    timeout_s: float,
) -> Answer:
    request = pb.PredictRequest(model_name=model, include_features=with_features)
    if version:
        request.model_version = int(version)
    for of in inputs:
        column = request.columns.add(name=of.name).values
        values = getattr(column, _COLUMN_KINDS[of.datatype]).values
        values.extend(columns[of.name])
    reply = pb_grpc.PredictionServiceStub(channel).Predict(request, timeout=timeout_s)
    rows = len(next(iter(columns.values())))
    return Answer(
        model=reply.model_name,
        version=str(reply.model_version),
        prediction_id=reply.prediction_id,
        rows=rows,
        inputs=dict(columns),
        outputs={
            of.name: _by_row(_values(of.values), list(of.shape), rows) for of in reply.outputs
        },
        features={of.name: _feature(of) for of in reply.features},
        timings_ms={
            name: getattr(reply.timings, name).ToMicroseconds() / 1e3
            for name in ("queue", "features", "infer", "total")
        },
    )


def _ask_tensors(
    channel: grpc.Channel,
    model: str,
    version: str,
    inputs: Sequence[Input],
    columns: Mapping[str, list[Any]],
    timeout_s: float,
) -> Answer:
    request = service_pb2.ModelInferRequest(model_name=model, model_version=version)
    for of in inputs:
        rows_of = columns[of.name] if of.is_batched else columns[of.name][0]
        array = np.array(rows_of, NUMPY_DTYPES[of.datatype])
        if of.has_one_value:
            array = array.reshape(-1, *of.shape)
        request.inputs.add(name=of.name, datatype=of.datatype, shape=array.shape)
        request.raw_input_contents.append(encode(array))
    stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
    reply = stub.ModelInfer(request, timeout=timeout_s)
    rows = len(next(iter(columns.values())))
    outputs = {}
    for of, raw in zip(reply.outputs, reply.raw_output_contents, strict=True):
        if of.datatype == "BYTES":
            values = [value.decode(errors="replace") for value in iterate_bytes(raw)]
        else:
            values = np.frombuffer(raw, NUMPY_DTYPES[of.datatype]).tolist()
        outputs[of.name] = _by_row(values, list(of.shape), rows)
    return Answer(
        model=reply.model_name,
        version=reply.model_version,
        prediction_id=reply.parameters["prediction_id"].string_param,
        rows=rows,
        inputs=dict(columns),
        outputs=outputs,
        features={},
        timings_ms={},
    )


def _values(column: pb.Column) -> list[Any]:
    kind = column.WhichOneof("kind")
    values = list(getattr(column, kind).values) if kind else []
    return [v.decode(errors="replace") if isinstance(v, bytes) else v for v in values]


def _by_row(values: list[Any], shape: Sequence[int], rows: int) -> list[Any]:
    """Cut row-major values into rows, nested as the model shapes them; a lone value is itself."""
    nested = np.array(values, object).reshape(shape).tolist()
    if not shape or shape[0] != rows:
        return [nested]
    return values if len(values) == rows else list(nested)


def _feature(of: pb.FeatureColumn) -> list[dict[str, Any]]:
    values = _values(of.values) or [None] * len(of.statuses)
    return [
        {
            "value": value if name in ("PRESENT", "OUTSIDE_MAX_AGE") else None,
            "status": name,
            "age_s": None if age != age else round(age, 3),  # noqa: PLR0124 not-a-number
        }
        for value, status, age in zip(values, of.statuses, of.ages_s, strict=True)
        for name in [pb.FeatureStatus.Name(status).removeprefix("FEATURE_STATUS_")]
    ]


def _as_json(answer: Answer) -> dict[str, Any]:
    document: dict[str, Any] = {
        "model": answer.model,
        "version": answer.version,
        "prediction_id": answer.prediction_id,
        "outputs": strict_json(answer.outputs),
    }
    if answer.features:
        document["features"] = strict_json(answer.features)
    if answer.timings_ms:
        document["timings_ms"] = answer.timings_ms
    return document


def _show(console: Console, answer: Answer) -> None:
    title = f"{answer.model} version {answer.version}, prediction {answer.prediction_id}"
    console.print(printable(title), soft_wrap=True)  # whole, to be copied: no title of the table
    table = Table()
    for name in answer.inputs:
        table.add_column(printable(name))
    for name in answer.outputs:
        table.add_column(printable(name), justify="right", style="bold")
    columns = [*answer.inputs.values(), *answer.outputs.values()]
    for row in range(min(answer.rows, ROWS_SHOWN)):
        table.add_row(*(cell(values[row]) if row < len(values) else "" for values in columns))
    console.print(table)
    if answer.rows > ROWS_SHOWN:
        console.print(f"… and {answer.rows - ROWS_SHOWN} more rows; --json shows all")
    if answer.features:
        _show_features(console, answer)
    if answer.timings_ms:
        parts = ", ".join(f"{name} {ms:.2f} ms" for name, ms in answer.timings_ms.items())
        console.print(f"in the server: {parts}")


def _show_features(console: Console, answer: Answer) -> None:
    table = Table(title="what the model saw")
    for heading in ("row", "feature", "value", "status", "age"):
        table.add_column(heading, justify="right" if heading in ("row", "value", "age") else "left")
    for row in range(min(answer.rows, ROWS_SHOWN)):
        for name, values in answer.features.items():
            of = values[row]
            age = "" if of["age_s"] is None else duration(of["age_s"])
            value = "" if of["value"] is None else cell(of["value"])
            table.add_row(str(row), printable(name), value, of["status"], age)
    console.print(table)
