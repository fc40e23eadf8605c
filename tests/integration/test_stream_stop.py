"""A server with open streams stops: promptly, and with every message that it took answered."""

import json
import queue
import signal
import subprocess
import sys
import threading
import time

import grpc
import numpy as np
import pytest
from tritonclient.grpc import service_pb2, service_pb2_grpc

from headrace.app import Gateway
from headrace.settings import load_settings

IN_FLIGHT = 16
INGRESSES = ["completion-queue", "threads"]


def row(name="scores"):
    message = service_pb2.ModelInferRequest(model_name=name, id="x")
    message.inputs.add(name="x", datatype="FP32", shape=[1, 4])
    message.raw_input_contents.append(np.ones(4, np.float32).tobytes())
    return message


def until(condition, timeout_s=10.0):
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "it did not happen"
        time.sleep(0.002)


class Talker:
    """A client that keeps some messages in flight on one stream until it ends."""

    def __init__(self, channel):
        self.answers = self.errors = 0
        self._more = queue.SimpleQueue()
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        self.call = stub.ModelStreamInfer(iter(self._more.get, None), timeout=30)
        self._thread = threading.Thread(target=self._talk)
        self._thread.start()

    def join(self):
        self._thread.join(20)
        assert not self._thread.is_alive()
        return self.call.code()

    def _talk(self):
        for _ in range(IN_FLIGHT):
            self._more.put(row())
        try:
            for answer in self.call:
                if answer.error_message:
                    self.errors += 1
                else:
                    self.answers += 1
                self._more.put(row())
        except grpc.RpcError:
            pass
        self._more.put(None)


class Idler:
    """A client with an open stream and nothing to say."""

    def __init__(self, channel):
        self._more = queue.SimpleQueue()
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        self.call = stub.ModelStreamInfer(iter(self._more.get, None), timeout=30)
        self._more.put(row())
        assert not next(self.call).error_message

    def code(self):
        with pytest.raises(grpc.RpcError) as ended:
            next(self.call)
        self._more.put(None)
        return ended.value.code()


class Stalled:
    """A client that asks without end and reads nothing, until it is held back."""

    MESSAGES = 10_000

    def __init__(self, channel):
        self._sent = 0
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        self.call = stub.ModelStreamInfer(self._ask(), timeout=60)
        seen, since_s = 0, time.monotonic()
        while time.monotonic() - since_s < 0.5:
            if self._sent != seen:
                seen, since_s = self._sent, time.monotonic()
            time.sleep(0.01)
        assert 0 < seen < self.MESSAGES

    def _ask(self):
        message = row()
        message.id = "x" * 30_000  # comes back with each answer
        while self._sent < self.MESSAGES:
            self._sent += 1
            yield message


@pytest.mark.alone
@pytest.mark.parametrize("ingress", INGRESSES)
def test_a_stop_is_prompt_and_answers_every_message_that_was_taken(model_repository, ingress):
    gateway = Gateway(
        load_settings(
            {
                "model_repository": model_repository,
                "grpc_address": "127.0.0.1:0",
                "http_address": "127.0.0.1:0",
                "ingress": ingress,
            }
        )
    )
    gateway.start()
    with grpc.insecure_channel(gateway.grpc_address) as channel:
        idlers = [Idler(channel) for _ in range(5)]
        talkers = [Talker(channel) for _ in range(8)]
        until(lambda: all(talker.answers > 20 for talker in talkers))
        start_s = time.monotonic()
        assert gateway.stop(), "requests were cut off"
        took_s = time.monotonic() - start_s
        codes = [idler.code() for idler in idlers] + [talker.join() for talker in talkers]

    numbers = gateway.metrics.model("scores", "1")
    assert took_s < 5
    assert set(codes) == {grpc.StatusCode.UNAVAILABLE}
    assert sum(talker.answers for talker in talkers) + len(idlers) == numbers.requests
    assert numbers.requests_failed == 0


@pytest.fixture(params=INGRESSES)
def server(request, model_repository):
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "headrace", "serve", "--model-repository", model_repository),
            *("--grpc-address", "127.0.0.1:0", "--http-address", "127.0.0.1:0"),
            *("--ingress", request.param, "--drain-delay-s", "0", "--drain-timeout-s", "20"),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    yield process
    if process.poll() is None:
        process.kill()
    process.communicate(timeout=20)


@pytest.mark.alone
def test_sigterm_with_idle_busy_and_stalled_streams_ends_the_process_with_0(server):
    address = json.loads(server.stdout.readline())["grpc_address"]
    with grpc.insecure_channel(address) as channel, grpc.insecure_channel(address) as other:
        idler, talker = Idler(channel), Talker(channel)
        stalled = Stalled(other)
        until(lambda: talker.answers > 20)

        start_s = time.monotonic()
        server.send_signal(signal.SIGTERM)
        codes = {idler.code(), talker.join()}

        assert server.wait(25) == 0
        assert time.monotonic() - start_s < 8  # two of them for the stalled one
        stalled.call.cancel()
    assert codes == {grpc.StatusCode.UNAVAILABLE}
