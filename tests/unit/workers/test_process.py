"""A worker's process: it sees the GPU that it was given."""

from pathlib import Path

import pytest

from headrace.workers.process import WorkerProcess


@pytest.mark.parametrize("device", ["1", "GPU-8932f937", None])
def test_a_worker_sees_its_own_device_or_else_what_its_supervisor_sees(monkeypatch, device):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")

    worker = WorkerProcess(1, device, {"type": "start"})
    try:
        environment = Path(f"/proc/{worker.pid}/environ").read_bytes().split(b"\0")
    finally:
        worker.reap()
        worker.channel.close()

    assert f"CUDA_VISIBLE_DEVICES={device or '0,1'}".encode() in environment
