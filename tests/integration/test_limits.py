"""What a server takes, and how it says that it takes no more."""

import gc
import threading
import time

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from live_objects import nothing_collected
from tritonclient.grpc import service_pb2, service_pb2_grpc

from headrace.app import Gateway
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
        assert int(dict(refused.value.trailing_metadata())["grpc-retry-pushback-ms"]) > 0
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
def test_calls_that_are_answered_are_freed_without_the_collector(plain, method):
    """What a call leaves behind keeps its HTTP/2 stream, and all that gRPC has of it."""
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
    with grpc.insecure_channel(plain.grpc_address) as channel:
        call = channel.unary_unary(paths[method])
        call(body, timeout=20)
        with nothing_collected():
            before = ours()
            for _ in range(300):
                call(body, timeout=20)

            until_s = time.monotonic() + 10
            while (left := ours() - before) > 100 and time.monotonic() < until_s:
                time.sleep(0.01)  # whoever watches calls lets go of them by and by
            assert left <= 100  # one for each call would be 300, at least


def ours():
    """Count the calls and requests that are alive, and what belongs to them."""
    theirs = "headrace.rpc.", "headrace.request", "headrace.batching.", "headrace.feature_reads"
    return sum(str(type(thing).__module__).startswith(theirs) for thing in gc.get_objects())


def test_a_burst_on_one_connection_is_served_or_refused_whatever_its_size(plain):
    message = patient(1)
    message.model_name = "lines"
    body = message.SerializeToString()
    with grpc.insecure_channel(plain.grpc_address) as channel:
        call = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")

        futures = [call.future(body, timeout=60) for _ in range(2_500)]

        codes = {future.code() for future in futures}
    assert codes <= {grpc.StatusCode.OK, grpc.StatusCode.RESOURCE_EXHAUSTED}


@pytest.mark.parametrize("ingress", ["completion-queue", "threads"])
def test_a_connection_has_no_more_calls_under_way_than_it_may(ingress, tmp_path, model_files):
    model_files.write_model(
        tmp_path,
        "held",
        [model_files.helper.make_node("Identity", ["x"], ["y"])],
        [("x", "FP32", ["n", 4])],
        [("y", "FP32", ["n", 4])],
        config="max_batch_size: 8",
    )
    gateway = Gateway(
        load_settings(
            {
                **ANY_PORTS,
                "model_repository": tmp_path,
                "ingress": ingress,
                "max_concurrent_streams": 5,
            }
        )
    )
    backend = gateway.catalog.find("held", "")._backend
    gate, real = threading.Event(), backend.infer

    def hold(inputs):
        assert gate.wait(20)
        return real(inputs)

    backend.infer = hold
    message = patient(1)
    message.model_name = "held"
    gateway.start()
    try:
        with grpc.insecure_channel(gateway.grpc_address) as channel:
            stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            grpc.channel_ready_future(channel).result(10)  # the server has said how many
            futures = [stub.ModelInfer.future(message, timeout=20) for _ in range(200)]
            until_s = time.monotonic() + 20
            while gateway.grpc.ingress.open_calls < 5 and time.monotonic() < until_s:
                time.sleep(0.002)
            time.sleep(0.2)  # long enough for a sixth to come, if it may
            assert gateway.grpc.ingress.open_calls == 5
            gate.set()

            assert all(future.result().model_name == "held" for future in futures)
    finally:
        gate.set()
        assert gateway.stop()
