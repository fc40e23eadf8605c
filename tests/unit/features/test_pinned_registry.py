"""What a registry holds is data: whoever may write to it runs nothing here, whatever is read."""

import contextlib
import os
import sys
import time
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import dill
import numpy as np
import pandas as pd
import pytest
from feast import Entity, FeatureService, FeatureStore, FeatureView, Field, FileSource, ValueType
from feast.data_format import JsonFormat
from feast.data_source import KafkaSource
from feast.feature_view import FeatureViewState
from feast.labeling import LabelView
from feast.protos.feast.core.FeatureView_pb2 import FeatureView as FeatureViewProto
from feast.protos.feast.core.Registry_pb2 import Registry
from feast.stream_feature_view import StreamFeatureView
from feast.types import Float32, Int64

from headrace.errors import FeatureStoreUnavailable, StartupError
from headrace.features.feast_store import FeastStore
from headrace.features.pinned_registry import _without_code
from headrace.features.plan import FeatureStatus
from headrace.features.repo import open_feature_repo, reopen
from headrace.features.values import ValueType as V

NOON = datetime(2026, 1, 31, 12, tzinfo=UTC)
DRIVER = Entity(name="driver", join_keys=["driver_id"], value_type=ValueType.INT64)
SOURCE = FileSource(name="source", path="stats.parquet", timestamp_field="event_timestamp")
STREAM = KafkaSource(
    name="stream",
    kafka_bootstrap_servers="nowhere",
    topic="t",
    timestamp_field="event_timestamp",
    batch_source=SOURCE,
    message_format=JsonFormat(schema_json="driver_id integer, rating float"),
)
SCHEMA = [Field(name="driver_id", dtype=Int64), Field(name="rating", dtype=Float32)]
VIEWS = ("stats", "streamed", "labels")

pytestmark = pytest.mark.filterwarnings("ignore::Warning")


def definitions():
    common = {"entities": [DRIVER], "ttl": timedelta(0), "schema": SCHEMA}
    views = [
        FeatureView(name="stats", source=SOURCE, **common),
        StreamFeatureView(name="streamed", source=STREAM, timestamp_field="at", **common),
        LabelView(name="labels", source=SOURCE, labeler_field="rating", **common),
    ]
    services = [FeatureService(name=f"of_{view.name}", features=[view]) for view in views]
    return [DRIVER, *views, *services]


@pytest.fixture
def path(tmp_path):
    """A repository over SQLite, with a row in each of its views."""
    (tmp_path / "feature_store.yaml").write_text(
        "project: demo\nprovider: local\nregistry: {path: registry.db, cache_ttl_seconds: 1}\n"
        "online_store: {type: sqlite, path: online.db}\noffline_store: {type: file}\n"
        "entity_key_serialization_version: 3\n"
    )
    rows = pd.DataFrame({"driver_id": [1], "rating": [4.5], "event_timestamp": [NOON]})
    rows.to_parquet(tmp_path / "stats.parquet")
    store = FeatureStore(repo_path=str(tmp_path))
    store.apply(definitions())
    for name in VIEWS:
        store.write_to_online_store(name, df=rows)
    return tmp_path


class Mark:
    """Whose unpickling leaves a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def poison(path, change):
    registry = Registry.FromString((path / "registry.db").read_bytes())
    change(registry)
    (path / "registry.db").write_bytes(registry.SerializeToString())


def rating(path, view="stats"):
    repo = open_feature_repo(path)
    store = repo.online_store()
    try:
        plan = repo.compile(f"of_{view}")
        return read(store, plan)
    finally:
        store.close()


def read(store, plan):
    keys = {"driver_id": np.array([1, 2])}
    rows = store.read(plan, keys, now_s=time.time(), timeout_s=20)
    assert rows.statuses.tolist()[0][1] == FeatureStatus.NOT_FOUND
    return rows.values[0].tolist()[0]


def transformation(message, path):
    message.spec.mode = "python"
    message.spec.feature_transformation.user_defined_function.name = "f"
    message.spec.feature_transformation.user_defined_function.body = dill.dumps(Mark(path / "ran"))


def source_text(message, path):
    transformation(message, path)
    text = f"import os\nos.mkdir({str(path / 'ran')!r})\ndef f(x):\n    return x\n"
    message.spec.feature_transformation.user_defined_function.body_text = text
    message.spec.feature_transformation.user_defined_function.mode = "spark"


def substrait(message, path):
    body = dill.dumps(Mark(path / "ran"))
    message.spec.feature_transformation.substrait_transformation.ibis_function = body


def nested(message, path):
    inner = FeatureViewProto()
    inner.CopyFrom(message)
    inner.spec.name = "inner"
    transformation(inner, path)
    message.spec.source_views.append(inner.spec)


def stream_function(message, path):
    message.spec.user_defined_function.name = "f"
    message.spec.user_defined_function.body = dill.dumps(Mark(path / "ran"))


HOSTILE = [
    *(("stats", how) for how in (transformation, substrait, nested)),
    ("streamed", stream_function),
]


@pytest.mark.parametrize(("view", "change"), HOSTILE)
def test_code_in_a_view_runs_in_feasts_client_and_not_here(path, view, change):
    def of_the_view(registry):
        views = registry.feature_views if view == "stats" else registry.stream_feature_views
        change(views[0], path)

    poison(path, of_the_view)

    assert rating(path, view) == 4.5
    assert not (path / "ran").exists()
    with contextlib.suppress(Exception):  # Feast may well not like what it has unpickled
        store = FeatureStore(repo_path=str(path))
        store.get_online_features([f"{view}:rating"], [{"driver_id": 1}])
    assert (path / "ran").exists()


def test_code_as_text_in_a_view_does_not_run(path):
    poison(path, lambda registry: source_text(registry.feature_views[0], path))

    assert rating(path) == 4.5
    assert not (path / "ran").exists()


def test_code_in_an_old_version_does_not_run(path):
    config = path / "feature_store.yaml"
    config.write_text(
        config.read_text().replace(
            "cache_ttl_seconds: 1", "enable_online_feature_view_versioning: true"
        )
    )

    def change(registry):
        for record in registry.feature_view_version_history.records:
            if record.feature_view_name == "stats":
                view = FeatureViewProto.FromString(record.feature_view_proto)
                transformation(view, path)
                record.feature_view_proto = view.SerializeToString()

    poison(path, change)
    repo = open_feature_repo(path)
    store = repo.online_store()

    assert read(store, repo.compile_references(["stats@v0:rating"])) == 4.5
    store.close()
    assert not (path / "ran").exists()


def test_a_class_that_a_registry_names_is_not_imported_for_online_reads(path):
    (path / "named_by_a_registry.py").write_text("class Source: ...\n")

    def change(registry):
        source = registry.feature_views[0].spec.batch_source
        source.data_source_class_type = "named_by_a_registry.Source"

    poison(path, change)
    sys.path.append(str(path))
    try:
        assert rating(path) == 4.5
        assert "named_by_a_registry" not in sys.modules
    finally:
        sys.path.remove(str(path))


def test_a_service_s_own_sources_are_not_kept(path):
    def change(registry):
        for service in registry.feature_services:
            for projection in service.spec.features:
                projection.batch_source.data_source_class_type = "named_by_a_registry.Source"

    poison(path, change)
    message = Registry.FromString((path / "registry.db").read_bytes())

    kept = _without_code(message, "demo", with_sources=True)

    assert kept.feature_services
    assert not any(
        projection.HasField("batch_source") or projection.HasField("stream_source")
        for service in kept.feature_services
        for projection in service.spec.features
    )


@pytest.mark.parametrize("view", ["stats", "streamed"])
def test_comparing_with_the_offline_store_runs_no_code_either(path, view):
    def change(registry):
        transformation(registry.feature_views[0], path)
        stream_function(registry.stream_feature_views[0], path)

    poison(path, change)
    offline = open_feature_repo(path).offline_features()
    at_us = np.array([int((NOON + timedelta(hours=1)).timestamp() * 1e6)])

    found = offline.read(view, ["rating"], {"driver_id": (V.INT64, [1])}, at_us)

    assert found["rating"].values.tolist() == [4.5]
    assert not (path / "ran").exists()


@pytest.mark.parametrize("view", VIEWS)
def test_a_view_of_each_kind_is_read(path, view):
    assert rating(path, view) == 4.5


@pytest.mark.parametrize("view", VIEWS)
def test_a_view_of_each_kind_is_read_while_it_is_being_materialized(path, view):
    def change(registry):
        for views in (registry.feature_views, registry.stream_feature_views, registry.label_views):
            for message in views:
                if "state" in message.meta.DESCRIPTOR.fields_by_name:
                    message.meta.state = FeatureViewState.MATERIALIZING.value
                    message.meta.materialization_intervals.add()

    poison(path, change)

    assert rating(path, view) == 4.5


@pytest.mark.parametrize("spoil", ["delete", "break"])
def test_a_registry_that_is_gone_or_broken_does_not_disturb_reads(path, spoil):
    repo = open_feature_repo(path)
    store = repo.online_store()
    plan = repo.compile("of_stats")
    assert read(store, plan) == 4.5

    if spoil == "delete":
        (path / "registry.db").unlink()
    else:
        (path / "registry.db").write_bytes(b"\xff" * 100)
    time.sleep(1.1)  # longer than Feast's client would keep what it has read

    assert read(store, plan) == 4.5
    assert read(store, repo.compile_references(["labels:rating"])) == 4.5
    with pytest.raises(StartupError):
        reopen(repo)
    store.close()


def test_a_plan_reads_what_it_was_compiled_from_whatever_is_applied(path):
    repo = open_feature_repo(path)
    store = repo.online_store()
    before = repo.compile("of_stats")

    schema = [Field(name="driver_id", dtype=Int64), Field(name="trips", dtype=Float32)]
    stats = FeatureView(
        name="stats", entities=[DRIVER], ttl=timedelta(0), schema=schema, source=SOURCE
    )
    FeatureStore(repo_path=str(path)).apply(
        [DRIVER, stats, FeatureService(name="of_stats", features=[stats])]
    )
    after = reopen(repo).compile("of_stats")

    assert [feature.name for feature in after.features] == ["trips"]
    rows = store.read(after, {"driver_id": np.array([1])}, now_s=time.time(), timeout_s=20)
    assert rows.statuses.tolist() == [[FeatureStatus.NULL_VALUE]]
    assert read(store, before) == 4.5
    store.close()


def test_an_answer_without_a_feature_is_unavailable(path):
    metadata = SimpleNamespace(feature_names=SimpleNamespace(val=[]))
    answer = SimpleNamespace(proto=SimpleNamespace(metadata=metadata, results=[]))
    store = FeastStore(None, SimpleNamespace(get_online_features=lambda **_: answer))
    plan = open_feature_repo(path).compile("of_stats")

    with pytest.raises(FeatureStoreUnavailable):
        store.read(plan, {"driver_id": np.array([1])}, now_s=0.0, timeout_s=20)
    store.close()
