"""What is applied while the server runs is served; what is broken is not, and is said."""

import threading
import time
import urllib.request
from datetime import UTC, datetime, timedelta

import grpc
import numpy as np
import pandas as pd
import pytest
import tritonclient.grpc as triton
from feast import Entity, FeatureService, FeatureStore, FeatureView, Field, FileSource, ValueType
from feast.feature_view import FeatureViewState
from feast.types import Float32, Int64

from headrace.app import Gateway
from headrace.settings import load_settings
from headrace.v1 import feature_service_pb2 as pb
from headrace.v1 import feature_service_pb2_grpc as pb_grpc

DRIVER = Entity(name="driver", join_keys=["driver_id"], value_type=ValueType.INT64)
SOURCE = FileSource(name="unread", path="unread.parquet", timestamp_field="event_timestamp")
TIMEOUT_S = 20


def view(ttl):
    fields = [Field(name=name, dtype=Float32) for name in ("rating", "trips")]
    schema = [Field(name="driver_id", dtype=Int64), *fields]
    return FeatureView(name="stats", entities=[DRIVER], ttl=ttl, schema=schema, source=SOURCE)


@pytest.fixture
def repo(tmp_path, valkey):
    folder = tmp_path / "features"
    folder.mkdir()
    (folder / "feature_store.yaml").write_text(
        "project: changing\nprovider: local\nregistry: registry.db\n"
        f"online_store: {{type: redis, connection_string: '127.0.0.1:{valkey.port}'}}\n"
        "entity_key_serialization_version: 3\n"
    )
    stats = view(timedelta(0))
    store = FeatureStore(repo_path=str(folder))
    store.apply([DRIVER, stats, FeatureService(name="driver_features", features=[stats])])
    hour_ago = datetime.now(UTC) - timedelta(hours=1)
    rows = {"driver_id": [1], "rating": [4.5], "trips": [10.0], "event_timestamp": [hour_ago]}
    store.write_to_online_store("stats", df=pd.DataFrame(rows))
    return folder


@pytest.fixture
def gateway(repo, model_repository):
    gateway = Gateway(
        load_settings(
            {
                "model_repository": model_repository,
                "feature_repo": repo,
                "grpc_address": "127.0.0.1:0",
                "http_address": "127.0.0.1:0",
                "registry_poll_s": 0.1,
                "settle_s": 0.1,
            }
        )
    )
    gateway.start()
    yield gateway
    assert gateway.stop(), "requests were cut off"


@pytest.fixture
def ask(gateway):
    with grpc.insecure_channel(gateway.grpc_address) as channel:
        stub = pb_grpc.FeatureServiceStub(channel)

        def ask(service):
            request = pb.GetOnlineFeaturesRequest(feature_service=service)
            request.entities.add(name="driver_id").values.int64s.values.append(1)
            return stub.GetOnlineFeatures(request, timeout=5)

        yield ask


def eventually(check):
    deadline_s = time.monotonic() + TIMEOUT_S
    while not check():
        assert time.monotonic() < deadline_s
        time.sleep(0.05)


def apply(repo, *objects):
    """As `feast apply` does: in a process of its own, over the file that is there."""
    FeatureStore(repo_path=str(repo)).apply([DRIVER, *objects])


def readyz(gateway):
    with urllib.request.urlopen(f"http://{gateway.http_address}/readyz", timeout=5) as response:
        return response.read().decode()


def test_a_new_feature_service_is_served_without_a_restart(gateway, repo, ask):
    with pytest.raises(grpc.RpcError, match="no feature service 'short'"):
        ask("short")
    stats = view(timedelta(0))
    apply(repo, stats, FeatureService(name="short", features=[stats[["trips"]]]))

    def is_served():
        try:
            return [of.name for of in ask("short").features] == ["trips"]
        except grpc.RpcError:
            return False

    eventually(is_served)


def test_a_new_ttl_reaches_the_models(gateway, repo, ask):
    def stale(client):
        ids = triton.InferInput("driver_id", [1, 1], "INT64")
        ids.set_data_from_numpy(np.array([[1]]))
        reply = client.infer("driver_score", [ids]).get_response()
        return reply.parameters["stale_features"].int64_param

    with triton.InferenceServerClient(gateway.grpc_address) as client:
        assert stale(client) == 0
        apply(repo, view(timedelta(minutes=5)))
        eventually(lambda: stale(client) == 2)
    assert list(ask("driver_features").features[0].statuses) == [4]


def test_a_materialization_stops_no_reads_and_reloads_no_model(gateway, repo, ask):
    served = gateway.catalog.entries["driver_score"].versions[1]

    def is_known(service):
        try:
            return bool(ask(service).features)
        except grpc.RpcError:
            return False

    store = FeatureStore(repo_path=str(repo))
    stats = store.get_feature_view("stats")
    now = datetime.now(UTC)
    store.registry.apply_materialization(stats, "changing", now - timedelta(days=1), now)
    stats = store.get_feature_view("stats")
    for state in (FeatureViewState.MATERIALIZING, FeatureViewState.AVAILABLE_ONLINE):
        stats.state = state
        store.registry.apply_feature_view(stats, "changing")
        # Whoever serves this has read the state that came before it.
        store.apply([FeatureService(name=state.name, features=[stats])])
        eventually(lambda name=state.name: is_known(name))
        assert len(ask("driver_features").features) == 2
        with triton.InferenceServerClient(gateway.grpc_address) as client:
            ids = triton.InferInput("driver_id", [1, 1], "INT64")
            ids.set_data_from_numpy(np.array([[1]]))
            client.infer("driver_score", [ids])

    assert gateway.catalog.entries["driver_score"].versions[1] is served


def test_a_registry_that_is_gone_or_broken_changes_nothing_and_is_said(gateway, repo, ask):
    registry = repo / "registry.db"
    good = registry.read_bytes()
    assert readyz(gateway) == "ready\n"
    for spoil in (registry.unlink, lambda: registry.write_bytes(b"\xff" * 100)):
        spoil()
        eventually(lambda: "registry cannot be read" in readyz(gateway))
        assert len(ask("driver_features").features) == 2
        registry.write_bytes(good)
        eventually(lambda: readyz(gateway) == "ready\n")
    from prometheus_client import generate_latest

    assert "headrace_registry_readable 1.0" in generate_latest(gateway.metrics).decode()


def test_every_reply_is_of_one_state_while_the_registry_changes_under_load(gateway, repo):
    stats = view(timedelta(0))
    selections = [["rating"], ["trips", "rating"], ["trips"]]
    expected = {"rating": 4.5, "trips": 10.0}
    states = {("rating", "trips"), *map(tuple, selections)}
    seen, wrong = set(), []
    is_over = threading.Event()

    def reader():
        request = pb.GetOnlineFeaturesRequest(feature_service="driver_features")
        request.entities.add(name="driver_id").values.int64s.values.extend([1, 1])
        with grpc.insecure_channel(gateway.grpc_address) as channel:
            stub = pb_grpc.FeatureServiceStub(channel)
            while not is_over.is_set():
                try:
                    reply = stub.GetOnlineFeatures(request, timeout=5)
                except grpc.RpcError as error:
                    wrong.append(error)
                    return
                names = [of.name for of in reply.features]
                seen.add(tuple(names))
                found = [list(of.values.floats.values) for of in reply.features]
                values = [[expected[name]] * 2 for name in names]
                if tuple(names) not in states or found != values:
                    wrong.append((names, found))

    readers = [threading.Thread(target=reader) for _ in range(4)]
    for thread in readers:
        thread.start()
    try:
        for names in [*selections, *selections]:
            apply(repo, stats, FeatureService(name="driver_features", features=[stats[names]]))
            eventually(lambda names=tuple(names): wrong or names in seen)
            seen.clear()
    finally:
        is_over.set()
        for thread in readers:
            thread.join(10)

    assert wrong == []


def test_a_service_that_goes_keeps_its_models_serving_and_is_told(gateway, repo):
    store = FeatureStore(repo_path=str(repo))
    stats = store.get_feature_view("stats")
    store.apply([FeatureService(name="other", features=[stats])])
    store.delete_feature_service("driver_features")

    def is_told():
        entry = gateway.catalog.entries["driver_score"]
        return any("no feature service 'driver_features'" in why for why in entry.failures.values())

    eventually(is_told)
    with triton.InferenceServerClient(gateway.grpc_address) as client:
        assert client.is_model_ready("driver_score")
