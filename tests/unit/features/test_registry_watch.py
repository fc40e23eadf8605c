"""Following a registry: what changes is taken over, whenever it changes; what breaks is not."""

import time
from datetime import timedelta

import pytest
from feast import Entity, FeatureService, FeatureStore, FeatureView, Field, FileSource, ValueType
from feast.types import Float32, Int64

from headrace.features import registry_watch
from headrace.features.registry_watch import RegistryWatch
from headrace.features.repo import open_feature_repo

DRIVER = Entity(name="driver", join_keys=["driver_id"], value_type=ValueType.INT64)
SOURCE = FileSource(name="unread", path="unread.parquet", timestamp_field="event_timestamp")
SQL = "{registry_type: sql, path: 'sqlite:///{path}/registry.db', cache_ttl_seconds: %d}"

pytestmark = pytest.mark.filterwarnings("ignore::Warning")


def view(ttl_s=0, name="stats"):
    schema = [Field(name="driver_id", dtype=Int64), Field(name="rating", dtype=Float32)]
    ttl = timedelta(seconds=ttl_s)
    return FeatureView(name=name, entities=[DRIVER], ttl=ttl, schema=schema, source=SOURCE)


def apply(path, *objects):
    """As another process would."""
    FeatureStore(repo_path=str(path)).apply([DRIVER, *objects])


def a_repo(path, registry="registry.db"):
    registry = registry.replace("{path}", str(path))
    (path / "feature_store.yaml").write_text(
        f"project: watched\nprovider: local\nregistry: {registry}\n"
        "online_store: {type: redis, connection_string: '127.0.0.1:1'}\n"
        "entity_key_serialization_version: 3\n"
    )
    apply(path, view(), FeatureService(name="first", features=[view()]))
    return open_feature_repo(path)


@pytest.fixture
def repo(tmp_path):
    return a_repo(tmp_path)


class Watched:
    """A watch that is looked with by hand, and what it has taken over."""

    def __init__(self, repo):
        self.taken = []
        self.watch = RegistryWatch(repo, self.taken.append, 60.0)

    def look(self, times=1):
        for _ in range(times):
            self.watch.look()


def test_what_stays_as_it_is_is_not_taken_over(repo):
    watched = Watched(repo)
    watched.look(3)
    assert (watched.taken, watched.watch.reads, watched.watch.failures) == ([], 0, 0)


def test_a_change_is_taken_over_once_it_has_stood_still(repo, tmp_path):
    watched = Watched(repo)
    watched.look()
    apply(tmp_path, FeatureService(name="second", features=[view()]))
    watched.look()
    assert watched.taken == []
    watched.look(3)
    assert [one.services() for one in watched.taken] == [("first", "second")]


def test_a_change_between_opening_and_watching_is_not_lost(repo, tmp_path):
    apply(tmp_path, FeatureService(name="second", features=[view()]))
    watched = Watched(repo)
    watched.look(3)
    assert [one.services() for one in watched.taken] == [("first", "second")]


def test_a_half_written_registry_is_unreadable_or_waited_for_and_never_served(repo, tmp_path):
    file = tmp_path / "registry.db"
    apply(tmp_path, FeatureService(name="second", features=[view()]))
    whole = file.read_bytes()
    watched = Watched(repo)
    for size in range(0, len(whole), max(1, len(whole) // 20)):  # each look finds more of it
        file.write_bytes(whole[:size])
        watched.look()
    assert watched.taken == []
    file.write_bytes(whole)
    watched.look(3)
    assert [one.services() for one in watched.taken] == [("first", "second")]
    assert watched.watch.is_readable


def test_a_registry_that_stays_broken_is_said_to_be_and_read_when_it_is_whole(repo, tmp_path):
    file = tmp_path / "registry.db"
    whole = file.read_bytes()
    watched = Watched(repo)
    file.write_bytes(b"\xff" * 100)
    watched.look(3)
    assert (watched.watch.is_readable, watched.taken) == (False, [])
    file.write_bytes(whole)
    watched.look(3)
    assert (watched.watch.is_readable, watched.taken) == (True, [])


def test_deleting_the_last_service_is_a_change_like_any_other(repo, tmp_path):
    watched = Watched(repo)
    watched.look()
    FeatureStore(repo_path=str(tmp_path)).delete_feature_service("first")
    watched.look(3)
    assert [one.services() for one in watched.taken] == [()]
    assert watched.watch.is_readable


def test_what_could_not_be_taken_over_is_tried_again(repo, tmp_path):
    taken, fails = [], [True]

    def swap(state):
        if fails.pop() if fails else False:
            raise RuntimeError("not now")
        taken.append(state)

    watch = RegistryWatch(repo, swap, 0.02)
    apply(tmp_path, FeatureService(name="second", features=[view()]))
    watch.start()
    deadline_s = time.monotonic() + 20
    while not taken:
        assert time.monotonic() < deadline_s
        time.sleep(0.02)
    watch.stop(5)
    assert [one.services() for one in taken] == [("first", "second")]


@pytest.fixture
def at_once(monkeypatch):
    monkeypatch.setattr(registry_watch, "OTHER_PERIOD_MIN_S", 0.0)


@pytest.mark.usefixtures("at_once")
def test_changes_of_a_sql_registry_are_taken_over(tmp_path):
    watched = Watched(a_repo(tmp_path, SQL.replace("%d", "1")))
    watched.look()
    assert watched.taken == []

    for objects in (
        [FeatureService(name="second", features=[view()])],
        [view(ttl_s=60)],
        [Entity(name="user", join_keys=["user_id"], value_type=ValueType.INT64)],
    ):
        apply(tmp_path, *objects)
        watched.taken.clear()
        deadline_s = time.monotonic() + 20
        while not watched.taken:
            assert time.monotonic() < deadline_s
            watched.look()
            time.sleep(0.05)
    assert watched.taken[0].services() == ("first", "second")
    assert watched.taken[0].compile("first").features[0].ttl_s == 60.0


@pytest.mark.usefixtures("at_once")
def test_a_ttl_of_zero_is_for_ever_but_for_one_look_at_the_start(tmp_path):
    repo = a_repo(tmp_path, SQL.replace("%d", "0"))
    apply(tmp_path, FeatureService(name="second", features=[view()]))
    watched = Watched(repo)
    watched.look()
    assert [one.services() for one in watched.taken] == [("first", "second")]

    apply(tmp_path, FeatureService(name="third", features=[view()]))
    watched.look(5)
    assert len(watched.taken) == 1
