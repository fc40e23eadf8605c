"""CUDA under ONNX Runtime: its libraries, whether it can be had, and what to do when it cannot."""

import contextlib
import io
from collections.abc import Callable, Collection, Sequence
from importlib.metadata import distributions
from typing import Any

import structlog

from headrace.errors import ModelLoadError, StartupError

_LOG = structlog.get_logger(__name__)

PROVIDER = "CUDAExecutionProvider"

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


def providers(device: int, available: Sequence[str]) -> list[Any]:
    """
    Return the providers of a session on a GPU, in order; what CUDA lacks runs on the CPU.

    Args:
        device: Which GPU.
        available: What this build of ONNX Runtime has.

    Raises:
        ModelLoadError: it has no CUDA.
    """
    if PROVIDER not in available:
        raise ModelLoadError(
            f"instance_group asks for a GPU, and this ONNX Runtime has no CUDA: {_INSTALL}"
        )
    options = {
        "device_id": str(device),
        # The default tries every algorithm on the first run of each shape, for seconds.
        "cudnn_conv_algo_search": "HEURISTIC",
    }
    return [(PROVIDER, options), "CPUExecutionProvider"]


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
            "instance_group asks for a GPU, and CUDA did not start: there is no such GPU, no "
            f"NVIDIA driver, or CUDA 13 and cuDNN 9 are missing; check nvidia-smi, and {_INSTALL}"
        )
