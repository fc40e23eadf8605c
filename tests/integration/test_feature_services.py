"""Features without a model: Headrace's own service, and Feast's under both of its names."""

import grpc
import numpy as np
import pytest
from feast import FeatureStore
from feast.protos.feast.serving import GrpcServer_pb2_grpc, ServingService_pb2_grpc
from feast.protos.feast.serving import ServingService_pb2 as feast_pb
from feast.protos.feast.types import Value_pb2

from headrace.v1 import feature_service_pb2 as pb
from headrace.v1 import feature_service_pb2_grpc as pb_grpc

PRESENT, NULL, NOT_FOUND, OUTSIDE = 1, 2, 3, 4
INVALID = grpc.StatusCode.INVALID_ARGUMENT
DRIVERS = [1, 2, 3, 4, 5]


@pytest.fixture
def channel(gateway):
    with grpc.insecure_channel(gateway.grpc_address) as channel:
        yield channel


@pytest.fixture(params=["feast.serving.ServingService", "GrpcFeatureServer"])
def feast_ask(request, channel):
    if request.param == "GrpcFeatureServer":
        return GrpcServer_pb2_grpc.GrpcFeatureServerStub(channel).GetOnlineFeatures
    return ServingService_pb2_grpc.ServingServiceStub(channel).GetOnlineFeatures


@pytest.fixture
def ask(channel):
    return pb_grpc.FeatureServiceStub(channel).GetOnlineFeatures


def feast_request(ids=DRIVERS, key="driver_id", **fields):
    if "features" not in fields:
        fields.setdefault("feature_service", "driver_features")
    request = feast_pb.GetOnlineFeaturesRequest(**fields)
    request.entities[key].val.extend(Value_pb2.Value(int64_val=i) for i in ids)
    return request


def own_request(ids=DRIVERS, **fields):
    if "features" not in fields:
        fields.setdefault("feature_service", "driver_features")
    request = pb.GetOnlineFeaturesRequest(**fields)
    request.entities.add(name="driver_id").values.int64s.values.extend(ids)
    return request


def refused(call, request):
    with pytest.raises(grpc.RpcError) as refusal:
        call(request, timeout=5)
    return refusal.value.code(), refusal.value.details()


def test_a_feast_client_gets_values_statuses_and_times(feast_ask):
    reply = feast_ask(feast_request(), timeout=5)

    assert list(reply.metadata.feature_names.val) == ["driver_id", "rating", "trips"]
    ids, rating, trips = reply.results
    assert [value.int64_val for value in ids.values] == DRIVERS
    assert list(ids.statuses) == [PRESENT] * 5
    assert [value.float_val for value in trips.values[:3]] == [10, 20, 30]
    assert list(rating.statuses) == [PRESENT, PRESENT, NULL, OUTSIDE, NOT_FOUND]
    assert [value.WhichOneof("val") for value in rating.values] == ["float_val"] * 2 + [None] * 3
    assert all(time.seconds for time in rating.event_timestamps[:4])
    assert not rating.event_timestamps[4].seconds


def test_feasts_own_sdk_says_the_same_of_what_is_there(feast_ask, feature_repo):
    store = FeatureStore(repo_path=str(feature_repo))
    references = ["stats:trips", "stats:rating"]
    rows = {"driver_id": [2, 1, 2]}
    theirs = store.get_online_features(references, rows, full_feature_names=True)
    request = feast_request([2, 1, 2], full_feature_names=True, features={"val": references})

    ours = feast_ask(request, timeout=5)

    names = ["driver_id", "stats__trips", "stats__rating"]
    assert list(ours.metadata.feature_names.val) == names
    vectors = dict(zip(theirs.proto.metadata.feature_names.val, theirs.proto.results, strict=True))
    assert list(ours.results) == [vectors[name] for name in names]


def test_one_row_requests_are_answered_as_long_ones_are(feast_ask):
    whole = feast_ask(feast_request(), timeout=5)
    pending = [feast_ask.future(feast_request([i]), timeout=5) for i in DRIVERS * 20]
    replies = [call.result() for call in pending]

    for i, reply in enumerate(replies):
        row = i % len(DRIVERS)
        for vector, own in zip(whole.results, reply.results, strict=True):
            assert own.values[0] == vector.values[row]
            assert own.statuses[0] == vector.statuses[row]
            assert own.event_timestamps[0] == vector.event_timestamps[row]


def test_the_entitys_name_will_do_for_its_join_key(feast_ask):
    reply = feast_ask(feast_request([2], key="driver"), timeout=5)

    assert reply.metadata.feature_names.val[0] == "driver_id"
    assert reply.results[2].values[0].float_val == 20


def test_an_int32_key_finds_the_int64_entity(feast_ask):
    request = feast_request([])
    request.entities["driver_id"].val.add(int32_val=2)

    assert feast_ask(request, timeout=5).results[2].values[0].float_val == 20


def test_versions_of_views_are_told_when_asked_for(feast_ask):
    request = feast_request([1], include_feature_view_version_metadata=True)

    (view,) = feast_ask(request, timeout=5).metadata.feature_view_metadata

    assert view.name == "stats"


@pytest.mark.parametrize(
    ("fields", "code", "words"),
    [
        ({"feature_service": "other"}, "NOT_FOUND", "there is driver_features"),
        ({"features": {"val": ["stats:other"]}}, "NOT_FOUND", "no feature 'other'"),
        ({"features": {"val": ["other:rating"]}}, "NOT_FOUND", "'other' is no feature view"),
        ({"features": {"val": ["rating"]}}, "INVALID_ARGUMENT", "expected view:feature"),
        ({"features": {"val": ["stats:trips"] * 2}}, "INVALID_ARGUMENT", "there twice"),
        ({"feature_service": ""}, "INVALID_ARGUMENT", "names no feature service"),
        ({"key": "rider_id"}, "INVALID_ARGUMENT", "'driver_id' (INT64) is missing; given 'rider"),
        ({"ids": []}, "INVALID_ARGUMENT", "no entities"),
        ({"ids": range(13)}, "INVALID_ARGUMENT", "13 entities; at most 12"),
    ],
)
def test_a_wrong_request_is_refused_with_the_reason(feast_ask, fields, code, words):
    refusal = refused(feast_ask, feast_request(**fields))

    assert refusal[0].name == code
    assert words in refusal[1]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (Value_pb2.Value(string_val="1"), "STRING in row 1; expected INT64"),
        (Value_pb2.Value(), "null in row 1; expected INT64"),
        (Value_pb2.Value(double_val=1), "DOUBLE in row 1; expected INT64"),
    ],
)
def test_a_key_of_another_type_is_refused_alone(feast_ask, value, words):
    wrong = feast_request([1])
    wrong.entities["driver_id"].val.append(value)
    pending = [feast_ask.future(feast_request([2]), timeout=5) for _ in range(30)]

    code, details = refused(feast_ask, wrong)

    assert code is INVALID
    assert words in details
    assert [call.result().results[2].values[0].float_val for call in pending] == [20] * 30


def test_columns_of_different_lengths_are_refused(feast_ask):
    request = feast_request([1, 2])
    request.entities["other"].val.add(int64_val=1)

    assert "differ in length: 1, 2 rows" in refused(feast_ask, request)[1]


def test_what_is_no_message_is_refused(channel):
    for method in (
        "feast.serving.ServingService",
        "GrpcFeatureServer",
        "headrace.v1.FeatureService",
    ):
        call = channel.unary_unary(f"/{method}/GetOnlineFeatures")
        code, details = refused(call, b"\xff\xff")
        assert code is INVALID
        assert "not a GetOnlineFeaturesRequest" in details


def test_the_serving_info_names_feast(channel):
    from feast import __version__

    stub = ServingService_pb2_grpc.ServingServiceStub(channel)
    info = stub.GetFeastServingInfo(feast_pb.GetFeastServingInfoRequest(), timeout=5)

    assert info.version == __version__


def test_headraces_own_service_answers_in_packed_columns(ask):
    reply = ask(own_request(include_event_times=True), timeout=5)

    rating, trips = reply.features
    assert (rating.name, trips.name) == ("rating", "trips")
    assert list(trips.values.floats.values[:3]) == [10, 20, 30]
    assert list(rating.statuses) == [PRESENT, PRESENT, NULL, OUTSIDE, NOT_FOUND]
    (times,) = reply.event_times
    assert times.view == "stats"
    assert np.isnan(times.event_times_s).tolist() == [False] * 4 + [True]


def test_statuses_are_left_out_where_all_is_present(ask):
    assert [list(of.statuses) for of in ask(own_request([1, 2]), timeout=5).features] == [[], []]


def test_references_are_answered_in_their_order(ask):
    request = own_request([1], features={"references": ["stats:trips", "stats:rating"]})

    assert [of.name for of in ask(request, timeout=5).features] == ["trips", "rating"]


def test_a_hundred_rows_of_fifty_floats_would_be_small(ask, feast_ask):
    ids = [1, 2] * 6
    own, feasts = ask(own_request(ids), timeout=5), feast_ask(feast_request(ids), timeout=5)

    assert own.ByteSize() * 4 < feasts.ByteSize()


def test_health_knows_the_services(channel):
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    check = health_pb2_grpc.HealthStub(channel).Check
    for name in ("feast.serving.ServingService", "GrpcFeatureServer", "headrace.v1.FeatureService"):
        reply = check(health_pb2.HealthCheckRequest(service=name), timeout=5)
        assert reply.status == health_pb2.HealthCheckResponse.SERVING


def test_views_are_counted_by_status_and_age(gateway, ask):
    ask(own_request(), timeout=5)
    ask(own_request(), timeout=5)  # the first is counted after its reply, before the second
    from prometheus_client import generate_latest

    text = generate_latest(gateway.metrics).decode()
    counted = {
        status: float(line.rpartition(" ")[2])
        for line in text.splitlines()
        for status in ("PRESENT", "NULL_VALUE", "NOT_FOUND", "OUTSIDE_MAX_AGE")
        if line.startswith(f'headrace_view_values_total{{status="{status}",view="stats"}}')
    }
    assert min(counted.values()) >= 1
    assert len(counted) == 4
    assert 'headrace_view_age_seconds_bucket{le="604800.0",view="stats"}' in text
    assert "headrace_feature_requests_total" in text
