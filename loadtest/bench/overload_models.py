"""Models whose row costs what one says, what is asked of them, and what they must answer."""

import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from tritonclient.grpc import service_pb2

WIDTH = 16
BODIES = 64

SLOW, TINY = "slow", "tiny"
SLOW_ROW_S = 0.008
"""So that a refusal, of 0.1 to 0.2 ms on a slow machine, is little beside it."""

_WIDE = 16_384
"""Numbers that a row is made into: enough that a round of the loop is their cost, not its own."""

_ROUNDS_TRIED = 50

CONFIGS = {
    SLOW: "max_batch_size: 8\n"
    'parameters { key: "intra_op_thread_count" value { string_value: "1" } }\n',
    TINY: "max_batch_size: 256\n"
    'parameters { key: "intra_op_thread_count" value { string_value: "1" } }\n',
}


def write_slow(repository: Path, row_s: float = SLOW_ROW_S) -> float:
    """
    Write a model of which each row takes `row_s` on one core of this machine, in whatever batch.

    Its rows are widened and a loop of tanh runs over them; the answer is a sum of each row's own
    numbers and a millionth of that. Nothing of it is shared between rows.

    Returns:
        What a row takes, measured again, in seconds.
    """
    tried_s = _row_s(_slow(_ROUNDS_TRIED))
    rounds = max(1, round(_ROUNDS_TRIED * row_s / tried_s))
    model = _slow(rounds)
    _write(repository, SLOW, model)
    return _row_s(model)


def write_tiny(repository: Path) -> None:
    """Write a small MLP: what a request costs is the server's doing."""
    rng = np.random.default_rng(16)
    nodes, constants, source = [], [], "x"
    sizes = [WIDTH, 32, 16, 1]
    for layer, shape in enumerate(pairwise(sizes)):
        weights = rng.standard_normal(shape).astype(np.float32) / 4
        constants.append(numpy_helper.from_array(weights, f"w{layer}"))
        is_last = layer == len(sizes) - 2
        target = "y" if is_last else f"h{layer}"
        nodes.append(helper.make_node("MatMul", [source, f"w{layer}"], [target]))
        if not is_last:
            source = f"r{layer}"
            nodes.append(helper.make_node("Relu", [target], [source]))
    _write(repository, TINY, _model(nodes, constants))


def requests(model: str) -> list[bytes]:
    """Return messages of one row each, no two alike."""
    messages = []
    for row in _rows():
        message = service_pb2.ModelInferRequest(model_name=model)
        message.inputs.add(name="x", datatype="FP32", shape=[1, WIDTH])
        message.raw_input_contents.append(row.tobytes())
        messages.append(bytes(message.SerializeToString()))
    return messages


def answers(repository: Path, model: str) -> list[bytes]:
    """Return the raw output that each of the requests must get: the model's, without a server."""
    session = _session(str(repository / model / "1" / "model.onnx"))
    return [session.run(None, {"x": row[None]})[0].tobytes() for row in _rows()]


def _rows() -> np.ndarray:
    return np.random.default_rng(18).standard_normal((BODIES, WIDTH)).astype(np.float32)


def _slow(rounds: int) -> onnx.ModelProto:
    rng = np.random.default_rng(17)
    own = rng.standard_normal((WIDTH, 1)).astype(np.float32)
    widen = rng.standard_normal((WIDTH, _WIDE)).astype(np.float32) / 4
    value = helper.make_tensor_value_info
    body = helper.make_graph(
        [
            helper.make_node("Tanh", ["state"], ["bent"]),
            helper.make_node("Identity", ["is_on"], ["goes_on"]),
        ],
        "round",
        [
            value("number", TensorProto.INT64, []),
            value("is_on", TensorProto.BOOL, []),
            value("state", TensorProto.FLOAT, None),
        ],
        [value("goes_on", TensorProto.BOOL, []), value("bent", TensorProto.FLOAT, None)],
    )
    nodes = [
        helper.make_node("MatMul", ["x", "widen"], ["wide"]),
        helper.make_node("Loop", ["rounds", "", "wide"], ["worked"], body=body),
        helper.make_node("ReduceMean", ["worked"], ["mean"], axes=[1], keepdims=1),
        helper.make_node("Mul", ["mean", "little"], ["trace"]),
        helper.make_node("MatMul", ["x", "own"], ["sum"]),
        helper.make_node("Add", ["sum", "trace"], ["y"]),
    ]
    constants = {
        "own": own,
        "widen": widen,
        "rounds": np.array(rounds, np.int64),
        "little": np.array(1e-6, np.float32),
    }
    return _model(nodes, [numpy_helper.from_array(one, name) for name, one in constants.items()])


def _model(nodes: list[onnx.NodeProto], constants: list[onnx.TensorProto]) -> onnx.ModelProto:
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "overload",
        [value("x", TensorProto.FLOAT, ["n", WIDTH])],
        [value("y", TensorProto.FLOAT, ["n", 1])],
        constants,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def _write(repository: Path, name: str, model: onnx.ModelProto) -> None:
    folder = repository / name / "1"
    folder.mkdir(parents=True)
    onnx.save(model, folder / "model.onnx")
    (repository / name / "config.pbtxt").write_text(CONFIGS[name])


def _row_s(model: onnx.ModelProto) -> float:
    """Return the processor time of a row in a batch of four: what others use does not count."""
    session = _session(model.SerializeToString())
    rows = _rows()[:4]
    took_s = []
    for _ in range(5):
        start_s = time.thread_time()
        session.run(None, {"x": rows})
        took_s.append((time.thread_time() - start_s) / len(rows))
    return min(took_s)


def _session(model: str | bytes) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
