"""Fills in what a `config.pbtxt` leaves out from the model itself, and finds where the two differ.

Source: Triton, "Auto-Generated Model Configuration".
"""

from collections.abc import Sequence
from dataclasses import replace

from tritonclient.grpc import model_config_pb2

from headrace.repository.config import (
    BACKEND,
    DATA_TYPES,
    PLATFORM,
    ModelConfig,
    check_batching,
)
from headrace.repository.parameters import wrong
from headrace.repository.shapes import check_shape_buckets
from headrace.tensors import TensorSpec

AUTO_MAX_BATCH_SIZE = 256
"""Rows per batch for a model whose folder says nothing. Triton's 4 suits a server that waits for
company; a batch here is whatever waits already, so a larger limit costs a lone request nothing."""


def complete(
    config: ModelConfig, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]
) -> ModelConfig:
    """
    Fill in what the file leaves out, and check the rest against the model.

    As Triton does for ONNX: inputs and outputs that the file does not list come from the model. A
    file that lists neither and gives no `max_batch_size` gets `AUTO_MAX_BATCH_SIZE` when the first
    dimension of every tensor is variable.

    Args:
        config: From `parse_config`.
        inputs: What the model takes, batch dimension included. An empty shape means that the model
            does not say (ONNX Runtime reports scalars and undeclared shapes alike).
        outputs: What it returns, likewise.

    Returns:
        A configuration with inputs and outputs, whose `message` has them too.

    Raises:
        ModelLoadError: file and model differ, or the model does not say enough.
    """
    if not config.inputs or not config.outputs:
        config = _fill(config, inputs, outputs)
        check_batching(config)
    declared = {spec.name for spec in config.inputs}
    for spec in inputs:
        if spec.name not in declared:
            raise wrong(f"the model needs input '{spec.name}', which config.pbtxt does not list")
    _compare("input", config.inputs, inputs, config.max_batch_size)
    _compare("output", config.outputs, outputs, config.max_batch_size)
    if config.shape_buckets is not None:
        check_shape_buckets(
            config.shape_buckets, config.inputs, config.outputs, config.max_batch_size
        )
    return config


def with_batch_size(config: ModelConfig, max_batch_size: int | None) -> ModelConfig:
    """Take a remote model's own batch size, where the file is silent about all of it."""
    if max_batch_size is None or config.max_batch_size or config.inputs or config.outputs:
        return config
    message = model_config_pb2.ModelConfig()
    message.CopyFrom(config.message)
    message.max_batch_size = max_batch_size
    return replace(config, max_batch_size=max_batch_size, message=message)


def _listed(shape: Sequence[int]) -> str:
    return "[" + ",".join(map(str, shape)) + "]"


def _fill(
    config: ModelConfig, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]
) -> ModelConfig:
    max_batch_size = config.max_batch_size
    if not config.inputs and not config.outputs and not max_batch_size:
        can_batch = all(spec.shape[:1] == (-1,) for spec in (*inputs, *outputs))
        max_batch_size = AUTO_MAX_BATCH_SIZE if can_batch else 0
    message = model_config_pb2.ModelConfig()
    message.CopyFrom(config.message)
    if config.remote is None:
        message.platform, message.backend = PLATFORM, BACKEND
    message.max_batch_size = max_batch_size
    for declared, actual, entries in (
        (config.inputs, inputs, message.input),
        (config.outputs, outputs, message.output),
    ):
        for spec in () if declared else actual:
            if not spec.shape:
                raise wrong(
                    f"'{spec.name}' has no shape in the model; list inputs and outputs with dims"
                )
            entries.add(
                name=spec.name,
                data_type=model_config_pb2.DataType.Value(DATA_TYPES[spec.datatype]),
                dims=spec.shape[1:] if max_batch_size else spec.shape,
            )
    return replace(
        config,
        max_batch_size=max_batch_size,
        inputs=config.inputs or tuple(inputs),
        outputs=config.outputs or tuple(outputs),
        message=message,
    )


def _compare(
    kind: str, declared: Sequence[TensorSpec], actual: Sequence[TensorSpec], max_batch_size: int
) -> None:
    by_name = {spec.name: spec for spec in actual}
    for spec in declared:
        model = by_name.get(spec.name)
        if model is None:
            raise wrong(
                f"the model has no {kind} '{spec.name}'; it has "
                + ", ".join(f"'{name}'" for name in by_name)
            )
        if spec.datatype != model.datatype:
            raise wrong(
                f"{kind} '{spec.name}' is {DATA_TYPES[spec.datatype]}, "
                f"but {DATA_TYPES[model.datatype]} in the model"
            )
        if not model.shape:
            continue  # the model does not say
        if max_batch_size and model.shape[0] != -1:
            raise wrong(
                f"max_batch_size is {max_batch_size}, but {kind} '{spec.name}' has the shape "
                f"{_listed(model.shape)} in the model, without a variable first dimension; for a "
                "model of one size that is max_batch_size, and the parameter 'allowed_batch_sizes' "
                "has it alone"
            )
        if len(spec.shape) != len(model.shape) or any(
            want not in (-1, got) for want, got in zip(model.shape, spec.shape, strict=True)
        ):
            raise wrong(
                f"{kind} '{spec.name}' has the shape {_listed(spec.shape)}"
                f"{' with its batch dimension' if max_batch_size else ''}, "
                f"but {_listed(model.shape)} in the model"
            )
