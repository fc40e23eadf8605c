"""With `--feast-compat` the gateway and `feast listen` answer the same requests identically."""

import os
import socket
import subprocess
import sys
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import grpc
import pandas as pd
import pytest
import ride_views
from feast import Entity, FeatureService, FeatureStore, FeatureView, Field, FileSource
from feast import ValueType as FeastType
from feast.protos.feast.serving.GrpcServer_pb2_grpc import GrpcFeatureServerStub
from feast.protos.feast.serving.ServingService_pb2 import GetOnlineFeaturesRequest
from feast.protos.feast.types.Value_pb2 import Value
from feast.types import Array, Bytes, Int32, String
from ride_repo import NOW, write_ride_repo

from headrace.app import Gateway
from headrace.settings import load_settings

START_TIMEOUT_S = 180
SUPPORT = Path(ride_views.__file__).parent

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


@contextmanager
def feast_listen_at(repo):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    feast = Path(sys.executable).with_name("feast")
    process = subprocess.Popen(
        [str(feast), "-c", str(repo), "listen", "--address", f"127.0.0.1:{port}"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": str(SUPPORT)},  # where its views' code is
    )
    try:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            grpc.channel_ready_future(channel).result(START_TIMEOUT_S)
            yield GrpcFeatureServerStub(channel).GetOnlineFeatures
    finally:
        process.terminate()
        process.wait(10)


@contextmanager
def headrace_at(repo, models, **settings):
    gateway = Gateway(
        load_settings(
            {
                "model_repository": models,
                "feature_repo": repo,
                "grpc_address": "127.0.0.1:0",
                "http_address": "127.0.0.1:0",
                "feast_compat": True,
                **settings,
            }
        )
    )
    gateway.start()
    with grpc.insecure_channel(gateway.grpc_address) as channel:
        yield GrpcFeatureServerStub(channel).GetOnlineFeatures
    assert gateway.stop(), "requests were cut off"


@pytest.fixture(scope="module")
def feast_listen(feature_repo):
    with feast_listen_at(feature_repo) as ask:
        yield ask


@pytest.fixture(scope="module")
def compatible(feature_repo, tmp_path_factory):
    with headrace_at(feature_repo, tmp_path_factory.mktemp("no models")) as ask:
        yield ask


@pytest.fixture(scope="module")
def both_at_rides(tmp_path_factory, valkey):
    """Drivers and riders: text, times, lists, on-demand views, two entities in one service."""
    repo = tmp_path_factory.mktemp("rides")
    write_ride_repo(repo, f"{{type: redis, connection_string: '127.0.0.1:{valkey.port},db=5'}}")
    rider = Entity(name="rider", join_keys=["rider_name"], value_type=FeastType.STRING)
    riders = FeatureView(
        name="riders",
        entities=[rider],
        ttl=timedelta(hours=1),
        schema=[
            Field(name="rider_name", dtype=String),
            Field(name="age", dtype=Int32),
            Field(name="tags", dtype=Array(String)),
            Field(name="photo", dtype=Bytes),
        ],
        source=FileSource(name="r", path="unread.parquet", timestamp_field="event_timestamp"),
    )
    store = FeatureStore(repo_path=str(repo))
    pairs = FeatureService(name="pairs", features=[ride_views.stats, riders])
    store.apply([rider, riders, pairs])
    rows = pd.DataFrame(
        {
            "rider_name": ["Ada", "Bo"],
            "age": [36, 7],
            "tags": [["quiet", "höflich"], []],
            "photo": [b"\xff\x00", b""],
            "event_timestamp": [NOW, NOW],
        }
    )
    store.write_to_online_store("riders", df=rows)
    models = tmp_path_factory.mktemp("no models")
    with (
        headrace_at(repo, models, on_demand_modules="ride_views") as ours,
        feast_listen_at(repo) as theirs,
    ):
        yield ours, theirs


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


RIDES = {
    "two entities, by service": {"feature_service": "pairs"},
    "two entities, full names": {"feature_service": "pairs", "full_feature_names": True},
    "text, times and lists": {"features": {"val": ["stats:city", "stats:joined", "stats:scores"]}},
    "several views": {"features": {"val": ["riders:tags", "stats:trips", "riders:photo"]}},
}


@pytest.mark.parametrize("fields", RIDES.values(), ids=RIDES)
def test_both_answer_the_same_of_several_views_entities_and_types(both_at_rides, fields):
    request = GetOnlineFeaturesRequest(**fields)
    request.entities["driver_id"].val.extend(Value(int64_val=i) for i in [1, 2, 4, 9, 1])
    if "riders" in str(fields) or "feature_service" in fields:
        names = ["Ada", "Bo", "Nobody", "Ada", "Bo"]
        request.entities["rider_name"].val.extend(Value(string_val=name) for name in names)

    ours, theirs = (by_name(ask(request, timeout=10)) for ask in both_at_rides)

    assert ours == theirs


def test_both_compute_the_same(both_at_rides):
    """Without request-time data: `feast listen` 0.67 fails at any, its SDK takes Python values."""
    request = GetOnlineFeaturesRequest(feature_service="halves")
    request.entities["driver_id"].val.extend(Value(int64_val=i) for i in [1, 4, 1])

    ours, theirs = (by_name(ask(request, timeout=10)) for ask in both_at_rides)

    assert ours.keys() == theirs.keys()
    assert [value.double_val for value in ours["half"].values] == [2.25, 1.5, 2.25]
    assert ours["half"].values == theirs["half"].values
    assert ours["half"].statuses == theirs["half"].statuses


def test_versions_are_told_by_neither(both_at_rides):
    request = GetOnlineFeaturesRequest(
        features={"val": ["stats:trips"]}, include_feature_view_version_metadata=True
    )
    request.entities["driver_id"].val.add(int64_val=1)

    for ask in both_at_rides:
        assert not ask(request, timeout=10).metadata.feature_view_metadata
