"""A server that is full refuses calls without reading them, and nobody whom it could serve."""

import threading
import time

import grpc
import numpy as np
import pytest
from tritonclient.grpc import service_pb2

from headrace.app import Gateway
from headrace.settings import load_settings

INFER = "/inference.GRPCInferenceService/ModelInfer"
PREDICT = "/headrace.v1.PredictionService/Predict"
GARBAGE = b"\xff\xff\xff no message of anything"
EXHAUSTED = grpc.StatusCode.RESOURCE_EXHAUSTED
INVALID = grpc.StatusCode.INVALID_ARGUMENT
ROOM = 200


@pytest.fixture(params=["completion-queue", "threads"])
def serve(request, tmp_path, model_files):
    """Start a gateway of so many models, the first of which is busy, with its queue full."""
    gateways, gate, busy = [], threading.Event(), threading.Event()

    def start(models):
        for name in models:
            model_files.write_model(
                tmp_path,
                name,
                [model_files.helper.make_node("Identity", ["x"], ["y"])],
                [("x", "FP32", ["n", 1])],
                [("y", "FP32", ["n", 1])],
                config="max_batch_size: 1",
            )
        settings = {
            "model_repository": tmp_path,
            "grpc_address": "127.0.0.1:0",
            "http_address": "127.0.0.1:0",
            "ingress": request.param,
            "max_queue_size": ROOM,
        }
        gateway = Gateway(load_settings(settings))
        gateways.append(gateway)
        backend = gateway.catalog.find(models[0], "")._backend
        real = backend.infer

        def infer(inputs):
            busy.set()
            assert gate.wait(60)
            return real(inputs)

        backend.infer = infer
        gateway.busy = busy
        gateway.start()
        return gateway

    start.gate = gate
    yield start
    gate.set()
    for gateway in gateways:
        assert gateway.stop()


def message(model, rows=1):
    asked = service_pb2.ModelInferRequest(model_name=model)
    asked.inputs.add(name="x", datatype="FP32", shape=[rows, 1])
    asked.raw_input_contents.append(np.zeros((rows, 1), np.float32).tobytes())
    return asked.SerializeToString()


def until(condition, timeout_s=20.0):
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "it did not happen"
        time.sleep(0.002)


def fill(gateway, ask, model):
    """Begin as many calls as there is room for, and one more, which is refused."""
    served = gateway.catalog.find(model, "")
    first = ask.future(message(model), timeout=60)
    assert gateway.busy.wait(20)  # the executor has it: none of those to come goes with it
    futures = [first, *[ask.future(message(model), timeout=60) for _ in range(ROOM)]]
    until(lambda: served.waiting == ROOM)
    assert code(ask, message(model)) is EXHAUSTED
    # Its caller hears of it before it is counted.
    until(lambda: gateway.metrics._rpc_errors.get(("ModelInfer", "RESOURCE_EXHAUSTED")) == 1)
    return served, futures


def code(ask, body, timeout_s=20):
    return ask.future(body, timeout=timeout_s).code()


@pytest.mark.parametrize("path", [INFER, PREDICT])
def test_what_cannot_be_served_whatever_it_says_is_refused_with_pushback_and_counted(serve, path):
    gateway = serve(["only"])
    with grpc.insecure_channel(gateway.grpc_address) as channel:
        served, futures = fill(gateway, channel.unary_unary(INFER), "only")
        refused, errors = served._batcher.refused_full, gateway.metrics._rpc_errors.copy()
        ask = channel.unary_unary(path)

        call = ask.future(GARBAGE, timeout=20)

        assert call.code() is EXHAUSTED  # who had read it would say that it is no message
        assert call.details() == "too many requests are already waiting"
        trailing = dict(call.trailing_metadata())
        assert int(trailing["grpc-retry-pushback-ms"]) > 0
        assert b"OVERLOADED" in trailing["grpc-status-details-bin"]
        assert served._batcher.refused_full == refused + 1
        counted = (path.rpartition("/")[2], "RESOURCE_EXHAUSTED")
        until(lambda: gateway.metrics._rpc_errors.get(counted) == errors.get(counted, 0) + 1)

        serve.gate.set()
        assert all(future.code() is grpc.StatusCode.OK for future in futures)
        until(lambda: gateway.grpc.ingress.open_calls == 0)
        assert code(ask, GARBAGE) is INVALID


def test_where_several_models_serve_a_call_is_read_to_know_whose_it_is(serve):
    gateway = serve(["full", "idle"])
    with grpc.insecure_channel(gateway.grpc_address) as channel:
        ask = channel.unary_unary(INFER)
        _kept = fill(gateway, ask, "full")  # a future that nobody keeps is cancelled

        assert code(ask, GARBAGE) is INVALID
        assert code(ask, message("idle")) is grpc.StatusCode.OK
        assert code(ask, message("full")) is EXHAUSTED
        serve.gate.set()


def test_a_large_message_is_refused_before_it_is_parsed(serve):
    gateway = serve(["full", "idle"])
    large = b"\x0a\x04%b" + GARBAGE * 10_000
    with grpc.insecure_channel(gateway.grpc_address) as channel:
        ask = channel.unary_unary(INFER)
        _kept = fill(gateway, ask, "full")  # a future that nobody keeps is cancelled

        assert code(ask, large % b"full") is EXHAUSTED
        assert code(ask, large % b"idle") is INVALID
        serve.gate.set()


def test_a_deadline_that_is_too_close_is_enough_to_know(serve):
    gateway = serve(["only"])
    with grpc.insecure_channel(gateway.grpc_address) as channel:
        ask = channel.unary_unary(INFER)
        batcher = gateway.catalog.find("only", "")._batcher
        for _ in range(20):
            batcher._cost.observe(1, 1.0)  # a second for each
        waiting = [ask.future(message("only"), timeout=None) for _ in range(30)]
        until(lambda: len(batcher) == 29)
        assert code(ask, message("only"), timeout_s=5) is EXHAUSTED

        # One in sixteen is read, and found to be no message.
        codes = [code(ask, GARBAGE, timeout_s=5) for _ in range(32)]

        assert codes.count(EXHAUSTED) == 30
        assert codes.count(INVALID) == 2
        assert code(ask, GARBAGE, timeout_s=1_000) is INVALID
        serve.gate.set()
        assert all(future.code() is grpc.StatusCode.OK for future in waiting)
