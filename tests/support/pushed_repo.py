"""An applied Feast repository whose views are written online: pushed, streamed, computed."""

import warnings
from datetime import UTC, datetime, timedelta

import pandas as pd
from feast import (
    Entity,
    FeatureService,
    FeatureStore,
    FeatureView,
    Field,
    FileSource,
    KafkaSource,
    PushSource,
    StreamFeatureView,
)
from feast import ValueType as FeastType
from feast.data_format import AvroFormat
from feast.on_demand_feature_view import on_demand_feature_view
from feast.protos.feast.core.Registry_pb2 import Registry
from feast.types import Array, Bytes, Float32, Int64, String

LONG_AGO = datetime(2020, 1, 1, tzinfo=UTC)


def write_pushed_repo(folder, redis_port):
    """Apply views of all kinds; nothing is written."""
    (folder / "feature_store.yaml").write_text(
        "project: pushes\nprovider: local\nregistry: registry.db\n"
        f"online_store: {{type: redis, connection_string: '127.0.0.1:{redis_port}'}}\n"
        "entity_key_serialization_version: 3\n"
    )
    history = pd.DataFrame(
        {"driver_id": [1], "rating": [1.0], "trips": [1.0], "event_timestamp": [LONG_AGO]}
    )
    history.astype({"rating": "float32", "trips": "float32"}).to_parquet(folder / "trips.parquet")
    store = FeatureStore(repo_path=str(folder))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # Feast's own, of views with code
        store.apply(_definitions())


def _definitions():
    driver = Entity(name="driver", join_keys=["driver_id"], value_type=FeastType.INT64)
    source = FileSource(name="f", path="trips.parquet", timestamp_field="event_timestamp")
    nowhere = FileSource(name="n", path="nowhere.parquet", timestamp_field="event_timestamp")
    key = Field(name="driver_id", dtype=Int64)
    numbers = [Field(name="rating", dtype=Float32), Field(name="trips", dtype=Float32)]

    def view(name, source, fields, **more):
        return FeatureView(
            name=name,
            entities=[driver],
            ttl=timedelta(days=1),
            schema=[key, *fields],
            source=source,
            **more,
        )

    stats = view("stats", PushSource(name="trips_pushed", batch_source=source), numbers)
    lost = view("lost", PushSource(name="lost_pushed", batch_source=nowhere), numbers)
    kinds = view(
        "kinds",
        nowhere,
        [
            Field(name="blob", dtype=Bytes),
            Field(name="text", dtype=String),
            Field(name="scores", dtype=Array(Float32)),
        ],
    )
    streamed = StreamFeatureView(
        name="streamed",
        entities=[driver],
        ttl=timedelta(days=1),
        schema=[key, Field(name="speed", dtype=Float32)],
        timestamp_field="event_timestamp",
        mode="python",
        udf=_as_it_is,
        udf_string="def _as_it_is(df): return df",
        source=KafkaSource(
            name="kafka",
            kafka_bootstrap_servers="nowhere:9092",
            topic="speeds",
            timestamp_field="event_timestamp",
            batch_source=nowhere,
            message_format=AvroFormat(""),
        ),
    )
    kept = view("kept", PushSource(name="kept_pushed", batch_source=source), numbers)

    @on_demand_feature_view(
        sources=[stats], schema=[Field(name="twice", dtype=Float32)], mode="pandas"
    )
    def doubled(df: pd.DataFrame) -> pd.DataFrame:
        return pd.DataFrame({"twice": (df["trips"] * 2).astype("float32")})

    @on_demand_feature_view(
        sources=[stats],
        entities=[driver],
        schema=[key, Field(name="half", dtype=Float32)],
        mode="pandas",
        write_to_online_store=True,
    )
    def halved(df: pd.DataFrame) -> pd.DataFrame:
        return pd.DataFrame({"half": (df["trips"] / 2).astype("float32")})

    return [
        *(driver, stats, lost, kinds, streamed, kept, doubled, halved),
        FeatureService(name="trips", features=[stats]),
        FeatureService(name="all", features=[stats, kinds, streamed]),
        FeatureService(name="computed", features=[doubled]),
        FeatureService(name="vectors", features=[kept], precompute_online=True),
    ]


def plant_code(folder, marker):
    """Change the code that the registry holds of each view, so that running it leaves a file."""
    file = folder / "registry.db"
    registry = Registry.FromString(file.read_bytes())
    code = f"open({str(marker)!r}, 'w').close()\n"
    for view in registry.on_demand_feature_views:
        function = view.spec.feature_transformation.user_defined_function
        function.body_text = f"{code}def {view.spec.name}(df):\n    return df\n"
    for view in registry.stream_feature_views:
        # A pickle, which is code: of `exec(code)`.
        pickled = b"cbuiltins\nexec\n(V" + code.strip().encode() + b"\ntR."
        view.spec.user_defined_function.body = pickled
    file.write_bytes(registry.SerializeToString())


def _as_it_is(df):
    return df
