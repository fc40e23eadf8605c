"""The views of a repository: of every kind, in every version, wherever the registry keeps them."""

import contextlib
import uuid
from datetime import UTC, datetime, timedelta

import numpy as np
import pandas as pd
import pytest
from feast import Entity, FeatureService, FeatureStore, FeatureView, Field, FileSource, ValueType
from feast.data_format import JsonFormat
from feast.data_source import KafkaSource
from feast.feature_view import FeatureViewState
from feast.labeling import LabelView
from feast.protos.feast.core.Registry_pb2 import Registry
from feast.stream_feature_view import StreamFeatureView
from feast.types import Float32, ImageBytes, Int64, PdfBytes

from headrace.errors import FeaturePlanError, StartupError, UnknownFeatures
from headrace.features.registry_views import unservable_state
from headrace.features.repo import open_feature_repo, reopen

DRIVER = Entity(name="driver", join_keys=["driver_id"], value_type=ValueType.INT64)
SOURCE = FileSource(name="unread", path="unread.parquet", timestamp_field="event_timestamp")
NOW = datetime.now(UTC)
FILE = "{path: registry.db, enable_online_feature_view_versioning: %s}"
SQL = (
    "{registry_type: sql, path: 'sqlite:///{path}/registry.db', "
    "enable_online_feature_view_versioning: %s}"
)

pytestmark = pytest.mark.filterwarnings("ignore::Warning")


def view(name="stats", *features, dtype=Float32, **more):
    schema = [Field(name="driver_id", dtype=Int64)]
    schema += [Field(name=feature, dtype=dtype) for feature in features or ("rating",)]
    return FeatureView(
        name=name, entities=[DRIVER], ttl=timedelta(0), schema=schema, source=SOURCE, **more
    )


def configure(path, registry=FILE, *, versions=True):
    registry = (registry % str(versions).lower()).replace("{path}", str(path))
    (path / "feature_store.yaml").write_text(
        f"project: demo\nprovider: local\nregistry: {registry}\n"
        "online_store: {type: sqlite, path: online.db}\nentity_key_serialization_version: 3\n"
    )
    return FeatureStore(repo_path=str(path))


def refresh(store):
    """
    Let Feast see what is in the registry now.

    It keeps what it has made of a registry by where in memory that was and by its version. A SQL
    registry has none, and the place is soon another one's.
    """
    store.refresh_registry()
    store.registry.cached_registry_proto.version_id = str(uuid.uuid4())


def put(store, name, **columns):
    refresh(store)
    rows = {**columns, "event_timestamp": NOW}
    store.write_to_online_store(name, df=pd.DataFrame(rows))


def values(repo, plan):
    store = repo.online_store()
    rows = store.read(plan, {"driver_id": np.array([1])}, now_s=NOW.timestamp() + 1, timeout_s=20)
    store.close()
    return [column.tolist()[0] for column in rows.values]


@pytest.mark.parametrize("registry", [FILE, SQL], ids=["file", "sql"])
def test_each_version_of_a_view_is_read_as_feast_reads_it(tmp_path, registry):
    store = configure(tmp_path, registry)
    store.apply([DRIVER, view("stats", "rating", "trips")])
    put(store, "stats", driver_id=[1], rating=[4.5], trips=[3.0])
    store.apply([DRIVER, view("stats", "rating", "late")])
    put(store, "stats", driver_id=[1], rating=[2.5], late=[1.0])
    references = ["stats@v0:rating", "stats@v0:trips", "stats:rating", "stats@v1:late"]
    repo = open_feature_repo(tmp_path)

    plan = repo.compile_references(references, full_feature_names=True)
    found = dict(zip([of.name for of in plan.features], values(repo, plan), strict=True))

    refresh(store)
    theirs = store.get_online_features(references, [{"driver_id": 1}], full_feature_names=True)
    assert found == {name: own[0] for name, own in theirs.to_dict().items() if name in found}
    assert list(found.values()) == [4.5, 3.0, 2.5, 1.0]
    assert {of.name: of.version for of in plan.views} == {"stats": 0, "stats_v1": 1}


def test_a_version_that_never_was_is_refused(tmp_path):
    configure(tmp_path, SQL).apply([DRIVER, view()])

    with pytest.raises(FeaturePlanError, match="'stats' has no version 7"):
        open_feature_repo(tmp_path).compile_references(["stats@v7:rating"])


@pytest.mark.parametrize("change", ["disabled", "never materialized"])
def test_a_pinned_version_does_not_depend_on_the_state_of_the_latest(tmp_path, change):
    store = configure(tmp_path)
    store.apply([DRIVER, view()])
    put(store, "stats", driver_id=[1], rating=[4.5])
    store.apply([DRIVER, view("stats", "rating", "trips")])
    latest = store.get_feature_view("stats")
    if change == "disabled":
        latest.enabled = False
    else:
        latest.state = FeatureViewState.GENERATED
    store.registry.apply_feature_view(latest, "demo")
    repo = open_feature_repo(tmp_path)

    assert values(repo, repo.compile_references(["stats@v0:rating"])) == [4.5]
    with pytest.raises(FeaturePlanError, match=r"is disabled|not available online yet"):
        repo.compile_references(["stats:rating"])


def set_state(store, state):
    latest = store.get_feature_view("stats")
    latest.state = state
    store.registry.apply_feature_view(latest, "demo")


def is_served(repo):
    with contextlib.suppress(FeaturePlanError):
        return bool(repo.compile_references(["stats:rating"]))
    return False


def test_a_view_is_not_served_before_its_first_materialization_has_succeeded(tmp_path, monkeypatch):
    store = configure(tmp_path)
    store.apply([DRIVER, view()])
    set_state(store, FeatureViewState.GENERATED)
    repo = open_feature_repo(tmp_path)
    seen = []

    def look(**_):
        seen.append(reopen(repo))
        if len(seen) == 1:
            raise RuntimeError("the first one fails half-way")

    monkeypatch.setattr(store._get_provider(), "materialize_single_feature_view", look)
    with pytest.raises(RuntimeError):
        store.materialize(NOW - timedelta(days=1), NOW)
    failed = reopen(repo)
    for _ in range(2):
        store.materialize(NOW - timedelta(days=1), NOW)

    states = [one._state.message.feature_views[0].meta.state for one in seen]
    assert states == [FeatureViewState.MATERIALIZING.value] * 3
    assert [is_served(one) for one in (repo, seen[0], failed, seen[1])] == [False] * 4
    assert [is_served(one) for one in (seen[2], reopen(repo))] == [True] * 2
    assert seen[1].version != reopen(repo).version  # or nobody would look at it again
    assert seen[2].version == reopen(repo).version


@pytest.mark.parametrize("registry", [FILE, SQL], ids=["file", "sql"])
def test_a_view_that_is_applied_anew_has_been_materialized_all_the_same(tmp_path, registry):
    store = configure(tmp_path, registry, versions=False)
    store.apply([DRIVER, view()])
    latest = store.get_feature_view("stats")
    store.registry.apply_materialization(latest, "demo", NOW - timedelta(days=1), NOW)

    store.apply([DRIVER, view("stats", "rating", "trips")])
    message = open_feature_repo(tmp_path)._state.message.feature_views[0]
    message.meta.state = FeatureViewState.MATERIALIZING.value

    assert unservable_state(message) == 0


def test_a_view_that_is_being_materialized_is_read(tmp_path):
    store = configure(tmp_path, versions=False)
    store.apply([DRIVER, view()])
    put(store, "stats", driver_id=[1], rating=[4.5])
    latest = store.get_feature_view("stats")
    store.registry.apply_materialization(latest, "demo", NOW - timedelta(days=1), NOW)
    set_state(store, FeatureViewState.MATERIALIZING)
    repo = open_feature_repo(tmp_path)

    (found,) = repo._state.message.feature_views
    assert found.meta.state == FeatureViewState.MATERIALIZING.value
    assert values(repo, repo.compile_references(["stats:rating"])) == [4.5]


@pytest.mark.parametrize("registry", [FILE, SQL], ids=["file", "sql"])
def test_a_materialization_is_no_other_state_of_the_registry(tmp_path, registry, monkeypatch):
    store = configure(tmp_path, registry)
    store.apply([DRIVER, view(), FeatureService(name="rated", features=[view()])])
    repo = open_feature_repo(tmp_path)
    seen = []

    def look(**_):
        message = reopen(repo)._state.message
        seen.append((message.feature_views[0].meta.state, reopen(repo).version))

    monkeypatch.setattr(store._get_provider(), "materialize_single_feature_view", look)
    for _ in range(2):  # of a view without a state, and of one that is available
        store.materialize(NOW - timedelta(days=1), NOW)

    states, versions = zip(*seen, strict=True)
    if registry == FILE:  # Feast 0.67 does not write a state alone to a SQL registry
        assert states[-1] == FeatureViewState.MATERIALIZING.value
    assert set(versions) == {repo.version}
    after = reopen(repo)
    assert len(after._state.message.feature_views[0].meta.materialization_intervals) == 2
    assert after.version == repo.version

    store.apply([view("stats", "rating", "trips")])
    assert reopen(repo).version != repo.version


def plus_one(frame):
    return frame.assign(rating=frame["rating"] + 1)


def test_materializing_a_view_with_a_function_is_no_other_state_of_the_registry(tmp_path):
    store = configure(tmp_path)
    stream = KafkaSource(
        name="stream",
        kafka_bootstrap_servers="nowhere",
        topic="t",
        timestamp_field="event_timestamp",
        batch_source=SOURCE,
        message_format=JsonFormat(schema_json="driver_id integer, rating float"),
    )
    streamed = StreamFeatureView(
        name="streamed",
        entities=[DRIVER],
        ttl=timedelta(0),
        schema=[Field(name="driver_id", dtype=Int64), Field(name="rating", dtype=Float32)],
        source=stream,
        timestamp_field="event_timestamp",
        udf=plus_one,
    )
    store.apply([DRIVER, streamed])
    repo = open_feature_repo(tmp_path)

    store.registry.apply_materialization(streamed, "demo", NOW - timedelta(days=1), NOW)

    # Feast pickles the function anew, which need not give the same bytes.
    registry = tmp_path / "registry.db"
    message = Registry.FromString(registry.read_bytes())
    spec = message.stream_feature_views[0].spec
    assert spec.user_defined_function.body
    spec.user_defined_function.body += b" "
    spec.feature_transformation.user_defined_function.body += b" "
    registry.write_bytes(message.SerializeToString())
    assert reopen(repo).version == repo.version


def test_a_view_that_is_not_available_any_more_is_another_state_of_the_registry(tmp_path):
    store = configure(tmp_path)
    store.apply([DRIVER, view()])
    repo = open_feature_repo(tmp_path)
    latest = store.get_feature_view("stats")
    latest.state = FeatureViewState.GENERATED
    store.registry.apply_feature_view(latest, "demo")

    assert reopen(repo).version != repo.version


def test_a_label_view_is_read_like_any_other_and_is_a_neighbour(tmp_path):
    store = configure(tmp_path, versions=False)
    labels = LabelView(
        name="labels",
        entities=[DRIVER],
        schema=[Field(name="driver_id", dtype=Int64), Field(name="good", dtype=Float32)],
        source=SOURCE,
        ttl=timedelta(0),
        labeler_field="labeler",
    )
    store.apply([DRIVER, view(), labels, FeatureService(name="judged", features=[labels])])
    put(store, "labels", driver_id=[1], good=[0.5])
    repo = open_feature_repo(tmp_path)

    assert values(repo, repo.compile("judged")) == [0.5]
    assert (("driver_id",), "labels", "good") in list(repo._views.stored())
    assert [one.name for one in repo.stored_views()] == ["labels", "stats"]


@pytest.mark.parametrize("dtype", [PdfBytes, ImageBytes])
def test_documents_and_pictures_are_read_as_bytes(tmp_path, dtype):
    store = configure(tmp_path, versions=False)
    store.apply([DRIVER, view("scans", "scan", dtype=dtype)])
    put(store, "scans", driver_id=[1], scan=[b"\x89PNG"])
    repo = open_feature_repo(tmp_path)

    assert values(repo, repo.compile_references(["scans:scan"])) == [b"\x89PNG"]


def test_a_repository_without_services_serves_its_views(tmp_path):
    configure(tmp_path).apply([DRIVER, view()])
    repo = open_feature_repo(tmp_path)

    assert repo.services() == ()
    assert len(repo.compile_references(["stats:rating"]).features) == 1
    with pytest.raises(UnknownFeatures, match=r"no feature service 'any'; there is none$"):
        repo.compile("any")


def test_a_repository_without_services_and_views_is_refused(tmp_path):
    configure(tmp_path).apply([DRIVER])

    with pytest.raises(StartupError, match="no feature service in project 'demo', and no feature"):
        open_feature_repo(tmp_path)


def test_a_view_with_the_name_of_another_ones_version_is_refused(tmp_path):
    store = configure(tmp_path)
    store.apply([DRIVER, view()])
    store.apply([DRIVER, view("stats", "rating", "trips")])
    rival = view("stats_v1", "speed")
    store.apply([DRIVER, rival, FeatureService(name="rival", features=[rival])])
    repo = open_feature_repo(tmp_path)

    for references in (["stats:rating"], ["stats@v1:rating"], ["stats_v1:speed"]):
        with pytest.raises(FeaturePlanError, match="are both stored as 'stats_v1'"):
            repo.compile_references(references)
    with pytest.raises(FeaturePlanError, match="are both stored as 'stats_v1'"):
        repo.compile("rival")
    assert len(repo.compile_references(["stats@v0:rating"]).features) == 1
    assert repo.collisions() == ["feature views stats, stats_v1 are all stored as 'stats_v1'"]


def test_what_old_versions_left_in_the_store_are_neighbours(tmp_path):
    store = configure(tmp_path)
    for features in (("rating",), ("rating", "trips"), ("rating", "late")):
        store.apply([DRIVER, view("stats", *features)])
    stored = set(open_feature_repo(tmp_path)._views.stored())

    assert {(name, feature) for _, name, feature in stored} == {
        *(("stats", "rating"), ("stats_v1", "rating"), ("stats_v1", "trips")),
        *(("stats_v2", "rating"), ("stats_v2", "late")),
    }
