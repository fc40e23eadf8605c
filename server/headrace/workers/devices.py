"""What this process may use: cores, and GPUs where the ONNX Runtime for them is installed."""

import os
import re
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from headrace.workers.policy import visible_devices


def core_count() -> int:
    """Return how many cores this process may run on."""
    return len(os.sched_getaffinity(0))


def gpu_devices(
    environment: Mapping[str, str] = os.environ,
    device_folder: Path = Path("/dev"),
    build: str = "onnxruntime-gpu",
) -> list[str]:
    """
    Return the NVIDIA GPUs that models could run on here, as CUDA_VISIBLE_DEVICES names them.

    None without ONNX Runtime's CUDA build. Nothing of CUDA is loaded: that takes seconds and memory
    on every GPU.

    Source: NVIDIA driver README, "NVIDIA device files": `/dev/nvidia0` and so on, one a GPU.
    """
    try:
        distribution(build)
    except PackageNotFoundError:
        return []
    try:
        names = [file.name for file in device_folder.iterdir()]
    except OSError:
        return []
    present = sum(re.fullmatch(r"nvidia\d+", name) is not None for name in names)
    return visible_devices(environment.get("CUDA_VISIBLE_DEVICES"), present)
