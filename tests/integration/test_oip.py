"""An unmodified Triton client finds what it expects."""

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
from tritonclient.grpc import service_pb2, service_pb2_grpc


def tensor(name, array, datatype):
    given = triton.InferInput(name, array.shape, datatype)
    given.set_data_from_numpy(array)
    return given


def test_server_and_models_say_that_they_are_live_and_ready(client):
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("scores")
    assert client.is_model_ready("scores", "1")


def test_a_model_that_is_unknown_or_failed_is_not_ready(client):
    assert not client.is_model_ready("nobody")
    assert not client.is_model_ready("scores", "2")
    assert not client.is_model_ready("corrupt")


def test_server_metadata_names_only_what_is_implemented(client):
    metadata = client.get_server_metadata()

    assert metadata.name == "headrace"
    assert set(metadata.extensions) == {
        "model_configuration",
        "model_repository",
        "binary_tensor_data",
        "parameters",
        "logging",
    }


def test_what_is_logged_can_be_asked_for_and_not_changed_by_just_anybody(client):
    assert set(client.get_log_settings().settings) == {
        "log_info",
        "log_warning",
        "log_error",
        "log_verbose_level",
    }
    with pytest.raises(triton.InferenceServerException, match="--allow-log-settings"):
        client.update_log_settings({"log_verbose_level": 1})


def test_model_metadata_shows_the_batch_dimension(client):
    metadata = client.get_model_metadata("pair")

    assert list(metadata.versions) == ["1"]
    assert metadata.platform == "onnxruntime_onnx"
    assert [(t.name, t.datatype, list(t.shape)) for t in metadata.inputs] == [
        ("a", "FP32", [-1, 2]),
        ("b", "FP32", [-1, 2]),
    ]
    assert [t.name for t in metadata.outputs] == ["total", "echo"]


def test_model_configuration_is_complete(client):
    config = client.get_model_config("scores").config

    assert config.name == "scores"
    assert config.max_batch_size == 8
    assert [(i.name, list(i.dims)) for i in config.input] == [("x", [4])]


def test_a_batch_of_rows_comes_back_row_for_row(client):
    rows = np.arange(12, dtype=np.float32).reshape(3, 4)

    result = client.infer("scores", [tensor("x", rows, "FP32")], request_id="mine")

    np.testing.assert_array_equal(result.as_numpy("y"), rows.sum(axis=1, keepdims=True))
    assert result.get_response().id == "mine"
    assert result.get_response().model_version == "1"


def test_each_request_has_a_prediction_id_of_its_own(client):
    rows = np.ones((1, 4), np.float32)

    responses = [client.infer("scores", [tensor("x", rows, "FP32")]) for _ in range(3)]

    ids = {r.get_response().parameters["prediction_id"].string_param for r in responses}
    assert len(ids) == 3
    assert "" not in ids


def test_requests_that_look_alike_are_each_answered_with_their_own_numbers(client):
    for i in range(8):
        rows = np.full((2, 4), i, np.float32)

        response = client.infer("scores", [tensor("x", rows, "FP32")], request_id=f"id-{i}")

        np.testing.assert_array_equal(response.as_numpy("y"), rows.sum(axis=1, keepdims=True))
        assert response.get_response().id == f"id-{i}"


def test_only_the_requested_outputs_come_in_the_order_asked_for(client):
    a, b = np.ones((1, 2), np.float32), np.full((1, 2), 2, np.float32)
    wanted = [triton.InferRequestedOutput("echo"), triton.InferRequestedOutput("total")]

    response = client.infer(
        "pair", [tensor("b", b, "FP32"), tensor("a", a, "FP32")], outputs=wanted
    ).get_response()

    assert [output.name for output in response.outputs] == ["echo", "total"]
    assert list(response.raw_output_contents) == [b.tobytes(), (a + b).tobytes()]


def test_a_model_without_a_batch_dimension_takes_its_exact_shape(client):
    whole = np.arange(6, dtype=np.float32).reshape(2, 3)

    result = client.infer("whole", [tensor("x", whole, "FP32")])

    np.testing.assert_array_equal(result.as_numpy("y"), whole)


@pytest.mark.parametrize(
    ("datatype", "values"),
    [
        ("FP32", np.array([[np.nan, np.inf], [-np.inf, -0.0]], np.float32)),
        ("FP64", np.array([[1 / 3, 1e300]], np.float64)),
        ("FP16", np.array([[0.5, -2.0]], np.float16)),
        ("INT64", np.array([[2**62, -1]], np.int64)),
        ("INT32", np.array([[2**31 - 1, -(2**31)]], np.int32)),
        ("INT8", np.array([[-128, 127]], np.int8)),
        ("UINT8", np.array([[0, 255]], np.uint8)),
        ("BOOL", np.array([[True, False]])),
        ("BYTES", np.array([[b"", "zwölf".encode()]], np.object_)),
    ],
)
def test_every_datatype_goes_in_and_out_unchanged(client, datatype, values):
    result = client.infer(f"echo_{datatype.lower()}", [tensor("x", values, datatype)])

    np.testing.assert_array_equal(result.as_numpy("y"), values)


@pytest.mark.parametrize(
    ("datatype", "field", "values", "expected"),
    [
        ("FP32", "fp32_contents", [1.5, 2.5], np.array([[1.5, 2.5]], np.float32)),
        ("FP64", "fp64_contents", [1.5, 2.5], np.array([[1.5, 2.5]])),
        ("INT64", "int64_contents", [-1, 2], np.array([[-1, 2]])),
        ("INT8", "int_contents", [-1, 2], np.array([[-1, 2]], np.int8)),
        ("UINT8", "uint_contents", [1, 255], np.array([[1, 255]], np.uint8)),
        ("BOOL", "bool_contents", [True, False], np.array([[True, False]])),
        ("BYTES", "bytes_contents", [b"a", b"bc"], None),
    ],
)
def test_typed_contents_go_in_and_raw_contents_come_out(gateway, datatype, field, values, expected):
    name = f"echo_{datatype.lower()}"
    request = service_pb2.ModelInferRequest(model_name=name)
    given = request.inputs.add(name="x", datatype=datatype, shape=[1, 2])
    getattr(given.contents, field).extend(values)

    with grpc.insecure_channel(gateway.grpc_address) as channel:
        response = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer(request, timeout=5)

    raw = b"\1\0\0\0a\2\0\0\0bc" if expected is None else expected.tobytes()
    assert list(response.raw_output_contents) == [raw]
    assert not response.outputs[0].HasField("contents")


def test_calls_that_are_not_offered_are_unimplemented(client):
    with pytest.raises(triton.InferenceServerException) as refused:
        client.get_inference_statistics()

    assert refused.value.status() == "StatusCode.UNIMPLEMENTED"
