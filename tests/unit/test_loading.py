"""How much of a version's configuration becomes threads."""

import pytest

from headrace.loading import executor_count
from headrace.repository.config import ModelConfig


@pytest.mark.parametrize(
    ("instances", "gpu_device", "executors"), [(1, None, 1), (3, None, 3), (1, 0, 2), (3, 1, 6)]
)
def test_a_gpu_has_two_batches_under_way_for_each_instance(instances, gpu_device, executors):
    config = ModelConfig("m", instance_count=instances, gpu_device=gpu_device)
    assert executor_count(config) == executors
