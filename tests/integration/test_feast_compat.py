"""With `--feast-compat` the gateway and `feast listen` answer the same requests identically."""

import socket
import subprocess
import sys
from pathlib import Path

import grpc
import pytest
from feast.protos.feast.serving.GrpcServer_pb2_grpc import GrpcFeatureServerStub
from feast.protos.feast.serving.ServingService_pb2 import GetOnlineFeaturesRequest
from feast.protos.feast.types.Value_pb2 import Value

from headrace.app import Gateway
from headrace.settings import load_settings

START_TIMEOUT_S = 60

REQUESTS = {
    "by service": {"feature_service": "driver_features"},
    "by service, full names": {"feature_service": "driver_features", "full_feature_names": True},
    "by reference": {"features": {"val": ["stats:trips"]}},
    "by references, full names": {
        "features": {"val": ["stats:trips", "stats:rating"]},
        "full_feature_names": True,
    },
}
# Known, known, null, long out of date, never written; and twice the same.
IDS = {"each kind": [1, 2, 3, 4, 5], "one": [2], "repeated": [1, 5, 1, 4, 4]}


@pytest.fixture(scope="module")
def feast_listen(feature_repo):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    feast = Path(sys.executable).with_name("feast")
    process = subprocess.Popen(
        [str(feast), "-c", str(feature_repo), "listen", "--address", f"127.0.0.1:{port}"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            grpc.channel_ready_future(channel).result(START_TIMEOUT_S)
            yield GrpcFeatureServerStub(channel).GetOnlineFeatures
    finally:
        process.terminate()
        process.wait(10)


@pytest.fixture(scope="module")
def compatible(feature_repo, tmp_path_factory):
    gateway = Gateway(
        load_settings(
            {
                "model_repository": tmp_path_factory.mktemp("no models"),
                "feature_repo": feature_repo,
                "grpc_address": "127.0.0.1:0",
                "http_address": "127.0.0.1:0",
                "feast_compat": True,
            }
        )
    )
    gateway.start()
    with grpc.insecure_channel(gateway.grpc_address) as channel:
        yield GrpcFeatureServerStub(channel).GetOnlineFeatures
    assert gateway.stop(), "requests were cut off"


def by_name(reply):
    # Feast's own order is another in each process.
    return dict(zip(reply.metadata.feature_names.val, reply.results, strict=True))


@pytest.mark.parametrize("fields", REQUESTS.values(), ids=REQUESTS)
@pytest.mark.parametrize("ids", IDS.values(), ids=IDS)
def test_both_answer_the_same(feast_listen, compatible, fields, ids):
    request = GetOnlineFeaturesRequest(**fields)
    request.entities["driver_id"].val.extend(Value(int64_val=i) for i in ids)

    ours, theirs = compatible(request, timeout=10), feast_listen(request, timeout=10)

    assert by_name(ours) == by_name(theirs)


def test_a_server_without_models_serves_features(compatible):
    request = GetOnlineFeaturesRequest(feature_service="driver_features")
    request.entities["driver_id"].val.add(int64_val=1)

    assert compatible(request, timeout=10).results
