"""Small ONNX models in a model repository, made when the tests run."""

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

ONNX_TYPES = {
    "FP32": TensorProto.FLOAT,
    "FP64": TensorProto.DOUBLE,
    "FP16": TensorProto.FLOAT16,
    "INT64": TensorProto.INT64,
    "INT32": TensorProto.INT32,
    "INT8": TensorProto.INT8,
    "UINT8": TensorProto.UINT8,
    "BOOL": TensorProto.BOOL,
    "BYTES": TensorProto.STRING,
}


def write_model(root, name, nodes, inputs, outputs, *, config="", constants=(), version=1):
    """Write `<root>/<name>/<version>/model.onnx`; tensors are (name, datatype, shape)."""
    graph = helper.make_graph(
        nodes,
        name,
        [helper.make_tensor_value_info(n, ONNX_TYPES[d], s) for n, d, s in inputs],
        [helper.make_tensor_value_info(n, ONNX_TYPES[d], s) for n, d, s in outputs],
        [numpy_helper.from_array(np.asarray(value), key) for key, value in dict(constants).items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    folder = root / name / str(version)
    folder.mkdir(parents=True)
    onnx.save(model, folder / "model.onnx")
    if config:
        (root / name / "config.pbtxt").write_text(config)


def write_repository(root):
    """Write models that sum, echo, and fail to load in every way there is."""
    node = helper.make_node
    axis = {"axis": np.array([1], np.int64)}
    write_model(
        root,
        "scores",
        [node("ReduceSum", ["x", "axis"], ["y"], keepdims=1)],
        [("x", "FP32", ["n", 4])],
        [("y", "FP32", ["n", 1])],
        constants=axis,
        config="max_batch_size: 8",
    )
    write_model(
        root,
        "pair",
        [node("Add", ["a", "b"], ["total"]), node("Identity", ["b"], ["echo"])],
        [("a", "FP32", ["n", 2]), ("b", "FP32", ["n", 2])],
        [("total", "FP32", ["n", 2]), ("echo", "FP32", ["n", 2])],
        config="max_batch_size: 8",
    )
    write_model(
        root,
        "lines",  # of any length, so that shapes in the queue differ
        [node("ReduceSum", ["x", "axis"], ["y"], keepdims=1)],
        [("x", "FP32", ["n", "m"])],
        [("y", "FP32", ["n", 1])],
        constants=axis,
        config="max_batch_size: 8",
    )
    write_model(
        root,
        "patient",  # waits for company: at 4 rows it goes, else after half a second
        [node("ReduceSum", ["x", "axis"], ["y"], keepdims=1)],
        [("x", "FP32", ["n", 4])],
        [("y", "FP32", ["n", 1])],
        constants=axis,
        config="max_batch_size: 8\n"
        "dynamic_batching { preferred_batch_size: 4 max_queue_delay_microseconds: 500000 }",
    )
    write_model(
        root,
        "whole",  # no batch dimension
        [node("Identity", ["x"], ["y"])],
        [("x", "FP32", [2, 3])],
        [("y", "FP32", [2, 3])],
        config="max_batch_size: 0",
    )
    for datatype in ONNX_TYPES:
        write_model(
            root,
            f"echo_{datatype.lower()}",
            [node("Identity", ["x"], ["y"])],
            [("x", datatype, ["n", 2])],
            [("y", datatype, ["n", 2])],
            config="max_batch_size: 8",
        )
    write_model(
        root,
        "gather",  # fails on an index of 3 or more
        [node("Gather", ["table", "x"], ["y"])],
        [("x", "INT64", ["n", 1])],
        [("y", "FP32", ["n", 1])],
        constants={"table": np.array([0.0, 10.0, 20.0], np.float32)},
        config="max_batch_size: 8",
    )
    (root / "corrupt" / "1").mkdir(parents=True)
    (root / "corrupt" / "1" / "model.onnx").write_bytes(b"this is no model")
    (root / "unparsable" / "1").mkdir(parents=True)
    (root / "unparsable" / "1" / "model.onnx").write_bytes(b"")
    (root / "unparsable" / "config.pbtxt").write_text("max_batch_size: many")
    (root / "empty").mkdir()


def write_joined_models(root):
    """Write models whose inputs are features of the service `driver_features`."""
    joined = """
        max_batch_size: 16
        parameters {{ key: "feature_service" value {{ string_value: "driver_features" }} }}
        parameters {{ key: "missing_features" value {{ string_value: "{policy}" }} }}
        {more}
    """
    order = (
        'parameters { key: "feature_order" value { string_value: '
        '"[\\"rating\\", \\"trips\\", \\"distance\\"]" } }'
    )
    for name, policy, more, width in [
        ("driver_score", "nan", "", 2),
        ("driver_default", "default", "", 2),
        ("driver_strict", "reject", "", 2),
        ("driver_trip", "nan", order, 3),
    ]:
        write_model(
            root,
            name,
            [helper.make_node("Identity", ["x"], ["y"])],
            [("x", "FP32", ["n", width])],
            [("y", "FP32", ["n", width])],
            config=joined.format(policy=policy, more=more),
        )
