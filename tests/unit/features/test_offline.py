"""Feast's own file store, asked for what was known at a moment, traps and all."""

from datetime import UTC, datetime, timedelta

import numpy as np
import pandas as pd
import pytest
from feast import Entity, FeatureService, FeatureStore, FeatureView, Field, FileSource, ValueType
from feast.types import Array, Float32, Float64, Int64, String, UnixTimestamp

from headrace.features.repo import open_feature_repo
from headrace.features.values import ValueType as V

NOON = datetime(2026, 1, 31, 12, tzinfo=UTC)


@pytest.fixture(scope="module")
def offline(tmp_path_factory):
    root = tmp_path_factory.mktemp("repo")
    (root / "feature_store.yaml").write_text(
        "project: offline\nprovider: local\nregistry: registry.db\noffline_store: {type: file}\n"
        "online_store: {type: sqlite, path: online.db}\nentity_key_serialization_version: 3\n"
    )
    pd.DataFrame(
        {
            "user": ["a", "a", "b", "b"],
            "shop": [1, 1, 1, 2],
            "visits": [1, 2, 2**60 + 1, None],
            "spent": [0.1, 0.2, None, 0.4],
            "seen": [NOON, NOON, NOON, None],
            "tags": [["x"], ["x", "y"], [], None],
            "event_timestamp": [NOON - timedelta(hours=h) for h in (5, 1, 1, 30)],
        }
    ).astype({"visits": "Int64"}).to_parquet(root / "visits.parquet")
    pd.DataFrame(
        {"rain": [0.5, 0.75], "event_timestamp": [NOON - timedelta(hours=h) for h in (2, 1)]}
    ).to_parquet(root / "weather.parquet")
    user = Entity(name="user", join_keys=["user"], value_type=ValueType.STRING)
    shop = Entity(name="shop", join_keys=["shop"], value_type=ValueType.INT64)

    def source(name):
        return FileSource(name=name, path=f"{name}.parquet", timestamp_field="event_timestamp")

    visits = FeatureView(
        name="visits",
        entities=[user, shop],
        ttl=timedelta(days=1),
        schema=[
            Field(name="user", dtype=String),
            Field(name="shop", dtype=Int64),
            Field(name="visits", dtype=Int64),
            Field(name="spent", dtype=Float64),
            Field(name="seen", dtype=UnixTimestamp),
            Field(name="tags", dtype=Array(String)),
        ],
        source=source("visits"),
    )
    weather = FeatureView(
        name="weather",
        entities=[],
        schema=[Field(name="rain", dtype=Float32)],
        source=source("weather"),
    )
    store = FeatureStore(repo_path=str(root))
    store.apply([user, shop, visits, weather, FeatureService(name="s", features=[visits, weather])])
    return open_feature_repo(root).offline_features()


def at(*moments):
    return np.array([int(moment.timestamp() * 1e6) for moment in moments])


def keys(*pairs):
    users, shops = zip(*pairs, strict=True)
    return {"shop": (V.INT64, list(shops)), "user": (V.STRING, list(users))}


def listed(column):
    pairs = zip(column.values.tolist(), column.present.tolist(), strict=True)
    return [value if present else None for value, present in pairs]


def test_each_row_is_answered_as_of_its_own_time(offline):
    found = offline.read(
        "visits",
        ["visits", "spent"],
        keys(("a", 1), ("a", 1), ("a", 1)),
        at(NOON, NOON - timedelta(hours=2), NOON - timedelta(hours=6)),
    )

    assert listed(found["spent"]) == [0.2, 0.1, None]
    assert listed(found["visits"]) == [2, 1, None]


def test_equal_rows_are_each_answered_and_order_is_kept(offline):
    found = offline.read(
        "visits",
        ["spent"],
        keys(("nobody", 1), ("a", 1), ("b", 1), ("a", 1), ("nobody", 1)),
        at(*[NOON] * 5),
    )

    assert listed(found["spent"]) == [None, 0.2, None, 0.2, None]


def test_what_the_ttl_forgets_is_missing_and_so_is_null(offline):
    found = offline.read("visits", ["spent", "tags"], keys(("b", 2), ("b", 1)), at(NOON, NOON))

    assert listed(found["spent"]) == [None, None]
    assert [found["tags"].present.tolist(), list(found["tags"].values[1])] == [[False, True], []]


def test_times_keep_their_values_and_integers_what_a_double_holds_of_them(offline):
    found = offline.read("visits", ["visits", "seen"], keys(("b", 1), ("x", 9)), at(NOON, NOON))

    assert listed(found["visits"]) == [float(2**60 + 1), None]  # Feast's doing: one is missing
    assert found["seen"].values[0] == np.datetime64(NOON.replace(tzinfo=None))


def test_a_view_without_entities_is_read_by_time_alone(offline):
    found = offline.read(
        "weather", ["rain"], {}, at(NOON, NOON - timedelta(minutes=90), NOON - timedelta(days=9))
    )

    assert listed(found["rain"]) == [0.75, 0.5, None]


def test_it_knows_what_the_registry_still_has(offline):
    assert offline.has("visits", "spent")
    assert not offline.has("visits", "earned")
    assert not offline.has("purchases", "spent")


def test_a_later_version_of_a_view_is_asked_for_by_its_number(tmp_path):
    (tmp_path / "feature_store.yaml").write_text(
        "project: offline\nprovider: local\noffline_store: {type: file}\n"
        "registry: {path: registry.db, enable_online_feature_view_versioning: true}\n"
        "online_store: {type: sqlite, path: online.db}\nentity_key_serialization_version: 3\n"
    )
    row = {"id": [1], "a": [1.5], "b": [2.5], "event_timestamp": [NOON]}
    pd.DataFrame(row).to_parquet(tmp_path / "stats.parquet")
    thing = Entity(name="thing", join_keys=["id"], value_type=ValueType.INT64)
    store = FeatureStore(repo_path=str(tmp_path))
    for features in (["a"], ["a", "b"]):
        view = FeatureView(
            name="stats",
            entities=[thing],
            schema=[
                Field(name="id", dtype=Int64),
                *(Field(name=f, dtype=Float32) for f in features),
            ],
            source=FileSource(path="stats.parquet", timestamp_field="event_timestamp"),
        )
        store.apply([thing, view, FeatureService(name="s", features=[view])])
    repo = open_feature_repo(tmp_path)
    offline = repo.offline_features()

    (stored,) = repo.compile("s").views
    found = offline.read(stored.name, ["a", "b"], {"id": (V.INT64, [1])}, at(NOON))

    assert stored.name == "stats_v1"
    assert offline.has("stats_v1", "b")
    assert (listed(found["a"]), listed(found["b"])) == ([1.5], [2.5])
