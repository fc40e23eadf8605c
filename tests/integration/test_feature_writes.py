"""Writes through Feast: refused unless the operator allows them, and then read back at once."""

from datetime import UTC, datetime

import grpc
import pytest
from feast.protos.feast.serving import GrpcServer_pb2 as pb
from feast.protos.feast.serving.GrpcServer_pb2_grpc import GrpcFeatureServerStub
from feast.protos.feast.serving.ServingService_pb2 import GetOnlineFeaturesRequest
from feast.protos.feast.types.Value_pb2 import Value

from headrace.app import Gateway
from headrace.settings import load_settings


@pytest.fixture(scope="module")
def writing(feature_repo, tmp_path_factory):
    gateway = Gateway(
        load_settings(
            {
                "model_repository": tmp_path_factory.mktemp("no models"),
                "feature_repo": feature_repo,
                "grpc_address": "127.0.0.1:0",
                "http_address": "127.0.0.1:0",
                "allow_feature_writes": True,
            }
        )
    )
    gateway.start()
    with grpc.insecure_channel(gateway.grpc_address) as channel:
        yield GrpcFeatureServerStub(channel)
    assert gateway.stop(), "requests were cut off"


def row(driver, rating, view="stats"):
    request = pb.WriteToOnlineStoreRequest(feature_view_name=view)
    request.typed_features["driver_id"].int64_val = driver
    request.typed_features["rating"].float_val = rating
    request.typed_features["trips"].float_val = 1
    request.typed_features["event_timestamp"].unix_timestamp_val = int(
        datetime.now(UTC).timestamp()
    )
    return request


def refused(call, request):
    with pytest.raises(grpc.RpcError) as refusal:
        call(request, timeout=20)
    return refusal.value.code().name, refusal.value.details()


@pytest.mark.parametrize(
    ("method", "request_"),
    [
        ("Push", pb.PushRequest(stream_feature_view="stats", to="online")),
        ("WriteToOnlineStore", row(77, 1.0)),
    ],
)
def test_a_readers_port_is_no_writers(gateway, method, request_):
    with grpc.insecure_channel(gateway.grpc_address) as channel:
        code, details = refused(getattr(GrpcFeatureServerStub(channel), method), request_)

    assert code == "PERMISSION_DENIED"
    assert "--allow-feature-writes" in details


def test_what_is_written_is_read(writing):
    assert writing.WriteToOnlineStore(row(77, 3.5), timeout=30).status
    request = GetOnlineFeaturesRequest(feature_service="driver_features")
    request.entities["driver_id"].val.append(Value(int64_val=77))

    reply = writing.GetOnlineFeatures(request, timeout=5)

    values = dict(zip(reply.metadata.feature_names.val, reply.results, strict=True))
    assert values["rating"].values[0].float_val == 3.5


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (pb.PushRequest(stream_feature_view="none", to="online"), "no push source 'none'"),
        (pb.PushRequest(stream_feature_view="none", to="nowhere"), "expected online, offline"),
    ],
)
def test_a_push_that_goes_nowhere_is_refused(writing, request_, words):
    request_.typed_features["driver_id"].int64_val = 1

    code, details = refused(writing.Push, request_)

    assert code == "INVALID_ARGUMENT"
    assert words in details


def test_a_row_that_feast_refuses_is_the_callers_mistake(writing):
    code, _ = refused(writing.WriteToOnlineStore, row(77, 1.0, view="none"))
    assert code == "INVALID_ARGUMENT"
    request = row(77, 1.0)
    request.features["driver_id"] = "1"
    assert "both set" in refused(writing.WriteToOnlineStore, request)[1]
