"""What is decided about CUDA without having it."""

import shutil
import subprocess
import sys

import onnx
import onnxruntime
import pytest
import structlog
from onnx import TensorProto, helper

from headrace.backends import cuda
from headrace.backends.onnx_runtime import load_onnx
from headrace.errors import ModelLoadError, StartupError
from headrace.repository.config import ModelConfig

WITH_CUDA = ["CUDAExecutionProvider", "CPUExecutionProvider"]


def test_a_build_with_cuda_gets_the_device_that_was_asked_for():
    (name, options), fallback = cuda.providers(3, {}, WITH_CUDA)
    assert (name, options["device_id"]) == ("CUDAExecutionProvider", "3")
    assert fallback == "CPUExecutionProvider"


def test_products_keep_every_digit_unless_the_model_says_otherwise():
    (_, usual), _ = cuda.providers(0, {}, WITH_CUDA)
    (_, asked), _ = cuda.providers(0, {"use_tf32": "1"}, WITH_CUDA)
    assert (usual["use_tf32"], asked["use_tf32"]) == ("0", "1")


def test_what_a_model_sets_does_not_move_it_to_another_device():
    (_, options), _ = cuda.providers(1, {"device_id": "0", "gpu_mem_limit": "9"}, WITH_CUDA)
    assert (options["device_id"], options["gpu_mem_limit"]) == ("1", "9")


def test_a_build_without_cuda_says_what_to_install():
    with pytest.raises(ModelLoadError, match=r"has no CUDA: install headrace\[gpu\]"):
        cuda.providers(0, {}, ["CPUExecutionProvider"])


@pytest.fixture
def driver(tmp_path):
    """Makes a driver's library that says what it is told to, as the driver's own would."""
    if shutil.which("cc") is None:
        pytest.skip("no C compiler here")

    def make(version=13_010, status=0, devices=2):
        source, library = tmp_path / "driver.c", tmp_path / f"libcuda-{version}-{status}-{devices}"
        source.write_text(
            f"int cuDriverGetVersion(int *v) {{ *v = {version}; return 0; }}\n"
            f"int cuInit(unsigned flags) {{ return {status}; }}\n"
            f"int cuDeviceGetCount(int *n) {{ *n = {devices}; return {status}; }}\n"
        )
        subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source], check=True)
        return str(library)

    return make


@pytest.mark.parametrize("device", [0, 1])
def test_a_gpu_that_is_there_is_taken(driver, device):
    cuda.check_device(device, driver())


@pytest.mark.parametrize(
    ("says", "reason"),
    [
        (
            {"devices": 2},
            "asks for GPU 2, and this machine shows 2; check nvidia-smi and CUDA_VISIBLE",
        ),
        ({"devices": 0}, "asks for GPU 2, and this machine shows 0"),
        ({"status": 100}, "asks for GPU 2, and this machine shows 0"),  # CUDA_ERROR_NO_DEVICE
        ({"version": 12_040}, "the NVIDIA driver is for CUDA 12.4; expected 13.0 or newer"),
    ],
)
def test_a_gpu_that_cannot_be_used_is_refused_with_what_is_wrong(driver, says, reason):
    with pytest.raises(ModelLoadError) as refused:
        cuda.check_device(2, driver(**says))
    assert reason in str(refused.value)


def test_a_machine_without_a_driver_says_so(tmp_path):
    with pytest.raises(ModelLoadError) as refused:
        cuda.check_device(0, str(tmp_path / "libcuda.so.1"))
    assert str(refused.value) == (
        "instance_group asks for a GPU, and there is no NVIDIA driver here; check nvidia-smi"
    )


@pytest.mark.parametrize("active", [["CPUExecutionProvider"], []])
def test_a_session_that_is_not_on_the_gpu_is_refused(active):
    with pytest.raises(ModelLoadError, match="CUDA did not start"):
        cuda.check_session(active)


def test_a_session_on_the_gpu_is_taken():
    cuda.check_session(WITH_CUDA)


@pytest.mark.parametrize(
    "installed", [{"onnxruntime"}, {"onnxruntime-gpu", "numpy"}, {"onnxruntime-extensions"}, set()]
)
def test_one_build_is_fine(installed):
    cuda.refuse_two_builds(installed)


def test_two_builds_are_refused_with_the_remedy():
    with pytest.raises(StartupError, match="pip uninstall both"):
        cuda.refuse_two_builds({"onnxruntime", "onnxruntime-gpu"})


def test_this_environment_has_one_build():
    cuda.refuse_two_builds()


def test_what_the_preload_prints_does_not_reach_stdout(capsys):
    def prints():
        sys.stdout.write("Failed to load libcudart\n")

    with structlog.testing.capture_logs() as lines:
        cuda.preload(prints)
    assert capsys.readouterr().out == ""
    assert "libcudart" in lines[0]["printed"]


def test_a_preload_that_fails_does_not_end_the_load():
    def fails():
        raise RuntimeError("no such directory")

    with structlog.testing.capture_logs() as lines:
        cuda.preload(fails)
    assert lines[0]["event"] == "cuda_preload_failed"


@pytest.mark.skipif(
    "CUDAExecutionProvider" in onnxruntime.get_available_providers(), reason="there is CUDA here"
)
def test_a_model_for_a_gpu_is_refused_where_there_is_none(tmp_path):
    graph = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n"])],
    )
    path = tmp_path / "model.onnx"
    onnx.save(helper.make_model(graph, ir_version=8), path)
    with pytest.raises(ModelLoadError, match="has no CUDA"):
        load_onnx(path, ModelConfig("m", gpu_device=0))
