"""What this process may use: cores, and GPUs where the ONNX Runtime for them is installed."""

import contextlib
import os
import re
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from headrace.workers.policy import quota_cores, visible_devices


def core_count(cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """
    Return how many cores this process may use: its affinity, or its container's share of time.

    Source: Linux, "Control Group v2", `cpu.max`; "CFS Bandwidth Control" for version 1.
    """
    cores = len(os.sched_getaffinity(0))
    with contextlib.suppress(OSError):
        return quota_cores((cgroups / "cpu.max").read_text(), cores)
    with contextlib.suppress(OSError):
        quota, period = (
            (cgroups / "cpu" / f"cpu.cfs_{name}_us").read_text().strip()
            for name in ("quota", "period")
        )
        return quota_cores(f"{quota} {period}", cores)
    return cores


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
