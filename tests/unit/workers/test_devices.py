"""What this process may use is found without loading anything of CUDA."""

import os

import pytest

from headrace.workers.devices import core_count, gpu_devices


@pytest.fixture
def devices(tmp_path):
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm", "null"):
        (tmp_path / name).touch()
    return tmp_path


def test_each_device_file_is_a_gpu(devices):
    assert gpu_devices({}, devices, build="headrace") == ["0", "1"]
    assert gpu_devices({"CUDA_VISIBLE_DEVICES": "1"}, devices, build="headrace") == ["1"]


def test_without_onnx_runtime_for_gpus_there_are_none(devices):
    assert gpu_devices({}, devices, build="no-such-distribution") == []


def test_a_machine_without_device_files_has_none(tmp_path):
    assert gpu_devices({}, tmp_path / "none", build="headrace") == []


def test_cores_are_those_of_the_affinity_and_the_containers_share(tmp_path):
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "cpu.max").write_text("50000 100000\n")
    (tmp_path / "one" / "cpu").mkdir(parents=True)
    (tmp_path / "one" / "cpu" / "cpu.cfs_quota_us").write_text("100000\n")
    (tmp_path / "one" / "cpu" / "cpu.cfs_period_us").write_text("100000\n")

    assert core_count(tmp_path / "none") == len(os.sched_getaffinity(0))
    assert core_count(tmp_path / "two") == 1
    assert core_count(tmp_path / "one") == 1
