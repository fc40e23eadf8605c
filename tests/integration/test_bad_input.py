"""Bad input gets a clear answer that names it, and the next request is served."""

import struct

import grpc
import numpy as np
import pytest
from tritonclient.grpc import service_pb2, service_pb2_grpc

INVALID = grpc.StatusCode.INVALID_ARGUMENT
ROW = np.ones((1, 4), np.float32).tobytes()


def request(model="scores", version="", inputs=(("x", "FP32", [1, 4]),), raws=(ROW,), outputs=()):
    message = service_pb2.ModelInferRequest(model_name=model, model_version=version)
    for name, datatype, shape in inputs:
        message.inputs.add(name=name, datatype=datatype, shape=shape)
    message.raw_input_contents.extend(raws)
    for name in outputs:
        message.outputs.add(name=name)
    return message


def mixed():
    message = request()
    message.inputs[0].contents.fp32_contents.append(1.0)
    return message


def typed(datatype, field, values, shape=(1, 4), model="scores"):
    message = request(model, inputs=[("x", datatype, shape)], raws=())
    getattr(message.inputs[0].contents, field).extend(values)
    return message


def with_parameter(name):
    message = request()
    message.parameters[name].bool_param = True
    return message


X, PAIR = ("x", "FP32", [1, 4]), ("a", "FP32", [1, 2])
TWO = b"\0" * 8


@pytest.mark.parametrize(
    ("message", "code", "words"),
    [
        pytest.param(
            request("nobody"), grpc.StatusCode.NOT_FOUND, ["'nobody'", "not found"], id="model"
        ),
        pytest.param(
            request(version="9"), grpc.StatusCode.NOT_FOUND, ["'scores'", "version 9"], id="version"
        ),
        pytest.param(request(version="one"), INVALID, ["'one'", "integral"], id="version text"),
        pytest.param(request(version="-1"), INVALID, ["'-1'"], id="negative version"),
        pytest.param(request(version="9" * 5000), INVALID, ["integral"], id="endless version"),
        pytest.param(
            request("pair", inputs=[PAIR], raws=[TWO]),
            INVALID,
            ["'pair'", "expected 2 inputs", "missing required input(s) ['b']"],
            id="missing input",
        ),
        pytest.param(
            request(inputs=[X, ("z", "FP32", [1, 4])], raws=[ROW, ROW]),
            INVALID,
            ["unexpected inference input 'z'"],
            id="extra input",
        ),
        pytest.param(
            request("pair", inputs=[PAIR, PAIR], raws=[TWO, TWO]),
            INVALID,
            ["input 'a' already exists"],
            id="duplicated input",
        ),
        pytest.param(
            request(inputs=[("x", "INT32", [1, 4])]),
            INVALID,
            ["'x' data-type is 'INT32'", "expects 'FP32'"],
            id="wrong datatype",
        ),
        pytest.param(
            request(inputs=[("x", "FP32", [4])]), INVALID, ["'x'", "[-1,4], got [4]"], id="rank"
        ),
        pytest.param(
            request(inputs=[("x", "FP32", [1, 5])], raws=[b"\0" * 20]),
            INVALID,
            ["'x'", "Expected [-1,4], got [1,5]"],
            id="dimension",
        ),
        pytest.param(
            request(inputs=[("x", "FP32", [9, 4])], raws=[ROW * 9]),
            INVALID,
            ["batch-size must be <= 8", "'x'"],
            id="too many rows",
        ),
        pytest.param(
            request(inputs=[("x", "FP32", [0, 4])], raws=[b""]),
            INVALID,
            ["'x'", "no rows"],
            id="no rows",
        ),
        pytest.param(
            request(raws=[ROW[:-1]]), INVALID, ["'x'", "Expected 16, got 15"], id="raw too short"
        ),
        pytest.param(
            request(raws=[ROW + b"\0"]), INVALID, ["'x'", "Expected 16, got 17"], id="raw too long"
        ),
        pytest.param(
            request("lines", inputs=[("x", "FP32", [1, -4])]), INVALID, ["'x'", "-4"], id="negative"
        ),
        pytest.param(
            request("lines", inputs=[("x", "FP32", [8, 2**62])]),
            INVALID,
            ["'x'", "too many elements"],
            id="overflowing",
        ),
        pytest.param(mixed(), INVALID, ["'x'", "raw_input_contents"], id="raw and typed"),
        pytest.param(request(raws=()), INVALID, ["'x'", "has 0 values"], id="no contents"),
        pytest.param(
            request(raws=[ROW, ROW]), INVALID, ["raw input contents"], id="a raw too many"
        ),
        pytest.param(
            typed("FP32", "fp64_contents", [1.0] * 4),
            INVALID,
            ["'x'", "'fp64_contents'", "'fp32_contents'"],
            id="typed contents of another type",
        ),
        pytest.param(
            typed("INT8", "int_contents", [1, 999], (1, 2), "echo_int8"),
            INVALID,
            ["'x'", "out of range"],
            id="typed contents out of range",
        ),
        pytest.param(
            request(
                "echo_bytes",
                inputs=[("x", "BYTES", [1, 2])],
                raws=[struct.pack("<I", 2**31) + b"ab" + struct.pack("<I", 0)],
            ),
            INVALID,
            ["'x'", "length prefixes"],
            id="lying length prefix",
        ),
        pytest.param(
            request(
                "echo_bytes",
                inputs=[("x", "BYTES", [1, 2])],
                raws=[b"\1\0\0\0\xff" * 2],
            ),
            INVALID,
            ["'x'", "UTF-8"],
            id="bytes that are no text",
        ),
        pytest.param(
            request(outputs=["zzz"]), INVALID, ["unexpected inference output 'zzz'"], id="output"
        ),
        pytest.param(
            with_parameter("triton_secret"), INVALID, ["'triton_secret'"], id="reserved parameter"
        ),
        pytest.param(
            request(inputs=[("x" * 100_000, "FP32", [1, 4])]), INVALID, ["xxx"], id="endless name"
        ),
        pytest.param(
            request("corrupt"), grpc.StatusCode.UNAVAILABLE, ["'corrupt'"], id="corrupt model"
        ),
        pytest.param(
            request("unparsable"), grpc.StatusCode.UNAVAILABLE, ["'unparsable'"], id="bad config"
        ),
        pytest.param(
            request("echo_fp32", inputs=[("x", "FP32", [1, 50_000])], raws=[b"\0" * 200_000]),
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            ["larger than max"],
            id="message over the limit",
        ),
    ],
)
def test_it_is_refused_by_name_and_the_next_is_served(gateway, message, code, words):
    with grpc.insecure_channel(gateway.grpc_address) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        with pytest.raises(grpc.RpcError) as refused:
            stub.ModelInfer(message, timeout=5)

        assert refused.value.code() is code, refused.value.details()
        for word in words:
            assert word in refused.value.details()
        assert "/" not in refused.value.details()  # no path
        assert stub.ModelInfer(request(), timeout=5).model_name == "scores"


def test_bytes_that_are_no_request_are_refused(gateway):
    with grpc.insecure_channel(gateway.grpc_address) as channel:
        for path in (
            "/inference.GRPCInferenceService/ModelInfer",
            "/headrace.v1.PredictionService/Predict",
        ):
            with pytest.raises(grpc.RpcError) as refused:
                channel.unary_unary(path)(b"\xff\xff\xff", timeout=5)
            assert refused.value.code() is INVALID


def test_a_row_that_the_model_cannot_run_fails_alone(gateway):
    def ask(stub, index):
        raw = struct.pack("<q", index)
        message = request("gather", inputs=[("x", "INT64", [1, 1])], raws=[raw])
        return stub.ModelInfer.future(message, timeout=10)

    with grpc.insecure_channel(gateway.grpc_address) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        pending = [ask(stub, i % 4) for i in range(64)]
        codes = [call.code() for call in pending]

    assert [i % 4 for i, code in enumerate(codes) if code is not grpc.StatusCode.OK] == [3] * 16
    assert {codes[i] for i in range(3, 64, 4)} == {grpc.StatusCode.INTERNAL}


def test_errors_carry_a_reason_for_machines(gateway):
    from google.rpc import error_details_pb2
    from grpc_status import rpc_status

    with grpc.insecure_channel(gateway.grpc_address) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        with pytest.raises(grpc.RpcError) as refused:
            stub.ModelInfer(request("nobody"), timeout=5)

    info = error_details_pb2.ErrorInfo()
    rpc_status.from_call(refused.value).details[0].Unpack(info)
    assert (info.reason, info.domain) == ("MODEL_NOT_FOUND", "headrace.v1")
