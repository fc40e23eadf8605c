"""How much of a version's configuration becomes threads."""

import pytest
import structlog

from headrace.loading import VersionLoader, executor_count, overlapping_count
from headrace.repository.config import ModelConfig
from headrace.settings import load_settings
from headrace.telemetry.metrics import Metrics


@pytest.mark.parametrize(
    ("instances", "gpu_device", "executors"), [(1, None, 1), (3, None, 3), (1, 0, 2), (3, 1, 6)]
)
def test_a_gpu_has_two_batches_under_way_for_each_instance(instances, gpu_device, executors):
    config = ModelConfig("m", instance_count=instances, gpu_device=gpu_device)
    assert executor_count(config) == executors


@pytest.mark.parametrize(
    ("service", "instances", "beside"), [(None, 3, 0), ("s", 1, 1), ("s", 3, 3)]
)
def test_a_model_with_features_may_have_a_batch_more_under_way_for_each_instance(
    service, instances, beside
):
    config = ModelConfig("m", instance_count=instances, feature_service=service)
    assert overlapping_count(config) == beside


@pytest.mark.parametrize("caller_header", [None, "x-caller"])
def test_one_order_for_callers_who_have_fair_shares_is_loaded_with_a_warning(
    caller_header, tmp_path
):
    settings = load_settings({"model_repository": tmp_path, "caller_header": caller_header})
    config = ModelConfig("m", max_batch_size=4, preserve_ordering=True)

    with structlog.testing.capture_logs() as logs:
        order = VersionLoader(settings, None, None, Metrics())._order(config, 1)

    assert order is not None
    warned = [line["event"] for line in logs if line["log_level"] == "warning"]
    assert warned == ([] if caller_header is None else ["callers_wait_for_one_another"])
