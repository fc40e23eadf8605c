"""What load balancers, probes and curious people see."""

import urllib.error
import urllib.request

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


@pytest.fixture
def health(gateway):
    with grpc.insecure_channel(gateway.grpc_address) as channel:
        yield health_pb2_grpc.HealthStub(channel)


def ask(health, service):
    return health.Check(health_pb2.HealthCheckRequest(service=service), timeout=5).status


@pytest.mark.parametrize(
    ("service", "status"),
    [
        ("", SERVING),
        ("inference.GRPCInferenceService", SERVING),
        ("headrace.v1.PredictionService", SERVING),
        ("scores", SERVING),
        ("corrupt", NOT_SERVING),
    ],
)
def test_health_knows_the_server_its_services_and_its_models(health, service, status):
    assert ask(health, service) == status


def test_health_does_not_know_strangers(health):
    with pytest.raises(grpc.RpcError) as refused:
        ask(health, "nobody")

    assert refused.value.code() is grpc.StatusCode.NOT_FOUND


def test_a_watcher_is_told_at_once(health):
    watch = health.Watch(health_pb2.HealthCheckRequest(service="scores"), timeout=5)

    assert next(watch).status == SERVING
    watch.cancel()


def test_reflection_names_the_services(gateway):
    with grpc.insecure_channel(gateway.grpc_address) as channel:
        names = set(ProtoReflectionDescriptorDatabase(channel).get_services())

    assert {"inference.GRPCInferenceService", "headrace.v1.PredictionService"} <= names


def get(gateway, path):
    with urllib.request.urlopen(f"http://{gateway.http_address}{path}", timeout=5) as answer:
        return answer.read().decode()


def test_probes_are_answered_over_http(gateway):
    assert get(gateway, "/healthz") == "ok\n"
    assert get(gateway, "/readyz") == "ready\n"


def test_metrics_count_what_was_served(gateway, client):
    import numpy as np
    import tritonclient.grpc as triton

    given = triton.InferInput("x", (3, 4), "FP32")
    given.set_data_from_numpy(np.ones((3, 4), np.float32))
    before = gateway.metrics.model("scores", "1").requests

    client.infer("scores", [given])

    line = f'headrace_requests_total{{model="scores",version="1"}} {before + 1}.0'
    assert line in get(gateway, "/metrics")


def test_other_pages_are_not_found(gateway):
    with pytest.raises(urllib.error.HTTPError) as refused:
        get(gateway, "/etc/passwd")

    assert refused.value.code == 404
    refused.value.close()
