"""A model is checked where it can do no harm."""

import os
import time

import onnx
import pytest
import structlog
from onnx import TensorProto, helper

from headrace.errors import ModelLoadError
from headrace.repository import sandbox
from headrace.repository.sandbox import OnnxChecker


def identity(**changes):
    sides = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n"]) for name in ("x", "y")]
    node = helper.make_node(changes.get("op", "Identity"), ["x"], ["y"])
    graph = helper.make_graph([node], "g", sides[:1], sides[1:], changes.get("constants", []))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.fixture
def checker():
    with OnnxChecker() as checker:
        yield checker


def test_a_valid_model_passes_and_one_process_serves_for_many(checker, tmp_path):
    onnx.save(identity(), tmp_path / "model.onnx")

    checker.check(tmp_path / "model.onnx")
    process = checker._process
    checker.check(tmp_path / "model.onnx")

    assert checker._process is process


def outside_weights(tmp_path):
    (tmp_path / "weights.bin").write_bytes(bytes(4))
    tensor = onnx.TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[1])
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../weights.bin")
    return identity(constants=[tensor]).SerializeToString()


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(lambda _: b"no model at all", id="no model"),
        pytest.param(lambda _: identity().SerializeToString()[:-5], id="cut off"),
        pytest.param(lambda _: identity(op="NoSuchOp").SerializeToString(), id="unknown operator"),
        pytest.param(outside_weights, id="weights outside its folder"),
    ],
)
def test_what_is_no_model_is_refused_and_the_next_is_checked(checker, tmp_path, data):
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "model.onnx").write_bytes(data(tmp_path))
    onnx.save(identity(), tmp_path / "good.onnx")

    with structlog.testing.capture_logs(), pytest.raises(ModelLoadError) as refused:
        checker.check(tmp_path / "1" / "model.onnx")
    checker.check(tmp_path / "good.onnx")

    assert str(refused.value).startswith("model.onnx: the ONNX checker refuses it (")
    assert str(tmp_path) not in str(refused.value)


def test_a_check_that_takes_too_long_is_ended_and_the_next_goes_on(tmp_path, monkeypatch):
    onnx.save(identity(), tmp_path / "model.onnx")
    os.mkfifo(tmp_path / "endless.onnx")  # opening it waits for a writer who never comes
    with OnnxChecker(timeout_s=2) as checker:
        start_s = time.monotonic()
        with pytest.raises(ModelLoadError, match="gave up"):
            checker.check(tmp_path / "endless.onnx")
        assert time.monotonic() - start_s < 5

        checker.check(tmp_path / "model.onnx")


def test_a_checker_that_dies_takes_only_its_model(checker, tmp_path):
    onnx.save(identity(), tmp_path / "model.onnx")
    checker.check(tmp_path / "model.onnx")
    checker._process.kill()
    checker._process.wait()

    with structlog.testing.capture_logs(), pytest.raises(ModelLoadError, match="gave up"):
        checker.check(tmp_path / "model.onnx")
    checker.check(tmp_path / "model.onnx")


def test_the_process_ends_with_the_checker(tmp_path):
    onnx.save(identity(), tmp_path / "model.onnx")
    checker = OnnxChecker()
    checker.check(tmp_path / "model.onnx")
    process = checker._process

    checker.close()

    assert process.poll() is not None


def test_the_checker_inherits_no_secrets(tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    onnx.save(identity(), tmp_path / "model.onnx")
    with OnnxChecker() as checker:
        checker.check(tmp_path / "model.onnx")
        environment = (sandbox.Path("/proc") / str(checker._process.pid) / "environ").read_text()

    assert "secret" not in environment
