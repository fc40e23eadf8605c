"""More calls at once than anybody could answer: it is this server that says so, and to each."""

import time
from collections import Counter

import grpc
import numpy as np
import pytest
from tritonclient.grpc import service_pb2

from headrace.app import Gateway
from headrace.settings import load_settings

CONNECTIONS, CALLS = 5, 500
INFER = "/inference.GRPCInferenceService/ModelInfer"

pytestmark = pytest.mark.alone


@pytest.fixture(params=["completion-queue", "threads"])
def slow(request, tmp_path, model_files):
    """A gateway with one model of 20 ms a request, and room for a hundred of them."""
    model_files.write_model(
        tmp_path,
        "slow",
        [model_files.helper.make_node("Identity", ["x"], ["y"])],
        [("x", "FP32", ["n", 1])],
        [("y", "FP32", ["n", 1])],
        config="max_batch_size: 1",
    )
    gateway = Gateway(
        load_settings(
            {
                "model_repository": tmp_path,
                "grpc_address": "127.0.0.1:0",
                "http_address": "127.0.0.1:0",
                "ingress": request.param,
                "max_queue_size": 100,
            }
        )
    )
    backend = gateway.catalog.find("slow", "")._backend
    real = backend.infer

    def infer(inputs):
        time.sleep(0.02)
        return real(inputs)

    backend.infer = infer
    gateway.start()
    yield gateway
    assert gateway.stop()


def request():
    message = service_pb2.ModelInferRequest(model_name="slow")
    message.inputs.add(name="x", datatype="FP32", shape=[1, 1])
    message.raw_input_contents.append(np.zeros((1, 1), np.float32).tobytes())
    return message.SerializeToString()


def test_a_flood_is_answered_refused_or_out_of_time_and_never_cut_off(slow):
    body = request()
    # Each its own connection, or they would share one and its limit of streams.
    channels = [
        grpc.insecure_channel(slow.grpc_address, [("grpc.use_local_subchannel_pool", 1)])
        for _ in range(CONNECTIONS)
    ]
    calls = [channel.unary_unary(INFER) for channel in channels]
    for call in calls:
        call(body, timeout=20)

    futures = [call.future(body, timeout=30) for _ in range(CALLS) for call in calls]
    codes = Counter(future.code() for future in futures)  # waits for it
    for channel in channels:
        channel.close()

    assert set(codes) <= {
        grpc.StatusCode.OK,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.DEADLINE_EXCEEDED,
    }
    assert codes[grpc.StatusCode.OK] >= 10
    assert codes[grpc.StatusCode.RESOURCE_EXHAUSTED] > 1_000
