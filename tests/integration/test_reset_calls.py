"""Calls that are begun and reset at once, over and over: what they leave behind is bounded."""

import socket
import time

import bench_modules
import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from live_objects import live, nothing_collected
from tritonclient.grpc import service_pb2, service_pb2_grpc

from headrace.app import Gateway
from headrace.rpc import server, threads
from headrace.rpc.completion_queue import ingress as completion_queue
from headrace.settings import load_settings

CHECK = "/grpc.health.v1.Health/Check"
INFER = "/inference.GRPCInferenceService/ModelInfer"
AT_ONCE, CALLS, LIMIT = 50, 1_000, 100
TIMEOUT_S = 30

bench = bench_modules.load("frames", "header_blocks")
frames = bench.frames


@pytest.fixture(params=["completion-queue", "threads"])
def gateway(request, model_repository, monkeypatch):
    monkeypatch.setattr(server, "CALLS_ON_THREADS_MAX", LIMIT)
    gateway = Gateway(
        load_settings(
            {
                "model_repository": model_repository,
                "grpc_address": "127.0.0.1:0",
                "http_address": "127.0.0.1:0",
                "ingress": request.param,
            }
        )
    )
    gateway.start()
    yield gateway
    assert gateway.stop()


class Caller:
    """A connection on which calls of one method are begun, and sent no message."""

    def __init__(self, address, path):
        host, _, port = address.rpartition(":")
        self._socket = socket.create_connection((host, int(port)), TIMEOUT_S)
        self._received = self._socket.makefile("rb")
        self._blocks = bench.header_blocks.header_blocks(path)
        self._stream = -1
        self._socket.sendall(frames.PREFACE + frames.frame(frames.SETTINGS, 0, 0))
        self._read_until(lambda kind, flags, _: kind == frames.SETTINGS and flags & frames.ACK)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._received.close()
        self._socket.close()

    def begin(self, count=1, *, says_nothing=False):
        """Begin calls; return their streams once the server has read of them."""
        streams = []
        for _ in range(count):
            block = self._blocks.first if self._stream < 0 else self._blocks.next
            self._stream += 2
            streams.append(self._stream)
            flags = frames.END_HEADERS | (frames.END_STREAM if says_nothing else 0)
            self._socket.sendall(frames.frame(frames.HEADERS, flags, self._stream, block))
        if not says_nothing:
            # What a server is known to answer in its turn; it would not have so many PINGs.
            self._socket.sendall(frames.frame(frames.SETTINGS, 0, 0))
            self._read_until(lambda kind, flags, _: kind == frames.SETTINGS and flags & frames.ACK)
        return streams

    def reset(self, streams):
        cancel = (8).to_bytes(4, "big")
        for stream in streams:
            self._socket.sendall(frames.frame(frames.RST_STREAM, 0, stream, cancel))

    def wait_for_answer(self, stream):
        self._read_until(lambda kind, _, own: kind == frames.HEADERS and own == stream)

    def _read_until(self, is_it):
        while True:
            head = self._received.read(frames.HEAD_BYTES)
            assert len(head) == frames.HEAD_BYTES, "the server has closed the connection"
            kind, flags, stream = head[3], head[4], int.from_bytes(head[5:], "big")
            self._received.read(int.from_bytes(head[:3], "big"))
            if kind == frames.SETTINGS and not flags & frames.ACK:
                self._socket.sendall(frames.frame(frames.SETTINGS, frames.ACK, 0))
            if is_it(kind, flags, stream):
                return


def assert_served(gateway):
    message = service_pb2.ModelInferRequest(model_name="lines")
    message.inputs.add(name="x", datatype="FP32", shape=[1, 4])
    message.raw_input_contents.append(np.ones((1, 4), np.float32).tobytes())
    with grpc.insecure_channel(gateway.grpc_address) as channel:
        reply = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer(
            message, timeout=TIMEOUT_S
        )
    assert reply.model_name == "lines"


def until(condition):
    deadline_s = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline_s, "it did not happen"
        time.sleep(0.01)


def test_health_checks_that_are_reset_are_not_kept_while_the_threads_are_taken(gateway):
    known = gateway.grpc._server._state.rpc_states
    with (
        Caller(gateway.grpc_address, CHECK) as holder,
        Caller(gateway.grpc_address, CHECK) as caller,
    ):
        holder.begin(server.CONTROL_THREADS)  # each keeps a thread, waiting for its message
        until(lambda: len(known) == server.CONTROL_THREADS)
        for _ in range(CALLS // AT_ONCE):
            caller.reset(caller.begin(AT_ONCE))
        (last,) = caller.begin(says_nothing=True)
        caller.wait_for_answer(last)  # that it is one too many: all before it have been looked at

        until(lambda: len(known) <= LIMIT)
        if gateway.grpc.ingress.name == "completion-queue":  # else it is one too many as well
            assert_served(gateway)

    until(lambda: not known)
    assert_served(gateway)
    with grpc.insecure_channel(gateway.grpc_address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        assert stub.Check(health_pb2.HealthCheckRequest(), timeout=TIMEOUT_S).status


def test_predictions_that_are_reset_leave_nothing(gateway):
    known = gateway.grpc._server._state.rpc_states
    kinds = completion_queue._Call, threads._Call
    assert_served(gateway)
    with Caller(gateway.grpc_address, INFER) as caller, nothing_collected():
        until(lambda: not known)
        before = live(*kinds)
        for _ in range(CALLS // AT_ONCE):
            caller.reset(caller.begin(AT_ONCE))
        assert_served(gateway)

        until(lambda: not known and live(*kinds) <= before)
