"""What `config.pbtxt` may say, and what is said about the rest."""

import pytest
from tritonclient.grpc import model_config_pb2

from headrace.errors import ModelLoadError
from headrace.repository.completion import AUTO_MAX_BATCH_SIZE, complete
from headrace.repository.config import parse_config
from headrace.repository.policy import VersionPolicy
from headrace.repository.queueing import QueueLevel, check_parts
from headrace.tensors import TensorSpec

X = TensorSpec("x", "FP32", (-1, 4))
Y = TensorSpec("y", "FP32", (-1, 1))
IO = """
input [ { name: "x" data_type: TYPE_FP32 dims: [ 4 ] } ]
output [ { name: "y" data_type: TYPE_FP32 dims: [ 1 ] } ]
"""
FULL = (
    """
name: "m"
platform: "onnxruntime_onnx"
max_batch_size: 64
"""
    + IO
    + """
dynamic_batching {
  preferred_batch_size: [ 32, 8, 8 ]
  max_queue_delay_microseconds: 1500
  default_queue_policy { max_queue_size: 100 }
  preserve_ordering: true
}
instance_group [ { kind: KIND_CPU count: 2 }, { kind: KIND_AUTO } ]
optimization { graph { level: 1 } }
parameters { key: "feature_service" value { string_value: "homes" } }
parameters { key: "feature_order" value { string_value: "[\\"a\\", \\"b\\"]" } }
parameters { key: "missing_features" value { string_value: "reject" } }
parameters { key: "max_feature_age_s" value { string_value: "3600" } }
parameters { key: "allowed_batch_sizes" value { string_value: "[1, 8, 64]" } }
parameters { key: "max_request_rows" value { string_value: "1000" } }
parameters { key: "latency_slo_ms" value { string_value: "2.5" } }
parameters { key: "codel_target_ms" value { string_value: "50" } }
parameters { key: "codel_interval_ms" value { string_value: "200" } }
parameters { key: "intra_op_thread_count" value { string_value: "0" } }
parameters { key: "inter_op_thread_count" value { string_value: "3" } }
parameters { key: "execution_mode" value { string_value: "1" } }
parameters { key: "enable_mem_arena" value { string_value: "0" } }
parameters { key: "enable_mem_pattern" value { string_value: "false" } }
"""
)


def parameter(key, value):
    return f"parameters {{ key: '{key}' value {{ string_value: '{value}' }} }}"


def ordered(more):
    return f"max_batch_size: 8 dynamic_batching {{ preserve_ordering: true {more} }}"


def with_service(key, value):
    return parameter("feature_service", "homes") + parameter(key, value)


def tensor(data_type="TYPE_FP32", more="", kind="input"):
    return f" {kind} [ {{ name: 'x' data_type: {data_type} dims: [ 4 ] {more} }} ]"


def test_every_setting_is_read():
    config = parse_config(FULL, "m")
    assert (config.name, config.max_batch_size, config.gpu_device) == ("m", 64, None)
    assert (config.inputs, config.outputs) == ((X,), (Y,))
    assert config.preferred_batch_sizes == (8, 32)
    assert config.max_queue_delay_s == 0.0015
    assert [level.max_queue_size for level in config.queue_levels] == [100]
    assert config.instance_count == 3
    assert config.graph_optimization == "extended"
    assert (config.feature_service, config.feature_order) == ("homes", ("a", "b"))
    assert (config.missing_features, config.max_feature_age_s) == ("reject", 3600.0)
    assert config.latency_slo_s == 0.0025
    assert config.max_request_rows == 1000
    assert config.preserve_ordering
    assert config.allowed_batch_sizes == (1, 8, 64)
    assert config.queue_control == (0.05, 0.2)
    assert (config.intra_op_thread_count, config.inter_op_thread_count) == (0, 3)
    assert config.execution_mode == "parallel"
    assert not config.enable_mem_arena
    assert not config.enable_mem_pattern
    assert config.without_effect == ()


@pytest.mark.parametrize(
    ("text", "policy"),
    [
        ("", VersionPolicy("latest", 1)),
        ("version_policy { latest { } }", VersionPolicy("latest", 1)),
        ("version_policy { latest { num_versions: 3 } }", VersionPolicy("latest", 3)),
        ("version_policy { all { } }", VersionPolicy("all")),
        (
            "version_policy { specific { versions: [7, 2] } }",
            VersionPolicy("specific", numbers=frozenset({2, 7})),
        ),
    ],
)
def test_the_version_policy_is_tritons(text, policy):
    config = parse_config(text, "m")

    assert config.version_policy == policy
    assert config.without_effect == ()


def test_an_empty_file_gives_the_defaults():
    config = parse_config("", "m")
    assert (config.inputs, config.outputs, config.max_batch_size) == ((), (), 0)
    assert (config.max_queue_delay_s, config.instance_count) == (0.0, 1)
    assert config.queue_levels == (QueueLevel(),)
    assert (config.intra_op_thread_count, config.execution_mode) == (1, "sequential")
    assert (config.graph_optimization, config.missing_features) == ("all", "nan")
    assert config.feature_service is None
    assert config.feature_order is None
    assert config.max_feature_age_s is None
    assert config.latency_slo_s is None
    assert config.queue_control is None


def test_the_message_carries_the_folders_name():
    assert parse_config("", "m").message.name == "m"


@pytest.mark.parametrize(
    ("level", "optimization"), [(-1, "basic"), (0, "all"), (1, "extended"), (2, "disabled")]
)
def test_graph_levels_are_tritons(level, optimization):
    config = parse_config(f"optimization {{ graph {{ level: {level} }} }}", "m")
    assert config.graph_optimization == optimization


@pytest.mark.parametrize(
    ("data_type", "datatype"),
    [
        (name, {"TYPE_STRING": "BYTES"}.get(name, name.removeprefix("TYPE_")))
        for name in model_config_pb2.DataType.keys()  # noqa: SIM118  (no mapping)
        if name not in ("TYPE_INVALID", "TYPE_BF16")
    ],
)
def test_every_datatype_of_triton_but_bf16_is_known(data_type, datatype):
    (spec,) = parse_config(tensor(data_type), "m").inputs
    assert spec == TensorSpec("x", datatype, (4,))


def test_without_a_batch_dimension_dims_are_the_whole_shape():
    config = parse_config(IO, "m")
    assert [spec.shape for spec in (*config.inputs, *config.outputs)] == [(4,), (1,)]


def test_no_dims_with_a_batch_dimension_are_one_value_per_row():
    text = "max_batch_size: 8 output [ { name: 'y' data_type: TYPE_INT64 } ]"
    assert parse_config(text, "m").outputs == (TensorSpec("y", "INT64", (-1,)),)


def test_settings_that_are_not_used_are_named():
    text = """
        metric_tags { key: "team" value: "homes" }
        response_cache { enable: true }
        optimization { input_pinned_memory { enable: false } }
        dynamic_batching {
          default_queue_policy { default_timeout_microseconds: 5 }
        }
        output [ { name: "y" data_type: TYPE_FP32 dims: [ 1 ] label_filename: "labels.txt" } ]
        max_batch_size: 8
    """ + parameter("feature_servce", "homes")
    assert parse_config(text, "m").without_effect == (
        "metric_tags",
        "optimization.input_pinned_memory",
        "output.label_filename",
        "parameters.feature_servce",
        "response_cache",
    )


SIZES_EXPECTED = "expected a JSON list of 1 to 64 row counts above 0, ascending"
UNSUPPORTED = "is not supported by this server"


@pytest.mark.parametrize(
    ("text", "fact"),
    [
        ("max_batch_size: 8\nfoo: 3", 'line 2, column 1: Message type "inference.ModelConfig" has'),
        ("max_batch_size: 'a'", "line 1, column 17: Couldn't parse integer: 'a'"),
        ("max_batch_size: 99999999999", "line 1, column 17: Value out of range: 99999999999"),
        ("input [ { name: 'x'", "line 1, column"),
        (tensor("TYPE_COMPLEX"), "has no value named TYPE_COMPLEX"),
        (tensor("TYPE_BF16"), "input 'x' has data_type TYPE_BF16; expected one of TYPE_BOOL, "),
        ("input [ { name: 'x' dims: [ 4 ] } ]", "input 'x' has no data_type"),
        ("output [ { data_type: TYPE_FP32 dims: [ 4 ] } ]", "an output has no name"),
        (tensor() + tensor(), "input 'x' is listed twice"),
        (tensor(more="dims: [ 0 ]"), "input 'x' has the dim 0; expected -1 or above 0"),
        (tensor(more="dims: [ -2 ]"), "input 'x' has the dim -2; expected -1 or above 0"),
        (tensor(more="reshape { shape: [ 2, 2 ] }"), f"reshape of input 'x' {UNSUPPORTED}"),
        (tensor(more="is_shape_tensor: true"), f"is_shape_tensor of input 'x' {UNSUPPORTED}"),
        (tensor(more="allow_ragged_batch: true"), f"allow_ragged_batch of input 'x' {UNSUPPORTED}"),
        (tensor(more="optional: true"), f"optional of input 'x' {UNSUPPORTED}"),
        (
            tensor(more="is_shape_tensor: true", kind="output"),
            f"is_shape_tensor of output 'x' {UNSUPPORTED}",
        ),
        ("name: 'other'", "name is 'other'; expected 'm', as the folder"),
        ("platform: 'ensemble'", "platform is 'ensemble'; expected 'onnxruntime_onnx'"),
        ("backend: 'python'", "backend is 'python'; expected 'onnxruntime'"),
        ("default_model_filename: '../m.onnx'", "is '../m.onnx'; expected 'model.onnx'"),
        ("max_batch_size: -1", "max_batch_size is -1; expected 0 or more"),
        ("sequence_batching { }", f"sequence_batching {UNSUPPORTED}"),
        ("ensemble_scheduling { }", f"ensemble_scheduling {UNSUPPORTED}"),
        (
            "model_transaction_policy { decoupled: true }",
            f"model_transaction_policy.decoupled {UNSUPPORTED}",
        ),
        ("version_policy { specific { } }", "version_policy.specific needs versions"),
        ("version_policy { specific { versions: 0 } }", "each above 0"),
        (
            "model_operations { op_library_filename: 'evil.so' }",
            f"model_operations.op_library_filename {UNSUPPORTED}",
        ),
        (
            "optimization { execution_accelerators { gpu_execution_accelerator { name: 'trt' } } }",
            f"optimization.execution_accelerators {UNSUPPORTED}",
        ),
        ("optimization { graph { level: 3 } }", "level is 3; expected -1, 0, 1 or 2"),
        ("instance_group [ { gpus: [ 0 ] } ]", "has gpus and KIND_AUTO; expected KIND_GPU"),
        ("instance_group [ { kind: KIND_GPU gpus: [ 0, 1 ] } ]", "asks for GPUs [0, 1]; expected"),
        ("instance_group [ { kind: KIND_GPU }, { kind: KIND_CPU } ]", "asks for CPU and GPU"),
        ("instance_group [ { kind: KIND_GPU gpus: [ -1 ] } ]", "asks for GPU -1"),
        ("instance_group [ { count: -1 } ]", "instance_group count is -1; expected 1 or more"),
        ("instance_group [ { count: 999 } ]", "asks for 999 instances; at most 256"),
        (
            "dynamic_batching { max_queue_delay_microseconds: 60000001 }",
            "max_queue_delay_microseconds is 60000001; expected at most 60000000",
        ),
        (
            "dynamic_batching { preferred_batch_size: [ 0 ] }",
            "preferred_batch_size has 0; expected sizes above 0",
        ),
        (
            "max_batch_size: 8 dynamic_batching { preferred_batch_size: [ 9 ] }",
            "preferred_batch_size has 9; expected at most max_batch_size, 8",
        ),
        (
            ordered("priority_levels: 2 default_priority_level: 1"),
            "preserve_ordering does not go with more than one of priority_levels",
        ),
        (
            ordered("default_queue_policy { timeout_action: DELAY }"),
            "preserve_ordering does not go with timeout_action DELAY",
        ),
        (IO + "dynamic_batching { }", "dynamic_batching needs a max_batch_size above 0"),
        (
            parameter("intra_op_thread_count", "two"),
            "parameter 'intra_op_thread_count' is 'two'; expected a whole number from 0 to 1024",
        ),
        (parameter("inter_op_thread_count", "-1"), "expected a whole number from 0 to 1024"),
        (parameter("inter_op_thread_count", "1025"), "expected a whole number from 0 to 1024"),
        (parameter("inter_op_thread_count", "9" * 5000), "expected a whole number from 0 to 1024"),
        (parameter("execution_mode", "2"), "'execution_mode' is '2'; expected '0' or '1'"),
        (
            parameter("enable_mem_arena", "on"),
            "'enable_mem_arena' is 'on'; expected '0' or '1' or 'false' or 'true'",
        ),
        (
            "max_batch_size: 8 " + parameter("max_request_rows", "8"),
            "parameter 'max_request_rows' is 8; expected more than max_batch_size, 8, or 0",
        ),
        (
            IO + parameter("max_request_rows", "8"),
            "parameter 'max_request_rows' needs a max_batch_size above 0",
        ),
        (
            "max_batch_size: 8 " + parameter("allowed_batch_sizes", "[1, 4]"),
            "parameter 'allowed_batch_sizes' ends with 4; expected max_batch_size, 8, as the last",
        ),
        (
            IO + parameter("allowed_batch_sizes", "[1]"),
            "parameter 'allowed_batch_sizes' needs a max_batch_size above 0",
        ),
        *(
            (parameter("allowed_batch_sizes", value), f"is {value!r}; {SIZES_EXPECTED}")
            for value in ("[]", "[4, 1]", "[1, 1]", "[0, 1]", "[true]", "[1.0]", "8", '["8"]')
        ),
        (parameter("allowed_batch_sizes", "1, 8"), f"is not JSON; {SIZES_EXPECTED}"),
        (
            with_service("shape_buckets", "{}"),
            "parameter 'shape_buckets' does not go with 'feature_service'",
        ),
        (
            parameter("shape_buckets", "{}"),
            "is '{}'; expected a JSON object with 'sizes' and 'inputs'",
        ),
        (parameter("max_request_rows", "1e3"), "expected a whole number from 0 to 1048576"),
        (parameter("codel_target_ms", "-5"), "'codel_target_ms' is '-5'; expected a number above"),
        (
            "dynamic_batching { max_queue_delay_microseconds: 50000 }"
            + parameter("codel_target_ms", "50"),
            "'codel_target_ms' is 50; expected more than max_queue_delay_microseconds, 50 ms",
        ),
        (parameter("codel_interval_ms", "5"), "needs the parameter 'codel_target_ms'"),
        (
            parameter("codel_target_ms", "50") + parameter("codel_interval_ms", "soon"),
            "'codel_interval_ms' is 'soon'; expected a number above 0",
        ),
        (parameter("latency_slo_ms", "0"), "'latency_slo_ms' is '0'; expected a number above 0"),
        (parameter("latency_slo_ms", "nan"), "expected a number above 0"),
        (parameter("latency_slo_ms", "inf"), "expected a number above 0"),
        (parameter("latency_slo_ms", ""), "parameter 'latency_slo_ms' has no string_value"),
        (parameter("feature_service", " "), "parameter 'feature_service' has no string_value"),
        (parameter("missing_features", "nan"), "needs the parameter 'feature_service'"),
        (parameter("feature_order", "[]"), "needs the parameter 'feature_service'"),
        (
            with_service("missing_features", "zero"),
            "'missing_features' is 'zero'; expected 'nan' or 'default' or 'reject'",
        ),
        (with_service("max_feature_age_s", "-1"), "'max_feature_age_s' is '-1'; expected a number"),
        (
            with_service("feature_order", "a, b"),
            "parameter 'feature_order' is not JSON; expected a JSON list of feature names, each",
        ),
        (with_service("feature_order", "[" * 100_000), "parameter 'feature_order' is not JSON"),
        (with_service("feature_order", "{}"), "expected a JSON list of feature names, each once"),
        (with_service("feature_order", "[]"), "expected a JSON list of feature names, each once"),
        (with_service("feature_order", "[1]"), "expected a JSON list of feature names, each once"),
        (
            with_service("feature_order", '["a", "a"]'),
            """'feature_order' is '["a", "a"]'; expected a JSON list of feature names, each once""",
        ),
    ],
)
def test_what_cannot_be_done_is_refused_with_what_was_expected(text, fact):
    with pytest.raises(ModelLoadError) as refused:
        parse_config(text, "m")
    message = str(refused.value)
    assert message.startswith("config.pbtxt: ")
    assert fact in message
    assert len(message) < 500


def test_a_request_whose_parts_could_never_wait_together_is_refused_at_load():
    check_parts(0, 0, [5])
    check_parts(40, 8, [100, 5])

    with pytest.raises(ModelLoadError) as refused:
        check_parts(41, 8, [100, 5])
    assert "'max_request_rows' is 41, which is 6 batches; expected no more than may" in str(
        refused.value
    )


def test_a_missing_file_is_made_up_from_the_model():
    config = complete(parse_config("", "m"), [X], [Y])
    assert (config.inputs, config.outputs) == ((X,), (Y,))
    assert config.max_batch_size == AUTO_MAX_BATCH_SIZE


def test_a_completed_config_says_the_same_when_it_is_read_back():
    completed = complete(parse_config("", "m"), [X], [Y])
    assert parse_config(str(completed.message), "m") == completed


def test_completing_leaves_the_first_message_alone():
    first = parse_config("", "m")
    complete(first, [X], [Y])
    assert not first.message.input


@pytest.mark.parametrize("fixed", [(4,), (1, 4)])
def test_a_model_with_a_fixed_first_dimension_is_completed_without_batching(fixed):
    spec = TensorSpec("x", "FP32", fixed)
    config = complete(parse_config("", "m"), [spec], [Y])
    assert (config.max_batch_size, config.inputs) == (0, (spec,))
    assert list(config.message.input[0].dims) == list(fixed)


def test_a_given_batch_size_is_kept_when_the_rest_is_completed():
    config = complete(parse_config("max_batch_size: 16", "m"), [X], [Y])
    assert (config.max_batch_size, config.inputs) == (16, (X,))


def test_listed_inputs_are_kept_when_only_outputs_are_completed():
    config = complete(parse_config("max_batch_size: 16" + tensor(), "m"), [X], [Y])
    assert (config.inputs, config.outputs) == ((X,), (Y,))


def test_outputs_may_be_a_part_in_another_order():
    z = TensorSpec("z", "INT64", (-1, 1))
    text = """
        max_batch_size: 8
        input [ { name: "x" data_type: TYPE_FP32 dims: [ 4 ] } ]
        output [ { name: "z" data_type: TYPE_INT64 dims: [ 1 ] },
                 { name: "y" data_type: TYPE_FP32 dims: [ 1 ] } ]
    """
    other = TensorSpec("unused", "FP32", (-1, 9))
    assert complete(parse_config(text, "m"), [X], [other, Y, z]).outputs == (z, Y)


def test_a_fixed_dimension_may_stand_for_a_variable_one():
    model = TensorSpec("x", "FP32", (-1, -1))
    config = complete(parse_config("max_batch_size: 8" + IO, "m"), [model], [Y])
    assert config.inputs == (X,)


def test_a_shape_that_the_model_does_not_tell_comes_from_the_file():
    untold = TensorSpec("x", "FP32", ())
    assert complete(parse_config("max_batch_size: 8" + IO, "m"), [untold], [Y]).inputs == (X,)


@pytest.mark.parametrize(
    ("text", "inputs", "outputs", "fact"),
    [
        (IO, [TensorSpec("x", "FP32", (4,))], [], "the model has no output 'y'; it has "),
        (IO, [TensorSpec("a", "FP32", (4,))], [Y], "the model needs input 'a', which"),
        (
            IO,
            [TensorSpec("x", "FP32", (4,)), TensorSpec("b", "FP32", (1,))],
            [Y],
            "the model needs input 'b', which config.pbtxt does not list",
        ),
        (
            "max_batch_size: 8" + tensor() + tensor(kind="output"),
            [X],
            [Y],
            "the model has no output 'x'; it has 'y'",
        ),
        (
            "max_batch_size: 8" + IO,
            [TensorSpec("x", "FP64", (-1, 4))],
            [Y],
            "input 'x' is TYPE_FP32, but TYPE_FP64 in the model",
        ),
        (
            "max_batch_size: 8" + IO,
            [TensorSpec("x", "FP32", (-1, 5))],
            [Y],
            "input 'x' has the shape [-1,4] with its batch dimension, but [-1,5] in the model",
        ),
        (
            "max_batch_size: 8" + IO,
            [TensorSpec("x", "FP32", (-1, 4, 1))],
            [Y],
            "input 'x' has the shape [-1,4] with its batch dimension, but [-1,4,1] in the model",
        ),
        (IO, [X], [Y], "input 'x' has the shape [4], but [-1,4] in the model"),
        (
            "max_batch_size: 8" + IO,
            [TensorSpec("x", "FP32", (1, 4))],
            [Y],
            "max_batch_size is 8, but input 'x' has the shape [1,4] in the model, without a",
        ),
        (
            "max_batch_size: 8",
            [X],
            [TensorSpec("y", "FP32", (1, 1))],
            "max_batch_size is 8, but output 'y' has the shape [1,1] in the model, without a",
        ),
        ("", [TensorSpec("x", "FP32", ())], [Y], "'x' has no shape in the model; list inputs and"),
        (
            "dynamic_batching { preferred_batch_size: [ 999 ] }",
            [X],
            [Y],
            "preferred_batch_size has 999; expected at most max_batch_size, 256",
        ),
        (
            "dynamic_batching { }",
            [TensorSpec("x", "FP32", (4,))],
            [Y],
            "dynamic_batching needs a max_batch_size above 0",
        ),
    ],
)
def test_a_difference_between_file_and_model_is_named(text, inputs, outputs, fact):
    config = parse_config(text, "m")
    with pytest.raises(ModelLoadError) as refused:
        complete(config, inputs, outputs)
    assert fact in str(refused.value)
