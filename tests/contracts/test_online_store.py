"""What every online store promises, over real servers that Feast itself has written to."""

import threading
import warnings
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import numpy as np
import pytest
from feast import Entity, FeatureService, FeatureStore, FeatureView, Field, FileSource, ValueType
from feast.protos.feast.types.EntityKey_pb2 import EntityKey
from feast.type_map import python_values_to_proto_values
from feast.types import Array, Bool, Bytes, Float32, Float64, Int32, Int64, String
from feast.types import UnixTimestamp as Time
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from redis_processes import BRANDS, alone, cluster, sentinel

from headrace.features.feast_store import FeastStore
from headrace.features.memory_store import MemoryStore
from headrace.features.plan import FeatureStatus
from headrace.features.repo import open_feature_repo

PRESENT, NULL, NOT_FOUND, OUTSIDE = FeatureStatus
T0 = datetime(2024, 1, 2, 3, 4, 5, tzinfo=UTC)
T0_S = T0.timestamp()
NOW_S = T0_S + 60.0
STORES = [
    *("memory", "redis", "redis cluster", "redis by sentinel"),
    *("feast over redis", "feast over sqlite"),
]

# (view, entity, values, event time); a feature that is left out is not written.
FIRST = {
    "name": "Zoë",
    "blob": b"\x00\r\n$5\r\n",
    "active": True,
    "score": 1 / 3,
    "level": -7,
    "joined": 1_700_000_000,
    "embedding": [0.5, -2.0],
}
ROWS = [
    ("stats", {"driver_id": 1}, {"rating": 0.5, "trips": 300}, T0),
    ("stats", {"driver_id": 2}, {"rating": None, "trips": -1}, T0 + timedelta(seconds=7)),
    ("stats", {"driver_id": 4}, {"rating": 4.0, "trips": 0}, T0 - timedelta(hours=2)),
    ("profile", {"driver_id": 1}, FIRST, T0),
    ("profile", {"driver_id": 2}, dict.fromkeys(FIRST), T0),
    ("profile", {"driver_id": 3}, {**FIRST, "name": "", "active": False}, T0),
    ("profile", {"driver_id": 4}, FIRST, T0 - timedelta(days=9000)),
    ("pairs", {"driver_id": 1, "customer_id": "abc"}, {"rides": 9}, T0),
    ("pairs", {"driver_id": 1, "customer_id": "é"}, {"rides": 10}, T0),
    ("overall", {}, {"mean": 2.5}, T0),
]


def definitions():
    driver = Entity(name="driver", join_keys=["driver_id"], value_type=ValueType.INT64)
    customer = Entity(name="customer", join_keys=["customer_id"], value_type=ValueType.STRING)
    source = FileSource(name="source", path="unread.parquet", timestamp_field="event_timestamp")

    def view(name, entities, ttl, /, **fields):
        types = {"driver_id": Int64, "customer_id": String}
        keys = {entity.join_key: types[entity.join_key] for entity in entities}
        schema = [Field(name=field, dtype=dtype) for field, dtype in {**keys, **fields}.items()]
        return FeatureView(name=name, entities=entities, ttl=ttl, schema=schema, source=source)

    stats = view("stats", [driver], timedelta(hours=1), rating=Float32, trips=Int64)
    profile = view(
        "profile",
        [driver],
        timedelta(0),
        name=String,
        blob=Bytes,
        active=Bool,
        score=Float64,
        level=Int32,
        joined=Time,
        embedding=Array(Float32),
    )
    pairs = view("pairs", [driver, customer], timedelta(0), rides=Int64)
    overall = view("overall", [], timedelta(0), mean=Float32)
    # Both have aliases: Feast 0.67 cannot compare a projection that has one with one that has none.
    own = stats[["trips"]].with_name("own")
    rival = stats[["rating"]].with_name("rival").with_join_key_map({"driver_id": "rival_id"})
    return [
        driver,
        customer,
        stats,
        profile,
        pairs,
        overall,
        FeatureService(name="everything", features=[profile, stats, pairs, overall]),
        FeatureService(name="of_driver", features=[profile, stats]),
        FeatureService(name="floats", features=[stats[["rating"]], overall]),
        FeatureService(name="rivals", features=[own, rival]),
        FeatureService(name="overall_only", features=[overall]),
    ]


def write_through_feast(feast_store, rows):
    def proto(value, value_type):
        return python_values_to_proto_values([value], value_type)[0]

    for name, entity, values, at in rows:
        view = feast_store.get_feature_view(name)
        types = {field.name: field.dtype.to_value_type() for field in view.features}
        keys = {
            key: proto(value, ValueType.STRING if isinstance(value, str) else ValueType.INT64)
            for key, value in (entity or {"__dummy_id": ""}).items()
        }
        row = (
            EntityKey(join_keys=list(keys), entity_values=list(keys.values())),
            {feature: proto(value, types[feature]) for feature, value in values.items()},
            at,
            None,
        )
        feast_store._get_provider().online_write_batch(
            feast_store.config, view, [row], lambda _: None
        )


@pytest.fixture(scope="module", params=BRANDS)
def topologies(request, tmp_path_factory):
    """Connection settings, as Feast has them, of servers in every arrangement."""
    folder = tmp_path_factory.mktemp("servers")
    with (
        alone(request.param, folder) as server,
        cluster(request.param, folder) as nodes,
        sentinel(request.param, folder) as (_, _, watcher),
    ):
        yield {
            "redis": f"connection_string: '127.0.0.1:{server.port}'",
            "redis cluster": "redis_type: redis_cluster, connection_string: "
            f"'127.0.0.1:{nodes[1].port},127.0.0.1:{nodes[2].port}'",
            "redis by sentinel": "redis_type: redis_sentinel, sentinel_master: features, "
            f"connection_string: '127.0.0.1:{watcher.port}'",
        }


@pytest.fixture(scope="module")
def world(topologies, tmp_path_factory):
    """One set of definitions and rows, applied and written to Redis, SQLite and memory."""
    warnings.simplefilter("ignore")  # within this fixture Feast may say what it likes
    online_stores = {
        **{kind: f"{{type: redis, {where}}}" for kind, where in topologies.items()},
        "sqlite": "{type: sqlite, path: online.db}",
    }
    repos, feast_stores = {}, {}
    for kind, online_store in online_stores.items():
        path = tmp_path_factory.mktemp(kind.replace(" ", "_"))
        (path / "feature_store.yaml").write_text(
            "project: contract\nregistry: registry.db\nprovider: local\n"
            f"online_store: {online_store}\nentity_key_serialization_version: 3\n"
        )
        feast_stores[kind] = FeatureStore(repo_path=str(path))
        feast_stores[kind].apply(definitions())
        write_through_feast(feast_stores[kind], ROWS)
        repos[kind] = open_feature_repo(path)
    memory = MemoryStore()
    for view, entity, values, at in ROWS:
        memory.put(view, entity, values, at.timestamp())
    stores = {
        "memory": memory,
        **{kind: repos[kind].online_store() for kind in topologies},
        "feast over redis": FeastStore(feast_stores["redis"].config),
        "feast over sqlite": repos["sqlite"].online_store(),
    }
    services = repos["redis"].services()
    plans = {service: repos["redis"].compile(service) for service in services}
    yield SimpleNamespace(stores=stores, plans=plans, repos=repos, feast=feast_stores["redis"])
    for store in stores.values():
        store.close()


@pytest.fixture(params=STORES)
def read(request, world):
    store = world.stores[request.param]

    def read_rows(service, *, now_s=NOW_S, max_age_s=None, **columns):
        plan = world.plans[service]
        entities = {
            name: np.array(values, np.object_ if isinstance(values[0], bytes) else np.int64)
            for name, values in columns.items()
        }
        rows = store.read(plan, entities, now_s=now_s, timeout_s=10.0, max_age_s=max_age_s)
        names = [feature.name for feature in plan.features]
        return SimpleNamespace(
            rows=rows,
            plan=plan,
            values=dict(zip(names, rows.values, strict=True)),
            statuses=dict(zip(names, rows.statuses.tolist(), strict=True)),
        )

    return read_rows


def test_values_of_every_type_come_back_as_they_were_written(read):
    got = read("of_driver", driver_id=[1])
    expected = {**FIRST, "rating": 0.5, "trips": 300}
    assert {name: column[0] for name, column in got.values.items()} == expected
    assert got.rows.statuses.tolist() == [[PRESENT]] * len(got.plan.features)


def test_columns_have_the_dtypes_and_the_order_that_the_plan_names(read):
    got = read("of_driver", driver_id=[1, 9])
    assert [column.dtype for column in got.rows.values] == [f.dtype for f in got.plan.features]
    assert [feature.name for feature in got.plan.features] == [*FIRST, "rating", "trips"]
    assert got.rows.matrix is None


def test_an_entity_without_a_row_is_not_found_and_holds_fillers(read):
    got = read("of_driver", driver_id=[1, 9])
    assert got.rows.statuses[:, 1].tolist() == [NOT_FOUND] * len(got.plan.features)
    assert got.rows.statuses[:, 0].tolist() == [PRESENT] * len(got.plan.features)
    assert np.isnan(got.values["rating"][1])
    assert np.isnan(got.values["score"][1])
    assert [got.values[name][1] for name in ("name", "embedding", "blob")] == [None] * 3
    assert [got.values[name][1] for name in ("trips", "level", "joined", "active")] == [0] * 4


def test_a_view_without_a_row_is_not_found_beside_one_that_has_one(read):
    got = read("of_driver", driver_id=[3])
    assert (got.statuses["rating"], got.statuses["score"]) == ([NOT_FOUND], [PRESENT])
    assert (got.values["name"][0], got.values["active"][0]) == ("", False)


def test_a_null_is_a_null_value_and_no_missing_row(read):
    got = read("of_driver", driver_id=[2])
    assert [got.statuses[name] for name in FIRST] == [[NULL]] * len(FIRST)
    assert (got.statuses["rating"], got.statuses["trips"]) == ([NULL], [PRESENT])
    assert np.isnan(got.values["rating"][0])
    assert got.values["trips"][0] == -1


def test_a_value_older_than_its_views_ttl_is_outside_max_age_and_still_given(read):
    got = read("of_driver", driver_id=[4])
    assert (got.statuses["rating"], got.statuses["trips"]) == ([OUTSIDE], [OUTSIDE])
    assert got.values["rating"][0] == 4.0


def test_a_ttl_of_zero_is_for_ever(read):
    assert read("of_driver", driver_id=[4]).statuses["score"] == [PRESENT]


@pytest.mark.parametrize(
    ("age_s", "max_age_s", "status"),
    [
        (3600.0, None, PRESENT),
        (3600.5, None, OUTSIDE),
        (10.0, 10.0, PRESENT),
        (10.5, 10.0, OUTSIDE),
        (3600.5, 9000.0, OUTSIDE),
    ],
)
def test_the_smaller_of_ttl_and_max_age_decides(read, age_s, max_age_s, status):
    got = read("floats", driver_id=[1], now_s=T0_S + age_s, max_age_s=max_age_s)
    assert got.statuses["rating"] == [status]


def test_nulls_and_missing_rows_do_not_age(read):
    got = read("of_driver", driver_id=[2, 9], now_s=NOW_S + 1e9)
    assert got.statuses["rating"] == [NULL, NOT_FOUND]


def test_rows_come_in_the_order_of_the_entities_however_often_one_occurs(read):
    got = read("of_driver", driver_id=[4, 1, 9, 1, 2, 4])
    assert got.values["trips"].tolist() == [0, 300, 0, 300, -1, 0]
    assert got.statuses["trips"] == [OUTSIDE, PRESENT, NOT_FOUND, PRESENT, PRESENT, OUTSIDE]


def test_views_of_several_entities_are_joined_row_by_row(read):
    got = read(
        "everything", driver_id=[1, 1, 2, 1], customer_id=[b"abc", b"no", b"abc", "é".encode()]
    )
    assert got.values["rides"].tolist() == [9, 0, 0, 10]
    assert got.statuses["rides"] == [PRESENT, NOT_FOUND, NOT_FOUND, PRESENT]
    assert got.values["trips"].tolist() == [300, 300, -1, 300]
    assert got.values["mean"].tolist() == [2.5] * 4


def test_a_text_key_that_is_not_utf8_names_no_entity(read):
    got = read("everything", driver_id=[1], customer_id=[b"\xff"])
    assert got.statuses["rides"] == [NOT_FOUND]


def test_a_projection_reads_the_entity_that_its_own_column_names(read):
    got = read("rivals", driver_id=[1, 4], rival_id=[4, 1])
    assert got.values["trips"].tolist() == [300, 0]
    assert got.values["rating"].tolist() == [4.0, 0.5]


def test_event_times_are_given_per_view(read):
    got = read("of_driver", driver_id=[2, 9])
    times_s = dict(zip([v.name for v in got.plan.views], got.rows.event_times_s, strict=True))
    assert times_s["stats"][0] == T0_S + 7
    assert times_s["profile"][0] == T0_S
    assert np.isnan(got.rows.event_times_s[:, 1]).all()


def test_float_features_are_one_matrix_and_the_values_are_its_columns(read):
    got = read("floats", driver_id=[1, 4, 9])
    assert got.rows.matrix.dtype == np.float32
    assert got.rows.matrix.flags.c_contiguous
    np.testing.assert_array_equal(got.rows.matrix, [[0.5, 2.5], [4.0, 2.5], [np.nan, 2.5]])
    assert all(np.shares_memory(column, got.rows.matrix) for column in got.rows.values)


def test_a_service_without_entities_has_as_many_rows_as_the_request(world, read):
    assert world.plans["overall_only"].join_keys == ()
    assert read("overall_only", anything=[0, 0, 0]).values["mean"].tolist() == [2.5] * 3


@pytest.mark.parametrize("name", STORES)
def test_threads_do_not_see_each_others_rows(world, name):
    plan, wrong = world.plans["of_driver"], []
    trips = {1: 300, 2: -1, 4: 0}

    def reader(driver):
        keys = {"driver_id": np.array([driver] * 3, np.int64)}
        for _ in range(20):
            rows = world.stores[name].read(plan, keys, now_s=NOW_S, timeout_s=30.0)
            if rows.values[-1].tolist() != [trips[driver]] * 3:
                wrong.append(driver)

    threads = [threading.Thread(target=reader, args=(driver,)) for driver in trips]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert wrong == []


@pytest.mark.parametrize("name", STORES)
def test_a_store_that_is_there_passes_its_check(world, name):
    world.stores[name].check()


# What Feast writes, and any number of rows of it, reads the same through both.

FINITE = st.floats(width=32, allow_nan=False)
PROFILES = st.fixed_dictionaries(
    {},
    optional={
        "name": st.none() | st.text(max_size=80),
        "blob": st.none() | st.binary(max_size=200),
        "active": st.none() | st.booleans(),
        "score": st.none() | st.floats(allow_nan=False),
        "level": st.none() | st.integers(-(2**31), 2**31 - 1),
        "joined": st.none() | st.integers(0, 2**40),
        "embedding": st.none() | st.lists(FINITE, min_size=1, max_size=5),
    },
)
STATS = st.fixed_dictionaries(
    {},
    optional={"rating": st.none() | FINITE, "trips": st.none() | st.integers(-(2**63), 2**63 - 1)},
)
TIMES = st.integers(86_400_000, 2**42).map(lambda ms: datetime.fromtimestamp(ms / 1000, UTC))
DRIVERS = st.lists(st.tuples(PROFILES, STATS, TIMES), min_size=1, max_size=4)
next_driver = iter(range(10_000, 10**9))


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(drivers=DRIVERS, data=st.data())
def test_redis_reads_what_feast_reads(world, drivers, data):
    ids = [next(next_driver) for _ in range(len(drivers) + 1)]  # the last one has no row
    rows = []
    for driver, (profile, stats, at) in zip(ids, drivers, strict=False):
        key = {"driver_id": driver}
        rows += [
            (view, key, values, at)
            for view, values in (("profile", profile), ("stats", stats))
            if values
        ]
    write_through_feast(world.feast, rows)
    asked = data.draw(st.lists(st.sampled_from(ids), min_size=1, max_size=8))
    plan = world.plans["of_driver"]
    entities = {"driver_id": np.array(asked, np.int64)}
    own = world.stores["redis"].read(plan, entities, now_s=0.0, timeout_s=10.0)
    theirs = world.stores["feast over redis"].read(plan, entities, now_s=0.0, timeout_s=10.0)
    for feature, mine, feasts in zip(plan.features, own.values, theirs.values, strict=True):
        assert mine.dtype == feasts.dtype
        np.testing.assert_array_equal(mine, feasts, err_msg=feature.name)
    np.testing.assert_array_equal(own.statuses == PRESENT, theirs.statuses == PRESENT)
    known = ~np.isnan(theirs.event_times_s)
    np.testing.assert_allclose(
        own.event_times_s[known], theirs.event_times_s[known], rtol=0, atol=1e-5
    )


CUSTOMERS = st.text(st.characters(blacklist_categories=["Cs"]), min_size=1, max_size=12)


def as_feast_shows(value, feature):
    """What `to_dict` gives for a value that was read."""
    if feature == "joined":
        return datetime.fromtimestamp(int(value), UTC)
    if feature == "embedding":
        return list(value)
    return value.item() if isinstance(value, np.generic) else value


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    drivers=DRIVERS,
    customers=st.lists(CUSTOMERS, min_size=1, max_size=3, unique=True),
    rides=st.none() | st.integers(-(2**63), 2**63 - 1),
    data=st.data(),
)
@pytest.mark.filterwarnings("ignore")  # Feast's own
def test_a_plan_reads_what_get_online_features_returns(world, drivers, customers, rides, data):
    ids = [next(next_driver) for _ in range(len(drivers) + 1)]  # the last one has no row
    rows = [("pairs", {"driver_id": ids[0], "customer_id": customers[0]}, {"rides": rides}, T0)]
    for driver, (profile, stats, at) in zip(ids, drivers, strict=False):
        if profile.get("joined"):
            profile["joined"] %= 2**37  # Feast shows no time after the year 9999
        for view, values in (("profile", profile), ("stats", stats)):
            if values:
                rows.append((view, {"driver_id": driver}, values, at))
    write_through_feast(world.feast, rows)
    asked = data.draw(
        st.lists(
            st.tuples(st.sampled_from(ids), st.sampled_from(customers)), min_size=1, max_size=6
        )
    )
    plan = world.plans["everything"]
    entities = {
        "driver_id": np.array([driver for driver, _ in asked], np.int64),
        "customer_id": np.array([customer.encode() for _, customer in asked], np.object_),
    }

    mine = world.stores["redis"].read(plan, entities, now_s=0.0, timeout_s=10.0)
    feasts = world.feast.get_online_features(
        features=world.feast.get_feature_service("everything"),
        entity_rows=[{"driver_id": d, "customer_id": c} for d, c in asked],
    ).to_dict()

    for feature, values, statuses in zip(plan.features, mine.values, mine.statuses, strict=True):
        for row, theirs in enumerate(feasts[feature.name]):
            if statuses[row] == PRESENT:
                assert as_feast_shows(values[row], feature.name) == theirs, feature.name
            else:
                assert theirs is None, feature.name
