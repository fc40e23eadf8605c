"""The skew log follows views through compound keys, mapped keys, versions and computed features."""

import contextlib
import io
import json
import warnings
from datetime import UTC, datetime, timedelta

import grpc
import pandas as pd
import pyarrow.parquet as pq
import pytest
import structlog
from feast import Entity, FeatureService, FeatureStore, FeatureView, Field, FileSource, ValueType
from feast.types import Float64, Int64, String
from ride_repo import write_ride_repo

import headrace.__main__
from headrace.app import Gateway
from headrace.settings import load_settings
from headrace.v1 import feature_service_pb2 as pb
from headrace.v1 import feature_service_pb2_grpc as pb_grpc

NOW = datetime.now(UTC)
THEN = NOW - timedelta(hours=1)
TRIPS = pd.DataFrame(
    {
        "driver_id": [1, 1, 2],
        "city": ["Bern", "Åbo", "Bern"],
        "trips": [10, 20, 30],
        "event_timestamp": THEN,
    }
)
RATINGS = pd.DataFrame({"driver_id": [1, 2, 3], "rating": [1.5, 2.5, 3.5], "event_timestamp": THEN})


@pytest.fixture(scope="module")
def repo(tmp_path_factory, valkey):
    """Online, trips of driver 2 are ten times, and the ratings of the older version are doubled."""
    root = tmp_path_factory.mktemp("repo")
    TRIPS.to_parquet(root / "trips.parquet")
    RATINGS.to_parquet(root / "ratings.parquet")
    (root / "feature_store.yaml").write_text(
        "project: skew_views\nprovider: local\noffline_store: {type: file}\n"
        "registry: {path: registry.db, enable_online_feature_view_versioning: true}\n"
        f"online_store: {{type: redis, connection_string: '127.0.0.1:{valkey.port},db=5'}}\n"
        "entity_key_serialization_version: 3\n"
    )
    driver = Entity(name="driver", join_keys=["driver_id"], value_type=ValueType.INT64)
    city = Entity(name="city", join_keys=["city"], value_type=ValueType.STRING)
    own = Field(name="driver_id", dtype=Int64)

    def view(name, entities, *fields):
        source = FileSource(name=name, path=f"{name}.parquet", timestamp_field="event_timestamp")
        return FeatureView(
            name=name,
            entities=entities,
            schema=[own, *fields],
            ttl=timedelta(days=1),
            source=source,
        )

    trips = view(
        "trips",
        [driver, city],
        Field(name="city", dtype=String),
        Field(name="trips", dtype=Int64),
    )
    older = view("ratings", [driver], Field(name="rating", dtype=Float64))
    store = FeatureStore(repo_path=str(root))
    store.apply([driver, city, trips, older])
    store.write_to_online_store("ratings", df=RATINGS.assign(rating=RATINGS["rating"] * 2))
    changed = view(
        "ratings", [driver], Field(name="rating", dtype=Float64), Field(name="extra", dtype=Int64)
    )
    store.apply([driver, changed])
    services = [
        FeatureService(name="compound", features=[trips]),
        FeatureService(
            name="mapped",
            features=[
                changed[["rating"]]
                .with_name("guides")
                .with_join_key_map({"driver_id": "guide_id"}),
            ],
        ),
        FeatureService(name="pinned", features=["ratings@v0:rating"]),
    ]
    store.apply(services)
    online = TRIPS.assign(trips=[10, 20, 300])
    store.write_to_online_store("trips", df=online)
    store.write_to_online_store("ratings", df=RATINGS.assign(extra=0))
    return root


def gateway_with(**settings):
    return Gateway(
        load_settings(
            {
                "grpc_address": "127.0.0.1:0",
                "http_address": "127.0.0.1:0",
                "skew_sample_share": 1,
                **settings,
            }
        )
    )


def read(address, service, **columns):
    request = pb.GetOnlineFeaturesRequest(feature_service=service)
    for name, (kind, values) in columns.items():
        column = request.entities.add(name=name).values
        getattr(column, kind).values.extend(values)
    with grpc.insecure_channel(address) as channel:
        pb_grpc.FeatureServiceStub(channel).GetOnlineFeatures(request, timeout=10)


@pytest.fixture(scope="module")
def log(repo, tmp_path_factory):
    """What a gateway served of every service."""
    models, folder = tmp_path_factory.mktemp("models"), tmp_path_factory.mktemp("log")
    with structlog.testing.capture_logs():
        gateway = gateway_with(model_repository=models, feature_repo=repo, skew_log_dir=folder)
        gateway.start()
        cities = [b"Bern", "Åbo".encode(), b"Bern"]
        read(
            gateway.grpc_address,
            "compound",
            driver_id=("int64s", [1, 1, 2]),
            city=("strings", cities),
        )
        read(gateway.grpc_address, "mapped", guide_id=("int64s", [1, 2, 3]))
        read(gateway.grpc_address, "pinned", driver_id=("int64s", [1, 2, 3]))
        assert gateway.stop()
    return folder


@pytest.fixture(scope="module")
def features(repo, log):
    """What the command says of each service's one feature."""
    out = io.StringIO()
    command = ["features", "skew", "--json", "--feature-repo", str(repo), "--log", str(log)]
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
        patch.setattr(headrace.__main__, "set_up_logs", lambda _: None)
        headrace.__main__.main(command)
    services = json.loads(out.getvalue())["services"]
    return {of["service"]: of["features"][0] for of in services}


def test_a_compound_key_is_followed_by_both_its_parts(features):
    of = features["compound"]

    assert (of["compared"], of["differing"], of["max_difference"]) == (3, 1, 270)
    assert of["example"]["entity"] == {"driver_id": 2, "city": "Bern"}


def test_a_view_read_by_another_name_is_asked_for_by_its_own(features, log):
    of = features["mapped"]

    assert (of["compared"], of["mismatch_share"]) == (3, 0)
    columns = {name for file in log.iterdir() for name in pq.read_schema(file).names}
    assert "key.guide_id" in columns


def test_a_pinned_version_is_compared_as_that_version(features):
    of = features["pinned"]

    assert (of["view"], of["compared"], of["differing"]) == ("ratings", 3, 3)
    assert of["example"]["online"] == 2 * of["example"]["offline"]


def test_of_computed_features_what_they_are_computed_from_is_kept(tmp_path, valkey):
    repo, models, folder = (tmp_path / name for name in ("repo", "models", "log"))
    for made in (repo, models):
        made.mkdir()
    write_ride_repo(repo, f"{{type: redis, connection_string: '127.0.0.1:{valkey.port},db=6'}}")
    with structlog.testing.capture_logs(), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # Feast's own, of on-demand views
        gateway = gateway_with(
            model_repository=models,
            feature_repo=repo,
            skew_log_dir=folder,
            on_demand_modules="ride_views",
        )
        gateway.start()
        read(
            gateway.grpc_address,
            "quotes",
            driver_id=("int64s", [1]),
            distance=("doubles", [2.0]),
            is_night=("bools", [False]),
            note=("strings", [b"x"]),
        )
        assert gateway.stop()

    (file,) = folder.iterdir()
    (row,) = pq.read_table(file).to_pylist()
    assert (row["key.driver_id"], row["value.stats__trips"]) == (1, 10)
    assert not {"value.fare", "key.distance"} & row.keys()
