"""A call that is refused for its deadline has cost the feature store nothing."""

import threading
import time

import grpc
import pytest

from headrace.app import Gateway
from headrace.settings import load_settings
from headrace.v1 import prediction_service_pb2 as pb

MODEL_S = 1.0
PREDICT = "/headrace.v1.PredictionService/Predict"


@pytest.fixture(scope="module", params=["completion-queue", "threads"])
def slow(request, model_repository, feature_repo):
    """
    A gateway whose model takes `MODEL_S`, and then until `gate` is set; `busy` is set by it. What
    the real store was asked for is in `reads`.
    """
    gateway = Gateway(
        load_settings(
            {
                "model_repository": model_repository,
                "feature_repo": feature_repo,
                "grpc_address": "127.0.0.1:0",
                "http_address": "127.0.0.1:0",
                "ingress": request.param,
            }
        )
    )
    gateway.gate, gateway.busy = threading.Event(), threading.Event()
    gateway.gate.set()
    backend = gateway.catalog.find("driver_score", "")._backend
    real = backend.infer

    def infer(inputs):
        gateway.busy.set()
        time.sleep(MODEL_S)
        assert gateway.gate.wait(60)
        return real(inputs)

    backend.infer = infer
    gateway.reads, read = [], gateway._store.read

    def counted(plan, entities, **how):
        gateway.reads.append(entities)
        return read(plan, entities, **how)

    gateway._store.read = counted
    gateway.start()
    yield gateway
    gateway.gate.set()
    assert gateway.stop()


def predict_request():
    request = pb.PredictRequest(model_name="driver_score")
    request.columns.add(name="driver_id").values.int64s.values.append(1)
    return request.SerializeToString()


@pytest.mark.alone
def test_a_call_that_is_refused_for_its_deadline_reads_no_feature(slow):
    with grpc.insecure_channel(slow.grpc_address) as channel:
        predict = channel.unary_unary(PREDICT)
        predict(predict_request(), timeout=30)  # what a batch takes is known from now on
        assert len(slow.reads) == 1
        slow.gate.clear()
        slow.busy.clear()
        under_way = predict.future(predict_request(), timeout=60)
        assert slow.busy.wait(30)
        assert len(slow.reads) == 2

        late = [predict.future(predict_request(), timeout=MODEL_S * 0.8) for _ in range(20)]

        ended = {future.code() for future in late}
        assert grpc.StatusCode.RESOURCE_EXHAUSTED in ended
        assert ended <= {grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.DEADLINE_EXCEEDED}
        slow.gate.set()
        under_way.result()
        predict(predict_request(), timeout=30)  # behind all that could have been read for
    assert len(slow.reads) == 3
