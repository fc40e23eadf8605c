"""Callers who leave while their requests wait: all of them are out of the queue at once."""

import threading
import time

import grpc
import numpy as np
import pytest
from feast.protos.feast.serving import ServingService_pb2
from held_gateway import held_gateway
from live_objects import live, nothing_collected
from tritonclient.grpc import service_pb2

from headrace.feature_reads import FeatureRequest
from headrace.request import Request
from headrace.v1 import feature_service_pb2
from headrace.v1 import prediction_service_pb2 as pb

MODEL = "lines"
INFER = "/inference.GRPCInferenceService/ModelStreamInfer"
PREDICT = "/headrace.v1.PredictionService/StreamPredict"
FEATURES = "/headrace.v1.FeatureService/GetOnlineFeatures"
FEAST = "/feast.serving.ServingService/GetOnlineFeatures"

STREAMS, MESSAGES = 20, 50
CALLS = 1_000


@pytest.fixture(scope="module", params=["completion-queue", "threads"])
def held(request, model_repository, feature_repo):
    """A gateway whose model and store answer nobody until `gate` is set; `busy` is set by then."""
    with held_gateway(
        MODEL,
        model_repository=model_repository,
        feature_repo=feature_repo,
        ingress=request.param,
    ) as gateway:
        yield gateway


@pytest.fixture
def channel(held):
    for served in held.catalog.served():  # the last test held one up: nobody is refused for that
        served._batcher._cost.__init__()
    held.gate.clear()
    held.busy.clear()
    with grpc.insecure_channel(held.grpc_address) as channel:
        yield channel
        held.gate.set()
    until(lambda: held.grpc.ingress.open_calls == 0 and held.grpc.ingress.open_streams == 0)


def until(condition, timeout_s=30.0):
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "it did not happen"
        time.sleep(0.005)


def infer_request():
    message = service_pb2.ModelInferRequest(model_name=MODEL)
    message.inputs.add(name="x", datatype="FP32", shape=[1, 4])
    message.raw_input_contents.append(np.ones((1, 4), np.float32).tobytes())
    return message.SerializeToString()


def predict_request():
    request = pb.PredictRequest(model_name="driver_score")
    request.columns.add(name="driver_id").values.int64s.values.append(1)
    return pb.StreamPredictRequest(id="mine", request=request).SerializeToString()


def features_request():
    asked = feature_service_pb2.GetOnlineFeaturesRequest(feature_service="driver_features")
    asked.entities.add(name="driver_id").values.int64s.values.append(1)
    return asked.SerializeToString()


def feast_request():
    asked = ServingService_pb2.GetOnlineFeaturesRequest(feature_service="driver_features")
    asked.entities["driver_id"].val.add(int64_val=1)
    return asked.SerializeToString()


class OpenStream:
    """A stream that has said so much and then says no more, without an end."""

    def __init__(self, channel, path, message, timeout_s=None):
        self._is_over = threading.Event()

        def say():
            for _ in range(MESSAGES):
                yield message
            self._is_over.wait(60)

        self.call = channel.stream_stream(path)(say(), timeout=timeout_s)

    def leave(self):
        self.call.cancel()
        self._is_over.set()


@pytest.fixture(params=["ModelStreamInfer", "StreamPredict"])
def fill(request, held, channel):
    """Begin streams until all their messages wait; they and their model are returned."""
    path, name, message = {
        "ModelStreamInfer": (INFER, MODEL, infer_request()),
        "StreamPredict": (PREDICT, "driver_score", predict_request()),
    }[request.param]
    model = held.catalog.find(name, "")

    def begin(count=STREAMS, timeout_s=None):
        first = OpenStream(channel, path, message)
        until(held.busy.is_set)
        # What the first batch took waits no more.
        until(lambda: held.grpc.ingress.open_calls == MESSAGES)
        before = model.waiting
        streams = [OpenStream(channel, path, message, timeout_s) for _ in range(count)]
        until(lambda: model.waiting == before + count * MESSAGES)
        return model, first, streams

    return begin


def test_a_thousand_messages_of_cancelled_streams_leave_their_queue_at_once(held, fill):
    model, first, streams = fill()
    before = model._batcher.dropped

    for stream in streams:
        stream.leave()
    first.leave()

    until(lambda: model.waiting == 0)
    assert not held.gate.is_set()  # nobody took them
    until(lambda: held.grpc.ingress.open_calls == 0 and held.grpc.ingress.open_streams == 0)
    assert model._batcher.dropped - before >= STREAMS * MESSAGES


def test_messages_of_streams_whose_deadline_passes_leave_their_queue_at_once(held, fill):
    model, first, streams = fill(count=2, timeout_s=2)  # far longer than it takes to send them

    until(lambda: model.waiting <= MESSAGES)  # of the first stream, perhaps

    assert not held.gate.is_set()  # nobody took them
    for stream in [first, *streams]:
        stream.leave()


def test_messages_of_lost_streams_are_freed_without_the_collector(held, fill):
    _, first, streams = fill()
    with nothing_collected():
        before = live(Request)
        assert before >= (STREAMS + 1) * MESSAGES
        for stream in streams:
            stream.leave()
        until(lambda: held.grpc.ingress.open_streams == 1)

        until(lambda: live(Request) <= before - STREAMS * MESSAGES)
    first.leave()


@pytest.mark.parametrize(
    ("path", "message"),
    [(FEATURES, features_request()), (FEAST, feast_request())],
    ids=["headrace", "feast"],
)
def test_a_thousand_feature_reads_leave_their_queue_at_once(held, channel, path, message):
    ask = channel.unary_unary(path)
    queue = held._reads._short
    first = ask.future(message)
    until(held.busy.is_set)
    leaving = [ask.future(message) for _ in range(CALLS)]
    # With threads some of them wait for a thread, out of sight.
    until(lambda: len(queue) >= 200)

    for future in leaving:
        future.cancel()

    until(lambda: len(queue) == 0 and held.grpc.ingress.open_calls == 1)
    assert not held.gate.is_set()  # nobody took them
    held.gate.set()
    assert first.result(timeout=20)


def test_feature_reads_that_are_given_up_are_freed_without_the_collector(held, channel):
    ask = channel.unary_unary(FEATURES)
    first = ask.future(features_request())
    until(held.busy.is_set)
    with nothing_collected():
        before = live(FeatureRequest)
        leaving = [ask.future(features_request()) for _ in range(100)]
        until(lambda: len(held._reads._short) == 100)
        assert live(FeatureRequest) >= before + 100
        for future in leaving:
            future.cancel()

        until(lambda: len(held._reads._short) == 0)
        until(lambda: live(FeatureRequest) == before)
    held.gate.set()
    assert first.result(timeout=20)
