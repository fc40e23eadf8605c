"""What small requests have of large ones in the queue of the same model."""

import threading
import time
from concurrent import futures
from contextlib import contextmanager

import grpc
import numpy as np
import pytest
from tritonclient.grpc import service_pb2, service_pb2_grpc

from headrace.app import Gateway
from headrace.settings import load_settings

BATCH, WIDTH = 64, 1 << 10
LARGE = {"rows of their own length": ((1, 1 << 20), 3), "16 parts": ((16 * BATCH, WIDTH), 1)}
"""
Shapes of 4 MiB, and how many are always under way: of those that share no batch with small ones so
many that one always waits, of those with more rows than a batch has one after the other.
"""

MODEL_S = 0.03
"""What the model takes for a batch, whatever is in it: all the parts take half a second."""

CALLS, EVERY_S = 20, 0.1

TIMES_AS_LONG = 6
"""
What small requests wait at the most, of what they wait without large ones. The issue says half as
long again; here a batch of the large ones is always under way when a small one comes, so that two
or three times as long is usual, and the rest is for a machine whose cores are shared. In line
behind all the parts it is thirteen times, and without an end where the large ones go first.
"""


@pytest.fixture(scope="module")
def gateway(tmp_path_factory, model_files):
    """A gateway whose model returns the largest number of each row, after `MODEL_S`."""
    root = tmp_path_factory.mktemp("models")
    model_files.write_model(
        root,
        "largest",
        [model_files.helper.make_node("ReduceMax", ["x"], ["y"], axes=[1], keepdims=1)],
        [("x", "FP32", ["n", "m"])],
        [("y", "FP32", ["n", 1])],
        config=f"max_batch_size: {BATCH}\n"
        'parameters { key: "max_request_rows" value { string_value: "4096" } }',
    )
    addresses = {"grpc_address": "127.0.0.1:0", "http_address": "127.0.0.1:0"}
    gateway = Gateway(load_settings({"model_repository": root, **addresses}))
    for served in gateway.catalog.served():
        _slow_down(served._backend)
    gateway.start()
    yield gateway
    assert gateway.stop()


def _slow_down(backend):
    real = backend.infer

    def infer(inputs):
        time.sleep(MODEL_S)
        return real(inputs)

    backend.infer = infer


@pytest.fixture
def ask(gateway):
    """Ask with rows of such a shape; the answer must be their own, and how long it took is told."""
    with grpc.insecure_channel(gateway.grpc_address) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)

        def call(shape, number):
            rows = np.zeros(shape, np.float32)
            rows[:, -1] = number + np.arange(shape[0])
            message = service_pb2.ModelInferRequest(model_name="largest")
            message.inputs.add(name="x", datatype="FP32", shape=shape)
            message.raw_input_contents.append(rows.tobytes())
            start_s = time.perf_counter()
            reply = stub.ModelInfer(message, timeout=60)
            took_s = time.perf_counter() - start_s
            found = np.frombuffer(reply.raw_output_contents[0], np.float32)
            assert found.tolist() == rows[:, -1].tolist()
            return took_s

        yield call


@contextmanager
def always_under_way(ask, shape, count):
    """Meanwhile so many send large requests, one after the other; how long each took is told."""
    ends, took_s = threading.Event(), []

    def send():
        while not ends.is_set():
            took_s.append(ask(shape, len(took_s)))

    with futures.ThreadPoolExecutor(count) as senders:
        sent = [senders.submit(send) for _ in range(count)]
        try:
            yield took_s
        finally:
            ends.set()
        for each in sent:
            each.result()


def small_ones(ask):
    """Send one-row requests; return how long they took."""
    took_s = []
    for number in range(CALLS):
        took_s.append(ask((1, WIDTH), number))
        time.sleep(EVERY_S)
    return took_s


@pytest.mark.alone
@pytest.mark.parametrize(("shape", "count"), LARGE.values(), ids=LARGE.keys())
def test_large_requests_do_not_hold_up_the_small_ones_of_their_own_model(ask, shape, count):
    ask(shape, 0)  # what a batch takes is known
    alone_s = small_ones(ask)
    with always_under_way(ask, shape, count) as large_s:
        beside_s = small_ones(ask)

    assert len(large_s) > count
    assert np.median(beside_s) <= TIMES_AS_LONG * np.median(alone_s)
