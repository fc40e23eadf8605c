"""A model on a real GPU: it is there, answers as on the CPU, and gives its memory back."""

import ctypes
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from tritonclient.grpc import service_pb2, service_pb2_grpc

from headrace.app import Gateway
from headrace.backends.onnx_runtime import load_onnx
from headrace.errors import ModelLoadError
from headrace.repository.config import ModelConfig
from headrace.settings import load_settings

pytestmark = pytest.mark.gpu

WIDTH, LAYERS, BATCH = 1_024, 8, 256


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    """A stack of matrix products: enough for a GPU to be worth it."""
    rng = np.random.default_rng(0)
    nodes, weights, source = [], [], "x"
    for layer in range(LAYERS):
        matrix = (rng.standard_normal((WIDTH, WIDTH)) / 32).astype(np.float32)
        weights.append(numpy_helper.from_array(matrix, f"w{layer}"))
        nodes.append(helper.make_node("MatMul", [source, f"w{layer}"], [f"m{layer}"]))
        source = f"r{layer}" if layer < LAYERS - 1 else "y"
        nodes.append(helper.make_node("Tanh", [f"m{layer}"], [source]))
    graph = helper.make_graph(
        nodes,
        "stack",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", WIDTH])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", WIDTH])],
        weights,
    )
    path = tmp_path_factory.mktemp("gpu") / "stack" / "1" / "model.onnx"
    path.parent.mkdir(parents=True)
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path
    )
    (path.parents[1] / "config.pbtxt").write_text(
        f"max_batch_size: {BATCH} instance_group [ {{ kind: KIND_GPU count: 1 gpus: [ 0 ] }} ]"
    )
    return path


def rows(count, seed=0):
    return np.random.default_rng(seed).standard_normal((count, WIDTH)).astype(np.float32)


def free_bytes():
    """Ask the runtime that ONNX Runtime itself uses how much device memory is free."""
    runtime = ctypes.CDLL("libcudart.so.13")
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    assert runtime.cudaMemGetInfo(ctypes.byref(free), ctypes.byref(total)) == 0
    return free.value


def test_the_session_is_on_the_gpu(model_path, gpu_device):
    backend = load_onnx(model_path, ModelConfig("stack", gpu_device=gpu_device))
    assert backend._session.get_providers()[0] == "CUDAExecutionProvider"
    backend.close()


def test_a_gpu_that_does_not_exist_is_refused(model_path, gpu_device):
    with pytest.raises(ModelLoadError, match="asks for GPU 99, and this machine shows "):
        load_onnx(model_path, ModelConfig("stack", gpu_device=99))


def test_answers_are_those_of_the_cpu(model_path, gpu_device):
    x = rows(64)
    on_gpu = load_onnx(model_path, ModelConfig("stack", gpu_device=gpu_device))
    on_cpu = load_onnx(model_path, ModelConfig("stack"))
    # Sums in another order differ by 1e-6 here; with TF32's ten bits it would be 1e-3.
    np.testing.assert_allclose(
        on_gpu.infer({"x": x})[0], on_cpu.infer({"x": x})[0], rtol=0, atol=1e-4
    )


def test_two_batches_are_in_flight_and_keep_their_answers(model_path, gpu_device):
    backend = load_onnx(model_path, ModelConfig("stack", gpu_device=gpu_device))
    expected = [backend.infer({"x": rows(BATCH, seed)})[0] for seed in range(2)]
    both = threading.Barrier(2)

    def run(seed):
        both.wait(10)
        for _ in range(50):
            found = backend.infer({"x": rows(BATCH, seed)})[0]
            np.testing.assert_allclose(found, expected[seed], rtol=1e-3, atol=1e-3)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(run, range(2)))


def test_reloads_give_the_device_memory_back(model_path, gpu_device):
    config = ModelConfig("stack", gpu_device=gpu_device)
    free = []
    for _ in range(12):
        backend = load_onnx(model_path, config)
        backend.infer({"x": rows(BATCH)})
        backend.close()
        free.append(free_bytes())
    assert max(free[2:]) - min(free[2:]) < 64 * 2**20


def test_the_gateway_keeps_most_of_what_the_gpu_can_do(model_path, gpu_device, record_property):
    raw = load_onnx(model_path, ModelConfig("stack", gpu_device=gpu_device))
    x = rows(BATCH)
    runs = 200
    for _ in range(20):
        raw.infer({"x": x})
    started_s = time.perf_counter()
    for _ in range(runs):
        raw.infer({"x": x})
    raw_rows_per_s = runs * BATCH / (time.perf_counter() - started_s)
    raw.close()

    gateway = Gateway(
        load_settings(
            {
                "model_repository": model_path.parents[2],
                "grpc_address": "127.0.0.1:0",
                "http_address": "127.0.0.1:0",
            }
        )
    )
    gateway.start()
    message = service_pb2.ModelInferRequest(model_name="stack")
    message.inputs.add(name="x", datatype="FP32", shape=x.shape)
    message.raw_input_contents.append(x.tobytes())
    places = threading.Semaphore(8)
    with grpc.insecure_channel(
        gateway.grpc_address, options=[("grpc.enable_http_proxy", 0)]
    ) as channel:
        infer = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer
        for _ in range(20):
            infer(message, timeout=30)
        started_s = time.perf_counter()
        for _ in range(runs):
            places.acquire()
            infer.future(message, timeout=30).add_done_callback(lambda _: places.release())
        for _ in range(8):
            places.acquire()
        through_rows_per_s = runs * BATCH / (time.perf_counter() - started_s)
    assert gateway.stop()
    record_property("rows_per_s", f"raw {raw_rows_per_s:.0f}, gateway {through_rows_per_s:.0f}")
    # Over loopback gRPC, 1 MiB in and 1 MiB out a batch: the copies, not the GPU, are the limit.
    assert through_rows_per_s > 0.05 * raw_rows_per_s
    assert onnxruntime.get_device().startswith("GPU")
