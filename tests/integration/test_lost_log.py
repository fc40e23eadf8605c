"""Whoever read the log has gone: requests are answered as before."""

import json
import os
import signal
import subprocess
import sys

import grpc
import numpy as np
import pytest
from tritonclient.grpc import service_pb2, service_pb2_grpc

FAULTY = """
import sys
from headrace.__main__ import main
from headrace.backends.onnx_runtime import OnnxRuntimeBackend

real = OnnxRuntimeBackend.infer
def infer(self, inputs, timeout_s=None):
    if (inputs["x"] == 666).any():
        raise RuntimeError("not among the errors that a backend may raise")
    return real(self, inputs)

OnnxRuntimeBackend.infer = infer
sys.exit(main(sys.argv[1:]))
"""


def request(number):
    message = service_pb2.ModelInferRequest(model_name="scores")
    message.inputs.add(name="x", datatype="FP32", shape=[1, 4])
    message.raw_input_contents.append(np.full(4, number, np.float32).tobytes())
    return message


@pytest.mark.parametrize("ingress", ["completion-queue", "threads"])
def test_a_closed_log_costs_no_answer(model_repository, ingress):
    reading, writing = os.pipe()
    process = subprocess.Popen(
        [
            *(sys.executable, "-c", FAULTY, "serve", "--ingress", ingress),
            *("--model-repository", str(model_repository), "--drain-delay-s", "0"),
            *("--grpc-address", "127.0.0.1:0", "--http-address", "127.0.0.1:0"),
        ],
        stdout=subprocess.PIPE,
        stderr=writing,
        text=True,
    )
    os.close(writing)
    try:
        with os.fdopen(reading) as log:
            while "model_loaded" not in log.readline():
                pass
            address = None
            # Read on until it serves: a full pipe would hold it up.
            while "started" not in log.readline():
                pass
        address = json.loads(process.stdout.readline())["grpc_address"]
        with grpc.insecure_channel(address) as channel:
            stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            for _ in range(3):
                with pytest.raises(grpc.RpcError) as failed:
                    stub.ModelInfer(request(666), timeout=5)
                assert failed.value.code() is grpc.StatusCode.INTERNAL
                assert stub.ModelInfer(request(1), timeout=5).model_name == "scores"
        process.send_signal(signal.SIGTERM)
        assert process.wait(15) == 0
    finally:
        process.kill()
        process.communicate(timeout=10)
