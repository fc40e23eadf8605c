"""Where a model runs and how often: `instance_group`, and the parameters of a model on a GPU.

Source: Triton, "Instance Groups"; its ONNX Runtime backend's README, "Deprecated Parameters" (the
other way to set them, `execution_accelerators`, is refused). `use_tf32` is ONNX Runtime's own name.
"""

from collections.abc import Sequence
from typing import Any

from tritonclient.grpc import model_config_pb2

from headrace.repository.parameters import Parameters, wrong

MAX_INSTANCES = 256

_MAX_SIZE = 2**64 - 1
_ARENA_EXTENSIONS = {"0": "kNextPowerOfTwo", "1": "kSameAsRequested"}
_CONV_SEARCHES = {"0": "EXHAUSTIVE", "1": "HEURISTIC", "2": "DEFAULT"}
_SWITCHES = {"0": "0", "1": "1", "false": "0", "true": "1"}


def instance_count(groups: Sequence[Any]) -> int:
    """
    Return how many executors run the model side by side, at least 1.

    Raises:
        ModelLoadError: a group is not supported, or there are too many instances.
    """
    count = 0
    for group in groups:
        if group.passive:
            raise wrong("instance_group.passive is not supported by this server")
        if group.count < 0:
            raise wrong(f"instance_group count is {group.count}; expected 1 or more")
        count += group.count or 1
    if count > MAX_INSTANCES:
        raise wrong(f"instance_group asks for {count} instances; at most {MAX_INSTANCES}")
    return count or 1


def gpu_device(groups: Sequence[Any]) -> int | None:
    """
    Return the GPU that the groups ask for; None for the CPU, which KIND_AUTO means too.

    Raises:
        ModelLoadError: they ask for several places.
    """
    kinds, devices = set(), set()
    for group in groups:
        kind = model_config_pb2.ModelInstanceGroup.Kind.Name(group.kind)
        kinds.add("GPU" if kind == "KIND_GPU" else "CPU")
        devices.update(group.gpus)
        if group.gpus and kind != "KIND_GPU":
            raise wrong(f"instance_group has gpus and {kind}; expected KIND_GPU")
    if "GPU" not in kinds:
        return None
    if len(kinds) > 1:
        raise wrong("instance_group asks for CPU and GPU; expected one of them")
    if len(devices) > 1:
        raise wrong(f"instance_group asks for GPUs {sorted(devices)}; expected one")
    (device,) = devices or {0}
    if device < 0:
        raise wrong(f"instance_group asks for GPU {device}; expected 0 or more")
    return int(device)


def gpu_options(parameters: Parameters) -> tuple[tuple[str, str], ...]:
    """
    Return what the parameters set, in the names and values of ONNX Runtime's CUDA provider.

    Raises:
        ModelLoadError: a value is not one of them.
    """
    options = {
        "arena_extend_strategy": parameters.choice(
            "arena_extend_strategy", _ARENA_EXTENSIONS, default=""
        ),
        "cudnn_conv_algo_search": parameters.choice(
            "cudnn_conv_algo_search", _CONV_SEARCHES, default=""
        ),
        "gpu_mem_limit": str(parameters.count("gpu_mem_limit", 0, _MAX_SIZE) or ""),
        "use_tf32": parameters.choice("use_tf32", _SWITCHES, default=""),
    }
    return tuple((name, value) for name, value in options.items() if value)
