"""A model that asks for a GPU, on a machine that has none."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import tritonclient.grpc as triton
from onnx import helper

from headrace.app import Gateway
from headrace.settings import load_settings

pytestmark = pytest.mark.skipif(
    "CUDAExecutionProvider" in onnxruntime.get_available_providers(),
    reason="this ONNX Runtime has CUDA: `make test-gpu` is for it",
)
REASON = (
    "instance_group asks for a GPU, and this ONNX Runtime has no CUDA: "
    "install headrace[gpu] instead of headrace[cpu]"
)


@pytest.fixture
def root(tmp_path):
    """Two models that echo, one of them on a GPU."""
    path = Path(__file__).with_name("model_files.py")
    spec = importlib.util.spec_from_file_location("model_files", path)
    files = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(files)
    for name, kind in (("accelerated", "KIND_GPU"), ("plain", "KIND_CPU")):
        files.write_model(
            tmp_path,
            name,
            [helper.make_node("Identity", ["x"], ["y"])],
            [("x", "FP32", ["n", 2])],
            [("y", "FP32", ["n", 2])],
            config=f"max_batch_size: 8 instance_group [ {{ kind: {kind} }} ]",
        )
    return tmp_path


@pytest.fixture
def client(root):
    gateway = Gateway(
        load_settings(
            {
                "model_repository": root,
                "grpc_address": "127.0.0.1:0",
                "http_address": "127.0.0.1:0",
                "model_control_mode": "none",
            }
        )
    )
    gateway.start()
    with triton.InferenceServerClient(gateway.grpc_address) as client:
        yield client
    assert gateway.stop()


def ask(client, model):
    rows = triton.InferInput("x", [1, 2], "FP32")
    rows.set_data_from_numpy(np.array([[1, 2]], np.float32))
    return client.infer(model, [rows], client_timeout=10).as_numpy("y").tolist()


def test_it_does_not_serve_from_the_cpu_instead(client):
    assert not client.is_model_ready("accelerated")
    with pytest.raises(triton.InferenceServerException) as refused:
        ask(client, "accelerated")
    assert refused.value.status() == "StatusCode.UNAVAILABLE"


def test_the_index_says_what_to_install(client):
    index = {model.name: model for model in client.get_model_repository_index().models}
    assert (index["accelerated"].state, index["accelerated"].reason) == ("UNAVAILABLE", REASON)


def test_the_other_models_serve(client):
    assert client.is_server_ready()
    assert ask(client, "plain") == [[1, 2]]


def test_verify_says_the_same_and_fails(root):
    command = [sys.executable, "-m", "headrace", "models", "verify", str(root), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1, done.stderr
    states = {
        state["model"]: (state["state"], state["reason"]) for state in json.loads(done.stdout)
    }
    assert states == {"accelerated": ("UNAVAILABLE", REASON), "plain": ("READY", "")}
