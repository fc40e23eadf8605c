"""A model that runs on another server: here, on another Headrace."""

import json
import socket
import subprocess
import sys
import threading
import time

import grpc
import numpy as np
import onnx
import pytest
import tritonclient.grpc as triton
from onnx import TensorProto, helper

from headrace.app import Gateway
from headrace.repository import manager
from headrace.settings import load_settings


def gateway(root, port=0, **settings):
    gateway = Gateway(
        load_settings(
            {
                "model_repository": root,
                "grpc_address": f"127.0.0.1:{port}",
                "http_address": "127.0.0.1:0",
                "settle_s": 0.2,
                **settings,
            }
        )
    )
    gateway.start()
    return gateway


@pytest.fixture
def far_root(tmp_path):
    """`double` on the far server takes 4 rows of 2 numbers at once."""
    folder = tmp_path / "far" / "double" / "1"
    folder.mkdir(parents=True)
    sides = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 2]) for name in "xy"]
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "x"], ["y"])], "g", sides[:1], sides[1:]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, folder / "model.onnx")
    (folder.parent / "config.pbtxt").write_text("max_batch_size: 4")
    return tmp_path / "far"


@pytest.fixture
def far_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def near_root(tmp_path, port, more="", timeout_s=10):
    (tmp_path / "near" / "double" / "1").mkdir(parents=True)
    (tmp_path / "near" / "double" / "config.pbtxt").write_text(
        f"""
        backend: "oip"
        parameters {{ key: "oip_address" value {{ string_value: "127.0.0.1:{port}" }} }}
        parameters {{ key: "oip_timeout_s" value {{ string_value: "{timeout_s}" }} }}
        {more}
        """
    )
    return tmp_path / "near"


def ask(server, rows=1, timeout_s=10):
    with triton.InferenceServerClient(server.grpc_address) as client:
        given = triton.InferInput("x", [rows, 2], "FP32")
        given.set_data_from_numpy(np.arange(2 * rows, dtype=np.float32).reshape(rows, 2))
        return client.infer("double", [given], client_timeout=timeout_s).as_numpy("y")


def until(condition, timeout_s=20.0):
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "it did not happen"
        time.sleep(0.01)


def answers(server):
    try:
        ask(server, timeout_s=2)
    except triton.InferenceServerException:
        return False
    return True


def test_signature_batch_size_and_answers_are_those_of_the_far_server(far_root, tmp_path):
    far = gateway(far_root)
    near = gateway(near_root(tmp_path, far.grpc.port))
    try:
        with triton.InferenceServerClient(near.grpc_address) as client:
            metadata = client.get_model_metadata("double")
            config = client.get_model_config("double").config
        assert [(t.name, t.datatype, list(t.shape)) for t in metadata.inputs] == [
            ("x", "FP32", [-1, 2])
        ]
        assert (config.backend, config.max_batch_size) == ("oip", 4)
        np.testing.assert_array_equal(ask(near, 3), 2 * np.arange(6.0).reshape(3, 2))
        with pytest.raises(triton.InferenceServerException, match="batch-size must be <= 4"):
            ask(near, 5)
    finally:
        assert near.stop()
        assert far.stop()


def test_a_far_server_that_comes_later_is_found(far_root, tmp_path, far_port, monkeypatch):
    monkeypatch.setattr(manager, "RETRY_S", 0.3)
    near = gateway(near_root(tmp_path, far_port))
    far = None
    try:
        entry = near.catalog.entries["double"]
        assert not entry.versions
        assert entry.failures == {1: "the model's server does not answer"}

        far = gateway(far_root, far_port)

        until(lambda: near.catalog.is_ready("double"))
        assert answers(near)
        assert near.catalog.entries["double"].failures == {}
    finally:
        assert near.stop()
        if far is not None:
            assert far.stop()


def test_without_polling_a_far_server_is_asked_for_when_a_caller_says_so(
    far_root, tmp_path, far_port
):
    near = gateway(near_root(tmp_path, far_port), model_control_mode="explicit")
    far = None
    try:
        with triton.InferenceServerClient(near.grpc_address) as client:
            with pytest.raises(triton.InferenceServerException, match="does not answer"):
                client.load_model("double")
            assert near.repository._until_next_look_s() >= 1  # nothing to look for meanwhile

            far = gateway(far_root, far_port)
            client.load_model("double")
        assert answers(near)
    finally:
        assert near.stop()
        if far is not None:
            assert far.stop()


def test_a_far_server_that_goes_away_is_unavailable_until_it_is_back(far_root, tmp_path, far_port):
    far = gateway(far_root, far_port)
    near = gateway(near_root(tmp_path, far_port))
    try:
        assert answers(near)
        assert far.stop()

        start_s = time.monotonic()
        with pytest.raises(triton.InferenceServerException) as refused:
            ask(near)
        assert refused.value.status() == "StatusCode.UNAVAILABLE"
        assert refused.value.message() == "the server of model 'double' does not answer"
        assert time.monotonic() - start_s < 3

        far = gateway(far_root, far_port)
        until(lambda: answers(near))
    finally:
        assert near.stop()
        far.stop()


def test_a_far_server_that_hangs_costs_a_caller_no_more_than_its_deadline(far_root, tmp_path):
    far = gateway(far_root)
    near = gateway(near_root(tmp_path, far.grpc.port))
    try:
        assert answers(near)
        model = far.catalog.find("double", "")
        real = model._backend.infer

        def slow(inputs, timeout_s=None):
            time.sleep(2)
            return real(inputs, timeout_s)

        model._backend.infer = slow
        start_s = time.monotonic()
        with pytest.raises(triton.InferenceServerException) as late:
            ask(near, timeout_s=0.3)
        assert late.value.status() == "StatusCode.DEADLINE_EXCEEDED"
        model._backend.infer = real
        # The executor was not kept for longer than anybody waited.
        assert answers(near)
        assert time.monotonic() - start_s < 5
    finally:
        assert near.stop()
        assert far.stop()


def test_a_far_server_that_hangs_for_its_own_limit_does_not_answer(far_root, tmp_path):
    far = gateway(far_root)
    near = gateway(near_root(tmp_path, far.grpc.port, timeout_s=0.3))
    try:
        assert answers(near)
        model = far.catalog.find("double", "")
        real, goes_on = model._backend.infer, threading.Event()

        def hang(inputs):
            goes_on.wait(30)
            return real(inputs)

        model._backend.infer = hang
        with pytest.raises(triton.InferenceServerException) as hung:
            ask(near, timeout_s=20)
        goes_on.set()

        assert hung.value.status() == "StatusCode.UNAVAILABLE"  # its caller has time left
    finally:
        assert near.stop()
        assert far.stop()


OTHER_SIGNATURE = """
    max_batch_size: 4
    input { name: "x" data_type: TYPE_FP32 dims: 3 }
    output { name: "y" data_type: TYPE_FP32 dims: 2 }
"""


def parameter(key, value):
    return f'parameters {{ key: "{key}" value {{ string_value: "{value}" }} }}'


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (parameter("oip_model", "nobody"), "does not have it"),
        (OTHER_SIGNATURE, "x"),
        (parameter("oip_tls_root_certificates", "ca.pem"), "ca.pem"),
    ],
    ids=["no such model there", "another signature", "no certificates"],
)
def test_what_does_not_fit_is_not_served_and_says_why(far_root, tmp_path, more, reason):
    far = gateway(far_root)
    near = gateway(near_root(tmp_path, far.grpc.port, more))
    try:
        entry = near.catalog.entries["double"]
        assert not entry.versions
        assert reason in entry.failures[1]
    finally:
        assert near.stop()
        assert far.stop()


def test_verify_asks_the_far_server(far_root, tmp_path):
    far = gateway(far_root)
    root = near_root(tmp_path, far.grpc.port)
    (tmp_path / "near" / "bare" / "1").mkdir(parents=True)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "headrace", "models", "verify", str(root), "--json"],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    finally:
        assert far.stop()

    found = {line["model"]: (line["state"], line["reason"]) for line in json.loads(done.stdout)}
    assert found == {
        "double": ("READY", ""),
        "bare": ("UNAVAILABLE", "model.onnx is missing"),
    }
    assert done.returncode == 1


def test_a_model_without_a_file_and_without_a_far_server_is_refused(tmp_path):
    (tmp_path / "m" / "1").mkdir(parents=True)
    near = gateway(tmp_path)
    try:
        assert near.catalog.entries["m"].failures == {1: "model.onnx is missing"}
        with (
            grpc.insecure_channel(near.grpc_address) as _,
            triton.InferenceServerClient(near.grpc_address) as client,
        ):
            assert not client.is_model_ready("m")
    finally:
        assert near.stop()
