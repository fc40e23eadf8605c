"""The command as an operator meets it: start, refusals to start, signals, exit codes."""

import json
import signal
import socket
import subprocess
import sys
import threading
import time

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc


def command(*arguments):
    return [sys.executable, "-m", "headrace", "serve", *map(str, arguments)]


def start(*arguments):
    return subprocess.Popen(
        command("--grpc-address", "127.0.0.1:0", "--http-address", "127.0.0.1:0", *arguments),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def serving(process):
    line = process.stdout.readline()
    assert line, process.stderr.read()
    return json.loads(line)


def end(process):
    if process.poll() is None:
        process.kill()
    process.communicate(timeout=20)


@pytest.fixture(params=["completion-queue", "threads"])
def server(request, model_repository):
    process = start(
        *("--model-repository", model_repository, "--ingress", request.param),
        *("--drain-delay-s", 0.3),
    )
    yield process
    end(process)


def row():
    message = service_pb2.ModelInferRequest(model_name="scores")
    message.inputs.add(name="x", datatype="FP32", shape=[1, 4])
    message.raw_input_contents.append(np.ones(4, np.float32).tobytes())
    return message


def test_sigterm_loses_no_request_and_refuses_politely(server):
    address = serving(server)["grpc_address"]
    codes, failures = [], []

    def call_until_refused():
        with grpc.insecure_channel(address) as channel:
            stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            while True:
                try:
                    stub.ModelInfer(row(), timeout=10)
                    codes.append(grpc.StatusCode.OK)
                except grpc.RpcError as error:
                    failures.append((error.code(), error.details()))
                    return

    callers = [threading.Thread(target=call_until_refused) for _ in range(8)]
    for caller in callers:
        caller.start()
    while len(codes) < 100:
        assert not failures
        time.sleep(0.001)
    server.send_signal(signal.SIGTERM)
    for caller in callers:
        caller.join(20)

    assert server.wait(20) == 0
    assert len(failures) == 8
    assert {code for code, _ in failures} == {grpc.StatusCode.UNAVAILABLE}


def test_health_says_not_serving_before_requests_are_refused(server):
    address = serving(server)["grpc_address"]
    with grpc.insecure_channel(address) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        server.send_signal(signal.SIGTERM)
        assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING

        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        assert stub.ModelInfer(row(), timeout=5).model_name == "scores"

    assert server.wait(20) == 0


def test_an_allowed_caller_changes_what_is_logged_while_it_runs(tmp_path):
    process = start(
        *("--model-repository", tmp_path, "--workers", 1, "--drain-delay-s", 0),
        *("--log-level", "error", "--allow-log-settings"),
    )
    try:
        client = triton.InferenceServerClient(serving(process)["grpc_address"])
        client.update_log_settings({"log_verbose_level": 1, "log_error": True})
        told = client.get_log_settings(as_json=True)["settings"]
        process.send_signal(signal.SIGTERM)
        _, log = process.communicate(timeout=20)
        client.close()
    finally:
        process.kill()

    assert told == {
        "log_info": {"bool_param": True},
        "log_warning": {"bool_param": True},
        "log_error": {"bool_param": True},
        "log_verbose_level": {"uint32_param": 1},
    }
    assert '"started"' not in log
    assert "log_level_changed" in log
    assert "draining_started" in log


def test_a_second_signal_ends_it_at_once(model_repository):
    process = start("--model-repository", model_repository, "--drain-delay-s", 600)
    try:
        address = serving(process)["grpc_address"]
        with grpc.insecure_channel(address) as channel:
            watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
            next(watch)
            process.send_signal(signal.SIGTERM)
            next(watch)  # draining
            process.send_signal(signal.SIGTERM)

            assert process.wait(10) == -signal.SIGTERM
    finally:
        end(process)


def test_a_model_that_cannot_load_does_not_keep_the_others_from_serving(server):
    address = serving(server)["grpc_address"]
    with grpc.insecure_channel(address) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        assert stub.ModelInfer(row(), timeout=5).model_name == "scores"
        assert not stub.ModelReady(service_pb2.ModelReadyRequest(name="corrupt"), timeout=5).ready
    server.send_signal(signal.SIGTERM)
    _, log = server.communicate(timeout=20)

    failed = [json.loads(line) for line in log.splitlines() if "model_load_failed" in line]
    assert {"corrupt", "unparsable", "empty", "driver_score"} <= {line["model"] for line in failed}
    assert all(line["reason"] for line in failed)


@pytest.fixture
def taken_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        yield taken.getsockname()[1]


def refusal(*arguments):
    done = subprocess.run(
        command(*arguments), capture_output=True, text=True, timeout=60, check=False
    )
    lines = [line for line in done.stderr.splitlines() if not line.startswith("{")]
    assert done.returncode == 2, done.stderr
    assert len(lines) == 1, done.stderr
    assert not done.stdout
    return lines[0]


def test_a_taken_grpc_port_is_refused(model_repository, taken_port):
    line = refusal(
        *("--model-repository", model_repository, "--grpc-address", f"127.0.0.1:{taken_port}")
    )

    assert f"--grpc-address 127.0.0.1:{taken_port}: Address already in use" in line


def test_a_taken_http_port_is_refused(model_repository, taken_port):
    line = refusal(
        *("--model-repository", model_repository, "--grpc-address", "127.0.0.1:0"),
        *("--http-address", f"127.0.0.1:{taken_port}"),
    )

    assert f"--http-address 127.0.0.1:{taken_port}: Address already in use" in line


def test_a_missing_model_repository_is_refused(tmp_path):
    assert "does not exist" in refusal("--model-repository", tmp_path / "none")


def test_a_missing_feature_repo_is_refused(model_repository, tmp_path):
    line = refusal("--model-repository", model_repository, "--feature-repo", tmp_path / "none")

    assert "none" in line


def test_an_unreadable_registry_is_refused(model_repository, tmp_path):
    (tmp_path / "feature_store.yaml").write_text(
        "project: p\nprovider: local\nregistry: registry.db\n"
        "online_store: {type: sqlite, path: online.db}\nentity_key_serialization_version: 3\n"
    )
    (tmp_path / "registry.db").write_bytes(b"\xff not a registry")

    line = refusal("--model-repository", model_repository, "--feature-repo", tmp_path)

    assert "registry" in line


def test_all_wrong_settings_are_named_at_once():
    line = refusal("--grpc-address", "nowhere", "--max-entities", "0")

    for flag in ("--model-repository", "--grpc-address", "--max-entities"):
        assert flag in line


def test_an_unknown_key_in_the_settings_file_is_refused(tmp_path):
    (tmp_path / "headrace.toml").write_text('model_repository = "."\ncolour = "red"\n')

    assert "colour" in refusal("--config", tmp_path / "headrace.toml")
