"""A real Triton server, from the wheel that `make triton` puts into an environment of its own."""

import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tritonclient.grpc as triton

VENV = Path(__file__).parents[2] / ".venv-triton"
START_TIMEOUT_S = 60


class TritonServer:
    """
    Runs `tritonserver` with its Python backend, on loopback.

    Its models are loaded on request, so that one server serves all tests.

    Args:
        packages: The environment's site-packages.
        folder: For the models and the log.
    """

    def __init__(self, packages, folder):
        own = packages / "pytriton" / "tritonserver"
        # The backend looks for the stub of its own Python beside its library.
        shutil.copytree(own / "backends", folder / "backends")
        stub = stub_of(packages)
        shutil.copy2(stub, folder / "backends" / "python")
        self.packages = packages
        self.models = folder / "models"
        self.models.mkdir()
        self.address = f"127.0.0.1:{free_port()}"
        self._log = (folder / "triton.log").open("w")
        host, port = self.address.split(":")
        self._process = subprocess.Popen(
            [
                *(own / "bin" / "tritonserver", "--model-repository", self.models),
                *("--backend-directory", folder / "backends", "--model-control-mode", "explicit"),
                *("--grpc-address", host, "--grpc-port", port),
                *("--allow-http=false", "--allow-metrics=false"),
            ],
            env={**os.environ, "LD_LIBRARY_PATH": str(packages / "nvidia_pytriton.libs")},
            stdout=self._log,
            stderr=self._log,
        )
        self.client = triton.InferenceServerClient(self.address)
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while not self._is_ready():
            assert self._process.poll() is None, (folder / "triton.log").read_text()[-2000:]
            assert time.monotonic() < deadline_s, (folder / "triton.log").read_text()[-2000:]
            time.sleep(0.05)

    def serve(self, name, config, code):
        """Load one model of the Python backend; `code` is the body of its `execute`."""
        (self.models / name / "1").mkdir(parents=True)
        (self.models / name / "config.pbtxt").write_text(config)
        (self.models / name / "1" / "model.py").write_text(
            # Its Python would find the numpy 2 of this one, and then answer with empty tensors.
            f"import sys; sys.path.insert(0, {str(self.packages)!r})\n"
            "import numpy as np\nimport triton_python_backend_utils as pb\n"
            f"class TritonPythonModel:\n    def execute(self, requests):\n{code}"
        )
        self.client.load_model(name)

    def unload(self, name):
        self.client.unload_model(name)

    def close(self):
        self.client.close()
        self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def _is_ready(self):
        try:
            return self.client.is_server_ready(client_timeout=1)
        except triton.InferenceServerException:
            return False


def stub_of(packages):
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stubs = packages / "pytriton" / "tritonserver" / "python_backend_stubs"
    return stubs / version / "triton_python_backend_stub"


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="session")
def triton_server(tmp_path_factory):
    packages = next(VENV.glob("lib/python*/site-packages"), None)
    if packages is None or not (packages / "pytriton").is_dir():
        pytest.skip("no Triton here: `make triton` installs it where there is a wheel")
    if not stub_of(packages).is_file():
        pytest.skip("Triton's Python backend has nothing for this Python")
    needs = subprocess.run(["ldd", stub_of(packages)], capture_output=True, text=True, check=False)
    if "not found" in needs.stdout:
        pytest.skip(f"Triton's Python backend lacks a library: {needs.stdout.split()[0]}")
    server = TritonServer(packages, tmp_path_factory.mktemp("triton"))
    yield server
    server.close()
