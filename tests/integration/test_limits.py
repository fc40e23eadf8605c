"""What a server takes, and how it says that it takes no more."""

import gc
import threading
import time

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc

from headrace.app import Gateway
from headrace.rpc.server import STREAMS_PER_CONNECTION_MAX
from headrace.settings import load_settings
from headrace.v1 import feature_service_pb2, prediction_service_pb2

ANY_PORTS = {"grpc_address": "127.0.0.1:0", "http_address": "127.0.0.1:0"}


@pytest.fixture(scope="module", params=["completion-queue", "threads"])
def plain(request, model_repository, feature_repo):
    """A gateway with default limits, but for a queue that is full at 4 requests."""
    gateway = Gateway(
        load_settings(
            {
                **ANY_PORTS,
                "model_repository": model_repository,
                "feature_repo": feature_repo,
                "ingress": request.param,
                "max_queue_size": 4,
            }
        )
    )
    gateway.start()
    yield gateway
    assert gateway.stop()


@pytest.fixture
def stub(plain):
    with grpc.insecure_channel(plain.grpc_address) as channel:
        yield service_pb2_grpc.GRPCInferenceServiceStub(channel)


def patient(number):
    message = service_pb2.ModelInferRequest(model_name="patient")
    message.inputs.add(name="x", datatype="FP32", shape=[1, 4])
    message.raw_input_contents.append(np.full((1, 4), number, np.float32).tobytes())
    return message


def test_a_full_queue_refuses_with_pushback_and_serves_those_that_wait(plain, stub):
    # Two rows of four: 8 rows at most in the batch, and no 4 waiting rows at any time but the end.
    model = plain.catalog.find("lines", "")
    held = threading.Event()
    real = model._backend.infer
    entered = threading.Event()

    def hold(inputs, timeout_s=None):
        entered.set()
        assert held.wait(20)
        return real(inputs)

    model._backend.infer = hold
    try:
        message = patient(1)
        message.model_name = "lines"
        first = stub.ModelInfer.future(message, timeout=20)
        assert entered.wait(5)
        waiting = [stub.ModelInfer.future(message, timeout=20) for _ in range(4)]
        while model.waiting < 4:
            time.sleep(0.002)

        with pytest.raises(grpc.RpcError) as refused:
            stub.ModelInfer(message, timeout=20)
        held.set()

        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert ("grpc-retry-pushback-ms", "100") in refused.value.trailing_metadata()
        for future in [first, *waiting]:
            assert future.result().model_name == "lines"
    finally:
        held.set()
        model._backend.infer = real


@pytest.mark.parametrize("count", [10_000, 10_001])
def test_ten_thousand_entities_are_the_limit_by_default(plain, count):
    with triton.InferenceServerClient(plain.grpc_address) as client:
        given = triton.InferInput("driver_id", [count, 1], "INT64")
        given.set_data_from_numpy(np.zeros((count, 1), np.int64))
        with pytest.raises(triton.InferenceServerException) as refused:
            client.infer("driver_score", [given], client_timeout=20)

    # The model itself takes 16 rows: what is said shows which limit was met first.
    expected = "10001 entities; at most 10000" if count > 10_000 else "batch-size must be <= 16"
    assert expected in refused.value.message()


def test_reflection_is_off_by_default(plain):
    with grpc.insecure_channel(plain.grpc_address) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        ask = reflection_pb2.ServerReflectionRequest(list_services="")
        with pytest.raises(grpc.RpcError) as refused:
            list(stub.ServerReflectionInfo(iter([ask]), timeout=10))

    assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.alone
def test_a_message_full_of_numbers_does_not_make_others_wait(plain, stub):
    large = service_pb2.ModelInferRequest(model_name="scores")
    tensor = large.inputs.add(name="x", datatype="FP32", shape=[8, 4])
    tensor.contents.int64_contents.extend([1] * 20_000_000)
    body = large.SerializeToString()
    with grpc.insecure_channel(plain.grpc_address, [("grpc.max_send_message_length", -1)]) as other:
        send = other.unary_unary("/inference.GRPCInferenceService/ModelInfer")
        sent = send.future(body, timeout=30)
        slowest_s = 0.0
        while not sent.done():
            start_s = time.perf_counter()
            stub.ModelReady(service_pb2.ModelReadyRequest(name="scores"), timeout=10)
            message = patient(1)
            message.model_name = "lines"
            stub.ModelInfer(message, timeout=10)
            slowest_s = max(slowest_s, time.perf_counter() - start_s)

    assert sent.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "send raw_input_contents" in sent.details()
    assert slowest_s < 1  # parsing it alone takes that


def test_readiness_forgets_a_store_that_nobody_needs_any_more(plain):
    plain._features_readable = False
    plain._needs_features, needs = False, plain._needs_features
    try:
        plain._look_at_features()
        assert plain.is_ready()
    finally:
        plain._needs_features = needs


@pytest.mark.parametrize("method", ["ModelInfer", "Predict", "GetOnlineFeatures"])
def test_calls_that_are_answered_are_freed_without_the_collector(plain, method, monkeypatch):
    """What a call leaves behind would count against its connection, and end in REFUSED_STREAM."""
    paths = {
        "ModelInfer": "/inference.GRPCInferenceService/ModelInfer",
        "Predict": "/headrace.v1.PredictionService/Predict",
        "GetOnlineFeatures": "/headrace.v1.FeatureService/GetOnlineFeatures",
    }
    infer = patient(1)
    infer.model_name = "lines"
    asked = prediction_service_pb2.PredictRequest(model_name="driver_score")
    asked.columns.add(name="driver_id").values.int64s.values.append(1)
    features = feature_service_pb2.GetOnlineFeaturesRequest(feature_service="driver_features")
    features.entities.add(name="driver_id").values.int64s.values.append(1)
    messages = {"ModelInfer": infer, "Predict": asked, "GetOnlineFeatures": features}
    body = messages[method].SerializeToString()
    gc.collect()
    gc.disable()
    monkeypatch.setattr(gc, "collect", lambda *_: 0)  # gateways look for garbage now and then
    try:
        with grpc.insecure_channel(plain.grpc_address) as channel:
            call = channel.unary_unary(paths[method])
            for _ in range(STREAMS_PER_CONNECTION_MAX + 200):
                call(body, timeout=20)
    finally:
        gc.enable()
