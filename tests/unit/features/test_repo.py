"""Opening a Feast repository: what is compiled from it, and what is refused."""

import builtins
from datetime import timedelta

import dill
import pandas as pd
import pytest
from feast import (
    Entity,
    FeatureService,
    FeatureStore,
    FeatureView,
    Field,
    FileSource,
    RequestSource,
    ValueType,
)
from feast.on_demand_feature_view import on_demand_feature_view
from feast.types import Float32, Float64, Int64, Map, String

from headrace.errors import ModelLoadError, StartupError
from headrace.features.feast_store import FeastStore
from headrace.features.redis_store import RedisStore
from headrace.features.repo import open_feature_repo

CONFIG = """\
project: demo
provider: local
registry: {{path: registry.db, enable_online_feature_view_versioning: {versions}}}
online_store: {online_store}
entity_key_serialization_version: 3
"""
REDIS = "{type: redis, connection_string: 'localhost:6379'}"

pytestmark = pytest.mark.filterwarnings("ignore:On demand feature view:RuntimeWarning")


def write_config(path, online_store=REDIS, *, versions=False):
    text = CONFIG.format(online_store=online_store, versions=str(versions).lower())
    (path / "feature_store.yaml").write_text(text)
    return path


def definitions():
    driver = Entity(name="driver", join_keys=["driver_id"], value_type=ValueType.INT64)
    source = FileSource(name="source", path="unread.parquet", timestamp_field="event_timestamp")
    stats = FeatureView(
        name="stats",
        entities=[driver],
        ttl=timedelta(hours=1),
        schema=[
            Field(name="driver_id", dtype=Int64),
            Field(name="rating", dtype=Float32, tags={"headrace.default": "3.5"}),
            Field(name="trips", dtype=Int64),
        ],
        source=source,
    )
    odd = FeatureView(
        name="odd",
        entities=[driver],
        ttl=timedelta(0),
        schema=[Field(name="driver_id", dtype=Int64), Field(name="bag", dtype=Map)],
        source=source,
    )
    asleep = FeatureView(
        name="asleep",
        entities=[driver],
        ttl=timedelta(0),
        schema=[Field(name="driver_id", dtype=Int64), Field(name="dream", dtype=Float32)],
        source=source,
        enabled=False,
    )
    request = RequestSource(name="now", schema=[Field(name="text", dtype=String)])

    @on_demand_feature_view(
        sources=[stats, request], schema=[Field(name="twice", dtype=Float64)], mode="pandas"
    )
    def doubled(inputs: pd.DataFrame) -> pd.DataFrame:
        return pd.DataFrame({"twice": inputs["rating"] * 2})

    return [
        driver,
        stats,
        odd,
        asleep,
        doubled,
        FeatureService(name="ranking", features=[stats]),
        FeatureService(name="computed", features=[stats, doubled]),
        FeatureService(name="odd", features=[odd]),
        FeatureService(name="asleep", features=[asleep]),
        FeatureService(name="precomputed", features=[stats], precompute_online=True),
        FeatureService(name="renamed", features=[stats[["trips"]].with_name("own")]),
    ]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A repository applied without a server: SQLite when applied, Redis when opened."""
    path = write_config(tmp_path_factory.mktemp("repo"), "{type: sqlite, path: online.db}")
    FeatureStore(repo_path=str(path)).apply(definitions())
    return write_config(path)


@pytest.fixture
def repo(path):
    return open_feature_repo(path)


def test_a_service_is_compiled_with_what_its_definitions_say(repo):
    plan = repo.compile("ranking")
    assert (plan.service, plan.project, plan.registry_version) == ("ranking", "demo", repo.version)
    assert [(key.name, key.datatype) for key in plan.join_keys] == [("driver_id", "INT64")]
    assert [(f.name, f.view, f.ttl_s, f.default) for f in plan.features] == [
        ("rating", "stats", 3600.0, 3.5),
        ("trips", "stats", 3600.0, None),
    ]


def test_an_alias_renames_nothing_that_is_stored(repo):
    assert [feature.view for feature in repo.compile("renamed").features] == ["stats"]


def test_types_without_a_meaning_here_are_handed_on(repo):
    (bag,) = repo.compile("odd").features
    assert bag.value_type.is_opaque


def test_the_services_are_listed_in_order(repo):
    assert repo.services() == ("asleep", "computed", "odd", "precomputed", "ranking", "renamed")


@pytest.mark.parametrize(
    ("service", "message"),
    [
        ("rankin", "no feature service 'rankin'; there is asleep, computed, odd, .*ranking"),
        ("computed", "'doubled' is an on-demand feature view; Headrace runs no code"),
        ("precomputed", "precompute_online, which is not supported"),
        ("asleep", "feature view 'asleep' is disabled"),
    ],
)
def test_a_service_that_cannot_be_served_is_refused_with_the_reason(repo, service, message):
    with pytest.raises(ModelLoadError, match=message):
        repo.compile(service)


def test_no_code_in_a_registry_is_run(path, monkeypatch):
    ran = []
    for place, name in ((builtins, "exec"), (dill, "loads")):
        run = getattr(place, name)

        def watched(*args, run=run, **kwargs):
            ran.append(args)
            return run(*args, **kwargs)

        monkeypatch.setattr(place, name, watched)
    repo = open_feature_repo(path)
    with pytest.raises(ModelLoadError):
        repo.compile("computed")
    assert len(repo.compile("ranking").features) == 2
    assert ran == []
    repo._store.get_on_demand_feature_view("doubled")  # what Feast would have done
    assert ran != []


def test_a_pinned_or_later_version_of_a_view_is_stored_under_its_number(tmp_path):
    write_config(tmp_path, "{type: sqlite, path: online.db}", versions=True)
    store = FeatureStore(repo_path=str(tmp_path))
    store.apply(definitions())
    changed = definitions()
    changed[1] = FeatureView(
        name="stats",
        entities=[changed[0]],
        ttl=timedelta(hours=2),
        schema=[Field(name="driver_id", dtype=Int64), Field(name="rating", dtype=Float32)],
        source=changed[1].batch_source,
    )
    services = [
        FeatureService(name="latest", features=[changed[1]]),
        FeatureService(name="pinned", features=["stats@v0:trips"]),
    ]
    store.apply([changed[0], changed[1]])
    store.apply(services)
    repo = open_feature_repo(tmp_path)
    latest, pinned = repo.compile("latest").features[0], repo.compile("pinned").features[0]
    assert (latest.view, latest.ttl_s) == ("stats_v1", 7200.0)
    assert (pinned.view, pinned.feature, pinned.ttl_s) == ("stats", "trips", 3600.0)


def test_redis_is_read_directly_and_any_other_store_through_feast(path, tmp_path):
    assert isinstance(open_feature_repo(path).online_store(), RedisStore)
    write_config(tmp_path, "{type: sqlite, path: online.db}")
    FeatureStore(repo_path=str(tmp_path)).apply(definitions())
    store = open_feature_repo(tmp_path).online_store()
    assert isinstance(store, FeastStore)
    store.close()


@pytest.mark.parametrize("kind", ["redis_cluster", "redis_sentinel"])
def test_clusters_and_sentinels_are_read_directly_too(path, kind):
    write_config(path, f"{{type: redis, redis_type: {kind}, connection_string: 'a:1,b:2'}}")
    try:
        assert isinstance(open_feature_repo(path).online_store(), RedisStore)
    finally:
        write_config(path)


@pytest.mark.parametrize("kind", ["redis_cluster", "redis_sentinel"])
def test_what_a_topology_has_not_is_refused(path, kind):
    options = {"redis_cluster": "db=1", "redis_sentinel": "unix_socket_path=/s"}
    text = f"{{type: redis, redis_type: {kind}, connection_string: 'a:1,{options[kind]}'}}"
    write_config(path, text)
    try:
        with pytest.raises(StartupError, match="does not go with"):
            open_feature_repo(path).online_store()
    finally:
        write_config(path)


def test_a_folder_without_a_configuration_is_refused(tmp_path):
    with pytest.raises(StartupError, match=r"has no feature_store\.yaml$"):
        open_feature_repo(tmp_path)
    with pytest.raises(StartupError, match=r"has no feature_store\.yaml$"):
        open_feature_repo(tmp_path / "nowhere")


def test_a_repository_that_was_never_applied_is_refused_and_left_as_it_is(tmp_path):
    write_config(tmp_path)
    with pytest.raises(StartupError, match=r"no registry registry\.db; run `feast apply`"):
        open_feature_repo(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["feature_store.yaml"]


@pytest.mark.parametrize(
    "config",
    ["project: [", "provider: local\n", CONFIG.format(online_store="{type: none}", versions="no")],
    ids=["no YAML", "no project", "no such store"],
)
def test_a_configuration_that_feast_refuses_is_one_line(tmp_path, config):
    (tmp_path / "feature_store.yaml").write_text(config)
    (tmp_path / "registry.db").write_bytes(b"")
    with pytest.raises(StartupError, match=r"cannot be opened: .+") as caught:
        open_feature_repo(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_damaged_registry_is_one_line(tmp_path):
    write_config(tmp_path)
    (tmp_path / "registry.db").write_bytes(b"\xff" * 64)
    with pytest.raises(StartupError, match=r"cannot be opened: .+") as caught:
        open_feature_repo(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_registry_without_services_of_the_project_is_refused(tmp_path):
    write_config(tmp_path)
    (tmp_path / "registry.db").write_bytes(b"")
    with pytest.raises(StartupError, match="no feature service in project 'demo'"):
        open_feature_repo(tmp_path)
