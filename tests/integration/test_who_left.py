"""A caller who leaves is told apart from one whose time runs out: in numbers, lines and quotas."""

import threading
import time

import grpc
import numpy as np
import pytest
import structlog
from held_gateway import held_gateway
from tritonclient.grpc import service_pb2

from headrace.v1 import feature_service_pb2, prediction_service_pb2

LEFT, LATE = "CANCELLED", "DEADLINE_EXCEEDED"
INFER = "/inference.GRPCInferenceService/ModelInfer"
STREAM_INFER = "/inference.GRPCInferenceService/ModelStreamInfer"
PREDICT = "/headrace.v1.PredictionService/Predict"
FEATURES = "/headrace.v1.FeatureService/GetOnlineFeatures"


def infer_request():
    message = service_pb2.ModelInferRequest(model_name="scores")
    message.inputs.add(name="x", datatype="FP32", shape=[1, 4])
    message.raw_input_contents.append(np.ones((1, 4), np.float32).tobytes())
    return message.SerializeToString()


def predict_request():
    request = prediction_service_pb2.PredictRequest(model_name="driver_score")
    request.columns.add(name="driver_id").values.int64s.values.append(1)
    return request.SerializeToString()


def features_request():
    asked = feature_service_pb2.GetOnlineFeaturesRequest(feature_service="driver_features")
    asked.entities.add(name="driver_id").values.int64s.values.append(1)
    return asked.SerializeToString()


CALLS = [
    pytest.param(INFER, infer_request(), id="ModelInfer"),
    pytest.param(PREDICT, predict_request(), id="Predict"),
    pytest.param(FEATURES, features_request(), id="GetOnlineFeatures"),
]


@pytest.fixture(scope="module", params=["completion-queue", "threads"])
def held(request, model_repository, feature_repo):
    """A gateway that answers nobody until `gate` is set; of each caller it takes one row, once."""
    with held_gateway(
        "scores",
        model_repository=model_repository,
        feature_repo=feature_repo,
        ingress=request.param,
        caller_header="x-caller",
        caller_rate_per_s=0.001,
        caller_burst=1,
    ) as gateway:
        yield gateway


@pytest.fixture
def ask(held):
    """Begin a call of a caller; the future is returned. One of somebody else's is under way."""
    for batcher in [served._batcher for served in held.catalog.served()] + [held._reads._short]:
        batcher._cost.__init__()  # the last test held it up: nobody is refused for that
    held.gate.clear()
    held.busy.clear()
    with grpc.insecure_channel(held.grpc_address) as channel:

        def begin(path, message, caller, timeout_s=None):
            return channel.unary_unary(path).future(
                message, metadata=[("x-caller", caller)], timeout=timeout_s
            )

        yield begin
        held.gate.set()
    until(lambda: held.grpc.ingress.open_calls == 0)


@pytest.fixture
def somebody():
    """Callers who have asked for nothing yet: each test's are its own."""
    _names.append(f"caller-{len(_names)}")
    return _names[-1]


_names = []


def until(condition, timeout_s=30.0):
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "it did not happen"
        time.sleep(0.005)


def failures(gateway, code):
    """Return how many calls have failed with a code."""
    errors = next(f for f in gateway.metrics.collect() if f.name == "headrace_rpc_errors")
    return sum(sample.value for sample in errors.samples if sample.labels["code"] == code)


def occupy(gateway, ask, path, message, caller):
    """Hold up whoever answers such calls."""
    first = ask(path, message, f"{caller}-first")
    until(gateway.busy.is_set)
    return first


def waiting(gateway):
    queues = [served.queue for served in gateway.catalog.served()] + [gateway._reads._short]
    return sum(len(queue) for queue in queues)


def is_over_quota(gateway, ask, path, message, caller):
    """Say whether a caller is refused for his quota; he leaves if not."""
    assert waiting(gateway) == 0
    again = ask(path, message, caller)
    until(lambda: again.done() or waiting(gateway) == 1)
    if not again.done():
        again.cancel()
        return False
    assert "quota" in again.details()
    return True


@pytest.mark.parametrize(("path", "message"), CALLS)
def test_who_cancels_is_counted_and_told_of_as_one_who_left_and_pays(
    held, ask, somebody, path, message
):
    occupy(held, ask, path, message, somebody)
    left, late = failures(held, LEFT), failures(held, LATE)
    with structlog.testing.capture_logs() as lines:
        leaving = ask(path, message, somebody, timeout_s=30)
        until(lambda: waiting(held) == 1)

        leaving.cancel()

        until(lambda: failures(held, LEFT) == left + 1)
        until(lambda: any(line.get("code") == LEFT for line in lines))
    line = next(line for line in lines if line.get("code") == LEFT)
    assert line["message"] == "the caller left while the request waited"
    assert failures(held, LATE) == late
    assert is_over_quota(held, ask, path, message, somebody)


@pytest.mark.parametrize(("path", "message"), CALLS)
def test_whose_deadline_passes_in_the_queue_is_counted_as_late_and_pays_nothing(
    held, ask, somebody, path, message
):
    occupy(held, ask, path, message, somebody)
    left, late = failures(held, LEFT), failures(held, LATE)

    waited = ask(path, message, somebody, timeout_s=2)

    assert waited.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    until(lambda: failures(held, LATE) == late + 1)
    assert failures(held, LEFT) == left
    assert not held.gate.is_set()
    assert not is_over_quota(held, ask, path, message, somebody)


def test_messages_of_a_cancelled_stream_are_those_of_a_caller_who_left(held, ask, somebody):
    occupy(held, ask, INFER, infer_request(), somebody)
    left, late = failures(held, LEFT), failures(held, LATE)
    is_over = threading.Event()

    def say():
        yield infer_request()
        is_over.wait(60)

    with grpc.insecure_channel(held.grpc_address) as channel:
        stream = channel.stream_stream(STREAM_INFER)(say(), metadata=[("x-caller", somebody)])
        until(lambda: waiting(held) == 1)

        stream.cancel()

        until(lambda: failures(held, LEFT) == left + 1)
        is_over.set()
    assert failures(held, LATE) == late
