"""CUDA under ONNX Runtime: its libraries, whether it can be had, and what to do when it cannot."""

import contextlib
import ctypes
import io
from collections.abc import Callable, Collection, Mapping, Sequence
from importlib.metadata import distributions

import structlog

from headrace.errors import ModelLoadError, StartupError

_LOG = structlog.get_logger(__name__)

PROVIDER = "CUDAExecutionProvider"

MIN_DRIVER = 13_000
"""CUDA 13.0, as the driver numbers it: 1000 * major + 10 * minor."""

_INSTALL = "install headrace[gpu] instead of headrace[cpu]"
_BUILDS = ("onnxruntime", "onnxruntime-gpu")


def refuse_two_builds(installed: Collection[str] | None = None) -> None:
    """
    Refuse an environment with both builds of ONNX Runtime: which one is imported is then chance.

    Args:
        installed: Names of distributions; those of this environment by default.

    Raises:
        StartupError: both are there.
    """
    if installed is None:
        installed = {str(of.metadata["Name"]).lower().replace("_", "-") for of in distributions()}
    if set(_BUILDS) <= set(installed):
        raise StartupError(
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other; "
            "pip uninstall both, then install headrace[cpu] or headrace[gpu]"
        )


def preload(preload_dlls: Callable[[], None]) -> None:
    """
    Load the CUDA libraries of NVIDIA's wheels, once, before the first session.

    Args:
        preload_dlls: ONNX Runtime's; what it prints goes to the log, for stdout is not its own.
    """
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            preload_dlls()
    except Exception as error:  # noqa: BLE001 `check_session` says what is missing
        _LOG.warning("cuda_preload_failed", error=str(error))
    if printed.getvalue():
        _LOG.warning("cuda_preload", printed=printed.getvalue()[:2_000])


def providers(
    device: int, options: Mapping[str, str], available: Collection[str]
) -> list[str | tuple[str, dict[str, str]]]:
    """
    Return the providers of a session on a GPU, in order; what CUDA lacks runs on the CPU.

    Args:
        device: Which GPU.
        options: What the model sets, in ONNX Runtime's names.
        available: What this build of ONNX Runtime has.

    Raises:
        ModelLoadError: it has no CUDA.
    """
    if PROVIDER not in available:
        raise ModelLoadError(
            f"instance_group asks for a GPU, and this ONNX Runtime has no CUDA: {_INSTALL}"
        )
    defaults = {
        # ONNX Runtime's own tries every algorithm on the first run of each shape, for seconds.
        "cudnn_conv_algo_search": "HEURISTIC",
        # Its own keeps three digits of FP32: answers would differ from the CPU's, and from golden.
        "use_tf32": "0",
    }
    return [(PROVIDER, {**defaults, **options, "device_id": str(device)}), "CPUExecutionProvider"]


def check_device(device: int, driver_library: str = "libcuda.so.1") -> None:
    """
    Make sure that this machine has a GPU: ONNX Runtime takes the CPU, or blames the model.

    Source: CUDA Driver API, "Initialization", "Version Management" and "Device Management".

    Args:
        device: Which GPU, as CUDA_VISIBLE_DEVICES numbers them.
        driver_library: The NVIDIA driver's.

    Raises:
        ModelLoadError: there is no driver, it is too old, or it has no such GPU.
    """
    try:
        driver = ctypes.CDLL(driver_library)
    except OSError:
        raise ModelLoadError(
            "instance_group asks for a GPU, and there is no NVIDIA driver here; check nvidia-smi"
        ) from None
    version, count = ctypes.c_int(), ctypes.c_int()
    driver.cuDriverGetVersion(ctypes.byref(version))
    if version.value < MIN_DRIVER:
        raise ModelLoadError(
            "instance_group asks for a GPU, and the NVIDIA driver is for CUDA "
            f"{version.value // 1000}.{version.value % 1000 // 10}; expected 13.0 or newer"
        )
    if status := driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        _LOG.warning("cuda_driver_failed", status=status)
        count.value = 0
    if device >= count.value:
        raise ModelLoadError(
            f"instance_group asks for GPU {device}, and this machine shows {count.value}; check "
            "nvidia-smi and CUDA_VISIBLE_DEVICES"
        )


def check_session(active: Sequence[str]) -> None:
    """
    Make sure that a session is on the GPU: ONNX Runtime takes the CPU without a word.

    Args:
        active: The session's providers.

    Raises:
        ModelLoadError: it is not.
    """
    if not active or active[0] != PROVIDER:
        raise ModelLoadError(
            "instance_group asks for a GPU, and CUDA did not start: CUDA 13 or cuDNN 9 is missing; "
            f"{_INSTALL}"
        )
