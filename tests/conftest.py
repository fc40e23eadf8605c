"""What tests of all kinds share: their pace, one process per server, whether there is a GPU."""

import ctypes
import os

import hypothesis
import pytest

# How long an example takes, or takes to be made, says how busy the machine is, and nothing else.
hypothesis.settings.register_profile(
    "unhurried", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("unhurried")

# Servers that tests start are one process unless the test says otherwise, whatever machine it is.
os.environ["HEADRACE_WORKERS"] = "1"


@pytest.fixture(scope="session")
def gpu_device():
    """The GPU to run on; tests that need one are skipped, with the reason, where there is none."""
    import onnxruntime

    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("this ONNX Runtime has no CUDA; `make test-gpu` installs one that has")
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        pytest.skip("no NVIDIA driver here")
    count = ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)) or not count.value:
        pytest.skip("no NVIDIA GPU here")
    return 0
