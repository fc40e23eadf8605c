"""Where a model runs, as its configuration says."""

import pytest

from headrace.errors import ModelLoadError
from headrace.repository.config import parse_config

GPU = "instance_group [ { kind: KIND_GPU gpus: [ 0 ] } ] "


def parameter(key, value):
    return f"parameters {{ key: '{key}' value {{ string_value: '{value}' }} }}"


@pytest.mark.parametrize(
    ("groups", "device", "instances"),
    [
        ("", None, 1),
        ("{ kind: KIND_CPU count: 3 }", None, 3),
        ("{ kind: KIND_AUTO count: 2 }, { kind: KIND_CPU }", None, 3),
        ("{ kind: KIND_GPU }", 0, 1),
        ("{ kind: KIND_GPU count: 2 gpus: [ 1 ] }", 1, 2),
        ("{ kind: KIND_GPU gpus: [ 3 ] }, { kind: KIND_GPU gpus: [ 3 ] }", 3, 2),
    ],
)
def test_the_groups_say_where_and_how_often(groups, device, instances):
    config = parse_config(f"instance_group [ {groups} ]", "m")
    assert (config.gpu_device, config.instance_count) == (device, instances)


@pytest.mark.parametrize(
    ("key", "value", "means"),
    [
        ("gpu_mem_limit", "4294967200", "4294967200"),
        ("gpu_mem_limit", "18446744073709551615", "18446744073709551615"),
        ("arena_extend_strategy", "0", "kNextPowerOfTwo"),
        ("arena_extend_strategy", "1", "kSameAsRequested"),
        ("cudnn_conv_algo_search", "0", "EXHAUSTIVE"),
        ("cudnn_conv_algo_search", "1", "HEURISTIC"),
        ("cudnn_conv_algo_search", "2", "DEFAULT"),
        ("use_tf32", "true", "1"),
        ("use_tf32", "0", "0"),
    ],
)
def test_tritons_parameters_for_cuda_are_read(key, value, means):
    config = parse_config(GPU + parameter(key, value), "m")
    assert config.gpu_options == ((key, means),)
    assert config.without_effect == ()


def test_what_tunes_a_gpu_is_without_effect_on_the_cpu():
    config = parse_config(parameter("gpu_mem_limit", "1024"), "m")
    assert config.gpu_options == ()
    assert config.without_effect == ("parameters.gpu_mem_limit",)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("gpu_mem_limit", "lots"),
        ("gpu_mem_limit", "18446744073709551616"),
        ("arena_extend_strategy", "2"),
        ("cudnn_conv_algo_search", "EXHAUSTIVE"),
        ("use_tf32", "maybe"),
    ],
)
def test_a_value_that_triton_does_not_have_is_refused(key, value):
    with pytest.raises(ModelLoadError, match=f"parameter '{key}' is '{value}'; expected "):
        parse_config(GPU + parameter(key, value), "m")


@pytest.mark.parametrize(
    ("text", "coarse"),
    [
        (GPU, False),
        (GPU + parameter("use_tf32", "0"), False),
        (GPU + parameter("use_tf32", "1"), True),
        (parameter("use_tf32", "1"), False),
    ],
)
def test_digits_are_given_up_only_on_a_gpu_and_when_asked(text, coarse):
    assert parse_config(text, "m").uses_tf32 is coarse
