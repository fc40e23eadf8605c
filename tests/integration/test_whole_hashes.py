"""Wide reads take whole hashes from a real server, and find the same."""

import numpy as np
import pytest
from redis import Redis

from headrace.features.layout import feature_field, time_field
from headrace.features.plan import FeatureSource, FeatureStatus, ViewSource, compile_plan
from headrace.features.redis_options import RedisOptions
from headrace.features.redis_pool import RedisPool
from headrace.features.redis_store import RedisStore
from headrace.features.values import ValueType, encode_message

WIDTH = 30
KEY = (("item_id", "item_id", ValueType.INT64),)
NAMES = [f"f{i}" for i in range(WIDTH)]
PLAN = compile_plan(
    "wide",
    "whole",
    "1",
    [ViewSource("view", KEY, tuple(FeatureSource(name, ValueType.FLOAT) for name in NAMES))],
)


@pytest.fixture
def redis(valkey):
    with Redis(port=valkey.port) as client:
        for item in range(3):
            fields = {
                feature_field("view", name): encode_message(item + i / 2, ValueType.FLOAT)
                for i, name in enumerate(NAMES)
            }
            fields[time_field("view")] = b"\x08\xa5\xbb\xb5\xf0\x05"
            group = PLAN.groups[0]
            key = b"\4\0\0\0\x08\0\0\0" + item.to_bytes(8, "little")
            client.hset(group.key_prefix + key + group.key_suffix, mapping=fields)
        client.config_resetstat()
        yield client
        client.flushall()


def calls(redis):
    return {name[8:]: stats["calls"] for name, stats in redis.info("commandstats").items()}


def read(store):
    return store.read(PLAN, {"item_id": np.array([2, 7, 0])}, now_s=2e9, timeout_s=1.0)


def check(rows):
    assert rows.statuses[:, 1].tolist() == [FeatureStatus.NOT_FOUND] * WIDTH
    assert rows.statuses[:, [0, 2]].tolist() == [[FeatureStatus.PRESENT] * 2] * WIDTH
    assert rows.matrix[0].tolist() == [2 + i / 2 for i in range(WIDTH)]
    assert rows.event_times_s[0, 0] == 1577934245


def test_a_wide_read_of_small_hashes_takes_them_whole(valkey, redis):
    store = RedisStore(RedisPool.to(RedisOptions(port=valkey.port)))
    for _ in range(3):
        check(read(store))
    store.close()

    assert "hmget" not in calls(redis)
    assert calls(redis)["hgetall"] == 3 + 3 * 3  # a look at the three, then three reads


def test_hashes_with_much_else_in_them_are_read_by_field(valkey, redis):
    for key in redis.scan_iter():
        redis.hset(key, mapping={f"other{i}": 1 for i in range(200)})
    store = RedisStore(RedisPool.to(RedisOptions(port=valkey.port)))
    for _ in range(3):
        check(read(store))
    store.close()

    assert calls(redis)["hmget"] == 3 * 3


def test_who_may_not_read_whole_hashes_reads_fields(valkey, redis):
    redis.acl_setuser("plain", enabled=True, nopass=True, keys=["*"], commands=["+hmget", "+echo"])
    store = RedisStore(
        RedisPool.to(RedisOptions(port=valkey.port, username="plain", password="any"))
    )
    check(read(store))
    store.close()
    redis.acl_deluser("plain")

    assert calls(redis)["hmget"] == 3


def test_a_user_who_loses_the_right_is_served_again_at_once(valkey, redis):
    store = RedisStore(RedisPool.to(RedisOptions(port=valkey.port)))
    check(read(store))
    redis.acl_setuser("default", commands=["-hgetall"])
    try:
        check(read(store))
    finally:
        redis.acl_setuser("default", commands=["+hgetall"])
    store.close()
