"""Who is measured: how each one is started, and why one that is not here is not.

Every gateway has the default settings and all that watches it (metrics, one call in a hundred
traced, every prediction streamed to the monitor) but for what its name says. Each of the others is
in its kindest form: one thread of ONNX Runtime in its own process, and its own batching where it
has any.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import subjects
from names import (
    AIO,
    ALL_TRACED,
    CEILING,
    FLOOR,
    FLOOR_OF_FIELDS,
    GATEWAY,
    GATEWAY_WITH_FEATURES,
    GLUE,
    MLSERVER,
    TRITON,
    TWO_WORKERS,
    WITHOUT_METRICS,
    WITHOUT_STREAM,
    WITHOUT_TRACES,
)
from stage import Stage

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class Launch:
    """
    How a server is started.

    Args:
        command: Its words.
        environment: Added to that of the bench.
        folder: Where it runs; None where the bench does.
        says_serving: Whether it prints a line once it serves; else it is asked for `model`.
        is_program: Whether it is asked by lines on its standard input, and no server.
        is_fragile: Whether it is known to die of a client that leaves; it is started anew then.
    """

    command: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    folder: Path | None = None
    says_serving: bool = True
    is_program: bool = False
    is_fragile: bool = False


@dataclass(frozen=True, slots=True)
class Peer:
    """
    Somebody who can be measured.

    Args:
        launch: Says how to start it on a stage, on a port.
        absence: Says why it cannot be; None where it can.
    """

    launch: Callable[[Stage, int], Launch]
    absence: Callable[[], str | None] = lambda: None


def _gateway(
    stage: Stage,
    port: int,
    *,
    is_streamed: bool = True,
    is_traced: bool = True,
    has_features: bool = False,
    traced_share: float = 0.01,
    with_metrics: bool = True,
    workers: int = 1,
) -> Launch:
    command = subjects.gateway(
        stage.models if has_features else stage.tensors,
        stage.feature_repo if has_features else None,
        port,
        monitor_port=stage.monitor_port if is_streamed else None,
        collector_port=stage.collector_port if is_traced else None,
        traced_share=traced_share,
        with_metrics=with_metrics,
    )
    # Its default is a worker for each core but one, which is one here and another elsewhere.
    return Launch([*command, "--workers", str(workers)])


def _ceiling(stage: Stage, port: int) -> Launch:
    return Launch(subjects.ceiling(stage.model, port))


def _glue(stage: Stage, port: int) -> Launch:
    return Launch(subjects.glue(stage.model, stage.feature_repo, port))


def _floor(stage: Stage, _port: int, *, command: str) -> Launch:
    _ = stage.feature_repo  # the entities are written with it
    program = str(HERE / "ranking_floor.py")
    words = [sys.executable, program, str(stage.model), str(stage.store.port), command]
    return Launch([*words, str(stage.answers("ranking"))], is_program=True)


def _aio(stage: Stage, port: int) -> Launch:
    return Launch([sys.executable, str(HERE / "aio_server.py"), str(stage.model), str(port)])


def _mlserver(stage: Stage, port: int) -> Launch:
    """
    Start MLServer with its adaptive batching, inference in its own process.

    No batch waits for longer than the 64 in flight take to come; without batching, or with a
    shorter time, it was slower.
    """
    folder = stage.work / "mlserver"
    folder.mkdir(exist_ok=True)
    settings = {
        "host": "127.0.0.1",
        "grpc_port": port,
        "http_port": subjects.free_port(),
        "metrics_port": subjects.free_port(),
        "parallel_workers": 0,
        "debug": False,
    }
    model = {
        "name": "tensor",
        "implementation": "mlserver_model.OnnxModel",
        "parameters": {"uri": str(stage.model), "version": "1"},
        "max_batch_size": 64,
        "max_batch_time": 0.01,
    }
    (folder / "settings.json").write_text(json.dumps(settings))
    (folder / "model-settings.json").write_text(json.dumps(model))
    shutil.copy(HERE / "mlserver_model.py", folder)
    program = str(ROOT / ".venv-peers" / "bin" / "mlserver")
    return Launch([program, "start", "."], folder=folder, says_serving=False)


def _mlserver_absence() -> str | None:
    if (ROOT / ".venv-peers" / "bin" / "mlserver").is_file():
        return None
    return "no MLServer here: `make peers` installs it"


def _triton(stage: Stage, port: int) -> Launch:
    """Start Triton with its dynamic batching, and one instance of the model in Python."""
    packages = _triton_packages()
    assert packages is not None
    own = packages / "pytriton" / "tritonserver"
    backends, repository = stage.work / "triton-backends", stage.work / "triton-models"
    if not repository.is_dir():
        # The backend looks for the stub of its own Python beside its library.
        shutil.copytree(own / "backends", backends)
        shutil.copy2(_triton_stub(packages), backends / "python")
        (repository / "tensor" / "1").mkdir(parents=True)
        (repository / "tensor" / "config.pbtxt").write_text(
            'backend: "python"\nmax_batch_size: 128\ndynamic_batching {}\n'
            f'input {{ name: "x" data_type: TYPE_FP32 dims: {subjects.WIDTH} }}\n'
            'output { name: "y" data_type: TYPE_FP32 dims: 1 }\n'
            f'parameters {{ key: "model" value {{ string_value: "{stage.model}" }} }}\n'
        )
        (repository / "tensor" / "1" / "model.py").write_text(
            # Its Python has nothing of the environment that it lies in, and reads no PYTHONPATH.
            f"import sys; sys.path.insert(0, {str(packages)!r})\n"
            + (HERE / "triton_model.py").read_text()
        )
    return Launch(
        [
            *(str(own / "bin" / "tritonserver"), "--model-repository", str(repository)),
            *("--backend-directory", str(backends)),
            *("--grpc-address", "127.0.0.1", "--grpc-port", str(port)),
            *("--allow-http=false", "--allow-metrics=false"),
        ],
        environment={"LD_LIBRARY_PATH": str(packages / "nvidia_pytriton.libs")},
        says_serving=False,
        is_fragile=True,
    )


def _triton_absence() -> str | None:
    packages = _triton_packages()
    if packages is None or not (packages / "pytriton").is_dir():
        return "no Triton here: `make triton` installs it where there is a wheel"
    if not (packages / "onnxruntime").is_dir():
        return "Triton's environment has no ONNX Runtime: `make triton` installs it"
    if not _triton_stub(packages).is_file():
        return "Triton's Python backend has nothing for this Python"
    needs = subprocess.run(
        ["ldd", _triton_stub(packages)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "LD_LIBRARY_PATH": str(packages / "nvidia_pytriton.libs")},
    )
    lacking = [line.split()[0] for line in needs.stdout.splitlines() if "not found" in line]
    return f"Triton's Python backend lacks a library: {lacking[0]}" if lacking else None


def _triton_packages() -> Path | None:
    return next((ROOT / ".venv-triton").glob("lib/python*/site-packages"), None)


def _triton_stub(packages: Path) -> Path:
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stubs = packages / "pytriton" / "tritonserver" / "python_backend_stubs"
    return stubs / version / "triton_python_backend_stub"


PEERS = {
    GATEWAY: Peer(_gateway),
    GATEWAY_WITH_FEATURES: Peer(partial(_gateway, has_features=True)),
    WITHOUT_STREAM: Peer(partial(_gateway, is_streamed=False)),
    WITHOUT_TRACES: Peer(partial(_gateway, is_traced=False)),
    WITHOUT_METRICS: Peer(partial(_gateway, with_metrics=False)),
    ALL_TRACED: Peer(partial(_gateway, traced_share=1.0)),
    TWO_WORKERS: Peer(partial(_gateway, workers=2)),
    CEILING: Peer(_ceiling),
    GLUE: Peer(_glue),
    FLOOR: Peer(partial(_floor, command="HGETALL")),
    FLOOR_OF_FIELDS: Peer(partial(_floor, command="HMGET")),
    AIO: Peer(_aio),
    MLSERVER: Peer(_mlserver, _mlserver_absence),
    TRITON: Peer(_triton, _triton_absence),
}
