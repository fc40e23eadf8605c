"""A thread that requests depend on dies: the process says so and ends, and can be restarted."""

import json
import subprocess
import sys

import grpc
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from tritonclient.grpc import service_pb2

SERVE_WITH_A_FAULT = """
import sys
from headrace.__main__ import main
from headrace.batching.batcher import Batcher
from headrace.rpc.completion_queue import ingress, self_check

def fail(*_):
    raise RuntimeError("the fault")

self_check.unusable_because = lambda: None  # it would notice
{fault} = fail
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def model_repository(tmp_path):
    (tmp_path / "echo" / "1").mkdir(parents=True)
    sides = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 1]) for name in ("x", "y")
    ]
    graph = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["y"])], "echo", sides[:1], sides[1:]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, tmp_path / "echo" / "1" / "model.onnx")
    return tmp_path


@pytest.mark.parametrize(
    ("fault", "event", "ingress"),
    [
        ("ingress._Call._on_message", "ingress_died", "completion-queue"),
        ("Batcher.take", "executor_died", "completion-queue"),
        ("Batcher.take", "executor_died", "threads"),
    ],
)
def test_a_dead_thread_ends_the_process_with_1(model_repository, fault, event, ingress):
    process = subprocess.Popen(
        [
            *(sys.executable, "-c", SERVE_WITH_A_FAULT.format(fault=fault), "serve"),
            *("--model-repository", str(model_repository)),
            *("--grpc-address", "127.0.0.1:0", "--http-address", "127.0.0.1:0"),
            *("--ingress", ingress),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        address = json.loads(process.stdout.readline())["grpc_address"]
        with grpc.insecure_channel(address) as channel:
            hot = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
            row = service_pb2.ModelInferRequest(model_name="echo")
            row.inputs.add(name="x", datatype="FP32", shape=[1, 1])
            row.raw_input_contents.append(np.ones(1, np.float32).tobytes())
            call = hot.future(row.SerializeToString())  # without a deadline: it would wait for ever

            assert process.wait(15) == 1
            assert call.code() is not grpc.StatusCode.OK
        assert event in process.stderr.read()
    finally:
        process.kill()
        process.communicate(timeout=10)
