"""What ONNX Runtime in process promises beyond the contract of a backend."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from structlog.testing import capture_logs

from headrace.backends.onnx_runtime import load_onnx
from headrace.errors import BackendError, InvalidTensor, ModelLoadError
from headrace.repository.config import ModelConfig
from headrace.tensors import TensorSpec

CONFIG = ModelConfig("m")
WEIGHTS = np.arange(300, dtype=np.float32)


def tensor(name, data_type=TensorProto.FLOAT, shape=("n", 300)):
    return helper.make_tensor_value_info(name, data_type, shape)


def save(folder, nodes, inputs, outputs, initializers=(), sparse=(), opset=17):
    graph = helper.make_graph(
        nodes, "g", inputs, outputs, initializers, sparse_initializer=list(sparse)
    )
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("ai.onnx.ml", 3)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def identity(folder, data_type, shape=("n", 3)):
    return save(
        folder,
        [helper.make_node("Identity", ["x"], ["y"])],
        [tensor("x", data_type, shape)],
        [tensor("y", data_type, shape)],
    )


def external(location):
    weights = TensorProto(
        name="w", data_type=TensorProto.FLOAT, dims=[300], data_location=TensorProto.EXTERNAL
    )
    for key, value in (("location", location), ("offset", "0"), ("length", "1200")):
        weights.external_data.add(key=key, value=value)
    return weights


def sparse(location):
    indices = helper.make_tensor("i", TensorProto.INT64, [300], list(range(300)))
    return onnx.SparseTensorProto(values=external(location), indices=indices, dims=[300])


def save_external(folder, kind, location):
    """An adder whose weights lie in another file, said in one of four ways."""
    add = helper.make_node("Add", ["x", "w"], ["y"])
    io = ([tensor("x")], [tensor("y")])
    if kind == "initializer":
        return save(folder, [add], *io, initializers=[external(location)])
    if kind == "sparse initializer":
        return save(folder, [add], *io, sparse=[sparse(location)])
    value = {"value": external(location)}
    if kind == "sparse constant":
        value = {"sparse_value": sparse(location)}
    return save(folder, [helper.make_node("Constant", [], ["w"], **value), add], *io)


KINDS = ["initializer", "constant", "sparse initializer", "sparse constant"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("location", ["w.bin", "weights/w.bin"])
def test_weights_beside_the_model_are_read(tmp_path, kind, location):
    path = save_external(tmp_path / "1", kind, location)
    (path.parent / location).parent.mkdir(exist_ok=True)
    (path.parent / location).write_bytes(WEIGHTS.tobytes())
    (y,) = load_onnx(path, CONFIG).infer({"x": np.zeros((1, 300), np.float32)})
    assert y.tolist() == [WEIGHTS.tolist()]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "location", ["../secret", "a/../../secret", "absolute", "link", "folder/secret", "/dev/zero"]
)
def test_weights_outside_the_models_folder_are_refused(tmp_path, kind, location):
    folder = tmp_path / "1"
    (folder / "a").mkdir(parents=True)
    (tmp_path / "secret").write_bytes(WEIGHTS.tobytes())
    (folder / "link").symlink_to("../secret")
    (folder / "folder").symlink_to("..")
    if location == "absolute":
        location = str(tmp_path / "secret")
    path = save_external(folder, kind, location)
    with pytest.raises(ModelLoadError):
        load_onnx(path, CONFIG)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_at_an_address_in_memory_are_refused(tmp_path, kind):
    path = save_external(tmp_path, kind, "*/_ORT_MEM_ADDR_/*")
    with pytest.raises(ModelLoadError):
        load_onnx(path, CONFIG)


@pytest.mark.parametrize(
    ("data", "kind"),
    [(b"", "InvalidArgument"), (b"\x00\x01 not a model", "InvalidProtobuf"), (None, "NoSuchFile")],
)
def test_a_file_that_is_no_model_is_refused_without_its_path(tmp_path, capfd, data, kind):
    path = tmp_path / "model.onnx"
    if data is not None:
        path.write_bytes(data)
    with capture_logs() as logs, pytest.raises(ModelLoadError) as refused:
        load_onnx(path, CONFIG)
    assert str(refused.value) == f"model.onnx: ONNX Runtime cannot load it ({kind})"
    assert [entry["event"] for entry in logs] == ["onnx_runtime_load_failed"]
    assert capfd.readouterr() == ("", "")  # ONNX Runtime would print the path here


def test_an_operator_from_elsewhere_is_refused(tmp_path):
    node = helper.make_node("Exfiltrate", ["x"], ["y"], domain="com.example")
    path = save(tmp_path, [node], [tensor("x")], [tensor("y")])
    with pytest.raises(ModelLoadError):
        load_onnx(path, CONFIG)


@pytest.mark.parametrize(
    ("data_type", "shown"), [("BFLOAT16", "bfloat16"), ("FLOAT8E4M3FN", "float8e4m3fn")]
)
def test_a_datatype_that_no_request_can_carry_is_refused(tmp_path, data_type, shown):
    node = helper.make_node("Cast", ["x"], ["y"], to=TensorProto.FLOAT)
    kind = getattr(TensorProto, data_type)
    inputs, outputs = [tensor("x", kind)], [tensor("y")]
    path = save(tmp_path, [node], inputs, outputs, opset=19)
    with pytest.raises(ModelLoadError) as refused:
        load_onnx(path, CONFIG)
    assert str(refused.value).startswith(
        f"input 'x' of the model is tensor({shown}); expected one of tensor(bool), "
    )


@pytest.fixture
def with_a_map(tmp_path):
    """A classifier's usual shape: a plain output beside a list of maps."""
    nodes = [
        helper.make_node("Identity", ["x"], ["y"]),
        helper.make_node("ZipMap", ["x"], ["maps"], domain="ai.onnx.ml", classlabels_int64s=[0, 1]),
    ]
    mapped = helper.make_map_type_proto(
        TensorProto.INT64, helper.make_tensor_type_proto(TensorProto.FLOAT, [])
    )
    maps = helper.make_value_info("maps", helper.make_sequence_type_proto(mapped))
    return save(tmp_path, nodes, [tensor("x", shape=("n", 2))], [tensor("y", shape=("n", 2)), maps])


def test_an_output_that_no_reply_can_carry_is_refused(with_a_map):
    with pytest.raises(ModelLoadError, match=r"output 'maps' of the model is seq\(map"):
        load_onnx(with_a_map, CONFIG)


def test_an_output_that_the_configuration_leaves_out_may_be_of_any_type(with_a_map):
    y = TensorSpec("y", "FP32", (-1, 2))
    backend = load_onnx(with_a_map, replace(CONFIG, outputs=(y,)))
    assert backend.outputs == (y,)
    assert len(backend.infer({"x": np.zeros((1, 2), np.float32)})) == 1


def test_text_is_text_and_not_its_python_form(tmp_path):
    backend = load_onnx(identity(tmp_path, TensorProto.STRING), CONFIG)
    (y,) = backend.infer({"x": np.array([[b"a", "é".encode(), b"n\x00ul"]], object)})
    assert y.tolist() == [["a", "é", "n\x00ul"]]


def test_bytes_that_are_no_text_are_the_callers_mistake(tmp_path):
    backend = load_onnx(identity(tmp_path, TensorProto.STRING), CONFIG)
    with pytest.raises(InvalidTensor) as refused:
        backend.infer({"x": np.array([[b"a", b"\xff", b"c"]], object)})
    assert str(refused.value) == "input 'x' for model 'm' has BYTES elements that are not UTF-8"


def test_a_failure_is_logged_with_its_cause_and_printed_nowhere(tmp_path, capfd):
    backend = load_onnx(identity(tmp_path, TensorProto.FLOAT), CONFIG)
    with capture_logs() as logs, pytest.raises(BackendError):
        backend.infer({"x": np.zeros((1, 4), np.float32)})
    (entry,) = logs
    assert (entry["event"], entry["model"]) == ("onnx_runtime_failed", "m")
    assert "Got: 4 Expected: 3" in entry["error"]
    assert capfd.readouterr() == ("", "")


def test_failures_do_not_flood_the_log(tmp_path):
    backend = load_onnx(identity(tmp_path, TensorProto.FLOAT), CONFIG)
    with capture_logs() as logs:
        for _ in range(100):
            with pytest.raises(BackendError):
                backend.infer({"x": np.zeros((1, 4), np.float32)})
    assert 1 <= len(logs) < 10


def test_an_unnamed_dimension_is_variable(tmp_path):
    backend = load_onnx(identity(tmp_path, TensorProto.FLOAT, (None, "rows", 2)), CONFIG)
    assert backend.inputs == (TensorSpec("x", "FP32", (-1, -1, 2)),)


def threads():
    return len(list(Path("/proc/self/task").iterdir()))


def threads_while(folder, config):
    before = threads()
    backend = load_onnx(identity(folder, TensorProto.FLOAT), config)
    started = threads() - before
    backend.close()
    return started


def test_a_model_starts_no_thread_unless_told(tmp_path):
    assert threads_while(tmp_path, CONFIG) == 0


def test_thread_counts_are_honoured(tmp_path):
    config = replace(
        CONFIG, intra_op_thread_count=3, inter_op_thread_count=2, execution_mode="parallel"
    )
    assert threads_while(tmp_path, config) == 2 + 1  # the caller's own is one of each
