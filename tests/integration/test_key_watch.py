"""A store that hears from Redis which cached rows have been written, over real servers."""

import struct
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import hiredis
import numpy as np
import pytest
import redis as redis_py
import structlog
from own_ids import FIELD, KEY, key_of, write_rows
from redis_processes import BRANDS, alone, cluster, sentinel, wait_until

from headrace.features.plan import FeatureSource, FeatureStatus, ViewSource, compile_plan
from headrace.features.redis_connection import RedisConnection
from headrace.features.redis_options import RedisOptions
from headrace.features.redis_store import FORGOTTEN_AT_ONCE_MAX, RedisStore
from headrace.features.redis_topologies import open_redis
from headrace.features.values import ValueType

PRESENT, NOT_FOUND = FeatureStatus.PRESENT, FeatureStatus.NOT_FOUND
FEATURES = (FeatureSource("own_id", ValueType.FLOAT),)
# Far longer than any test takes: what is seen sooner has been heard of.
PLAN = compile_plan(
    "service",
    "demo",
    "1",
    [ViewSource("view", KEY, FEATURES, cache_max_age_s="3600")],
)


def watching(kind, address):
    return RedisStore(open_redis(kind, address, ""), cache_rows=1000, hears_writes=True)


def read(store, entities):
    keys = {"id": np.array(entities, np.int64)}
    return store.read(PLAN, keys, now_s=1_700_000_001.0, timeout_s=10.0)


def ids(store, entities):
    return read(store, entities).values[0].tolist()


def write(client, entity, value):
    client.hset(key_of(entity), FIELD, b"\x35" + struct.pack("<f", value))


@pytest.fixture(scope="module", params=BRANDS)
def server(request, tmp_path_factory):
    with alone(request.param, tmp_path_factory.mktemp("server")) as server:
        yield server


@pytest.fixture
def redis(server):
    with redis_py.Redis(port=server.port) as client:
        client.flushall()
        write_rows(client, 100)
        yield client


@pytest.fixture
def store(server, redis):
    store = watching("redis", f"127.0.0.1:{server.port}")
    ids(store, [0])  # what is cached is watched from then on
    wait_until(lambda: store.is_listening, "listening")
    yield store
    store.close()


def test_a_row_that_is_written_is_seen_at_once(store, redis):
    assert ids(store, [1, 2]) == [1, 2]
    write(redis, 1, 77)
    wait_until(lambda: ids(store, [1, 2]) == [77, 2], "hearing of a write", 5)
    assert store.cache_invalidations == 1


def test_rows_that_are_not_written_stay(store, redis):
    ids(store, list(range(50)))
    misses = store.cache_misses
    write(redis, 60, 1)
    redis.set("somebody else's", 1)
    wait_until(lambda: ids(store, [60]) == [1], "hearing of a write", 5)
    assert ids(store, list(range(50))) == list(range(50))
    assert store.cache_misses - misses <= 2


def test_a_row_that_is_removed_is_not_found(store, redis):
    assert ids(store, [3]) == [3]
    redis.delete(key_of(3))
    wait_until(lambda: read(store, [3]).statuses.tolist() == [[NOT_FOUND]], "a removal", 5)


def test_a_row_that_was_missing_is_seen_when_it_is_written(store, redis):
    assert read(store, [500]).statuses.tolist() == [[NOT_FOUND]]
    write(redis, 500, 500)
    wait_until(lambda: ids(store, [500]) == [500], "hearing of a write", 5)


def test_an_emptied_database_is_seen(store, redis):
    assert ids(store, [1, 2]) == [1, 2]
    redis.flushall()
    wait_until(lambda: (read(store, [1, 2]).statuses == NOT_FOUND).all(), "an emptying", 5)


def test_a_row_that_is_written_while_it_is_read_is_not_kept(server, redis):
    servers = open_redis("redis", f"127.0.0.1:{server.port}", "")
    ask, heard = servers.ask, threading.Event()

    def ask_and_be_overtaken(packed, deadline_s):
        replies = ask(packed, deadline_s)
        servers.ask = ask
        write(redis, 1, 77)
        assert heard.wait(5)
        return replies

    store = RedisStore(servers, cache_rows=1000, hears_writes=True)
    ids(store, [0])
    wait_until(lambda: store.is_listening, "listening")
    told = store.keys_written
    store.keys_written = lambda keys: (told(keys), heard.set())
    servers.ask = ask_and_be_overtaken
    assert ids(store, [1]) == [1]
    assert ids(store, [1]) == [77]
    store.close()


def test_writes_under_readers_leave_nothing_stale(store, redis):
    """A row that is read while it is written may be the old one: it must not be kept."""
    stopping = threading.Event()

    def keep_reading():
        while not stopping.is_set():
            ids(store, list(range(8)))

    readers = [threading.Thread(target=keep_reading) for _ in range(2)]
    for reader in readers:
        reader.start()
    for value in range(1, 1500):
        write(redis, value % 8, value)
    stopping.set()
    for reader in readers:
        reader.join()
    last = [max(v for v in range(1, 1500) if v % 8 == entity) for entity in range(8)]
    wait_until(lambda: ids(store, list(range(8))) == last, "hearing of the last write", 5)
    assert store.cache_hits > 100
    assert store.cache_invalidations > 10


def test_what_was_written_while_nobody_listened_is_seen_when_somebody_does(store, redis):
    assert ids(store, [1]) == [1]
    listeners = [client["id"] for client in redis.client_list() if "B" in client["flags"]]
    assert len(listeners) == 1
    with redis.pipeline() as pipeline:  # at once, so that the write cannot be heard
        pipeline.client_kill_filter(_id=listeners[0])
        pipeline.hset(key_of(1), FIELD, b"\x35" + struct.pack("<f", 99))
        pipeline.execute()
    wait_until(lambda: ids(store, [1]) == [99], "listening again", 10)
    wait_until(lambda: store.is_listening, "listening again", 10)


def test_who_may_not_listen_reads_as_before(server, redis):
    redis.acl_setuser(
        "reader",
        enabled=True,
        passwords=["+s"],
        keys=["*"],
        commands=["+hmget", "+echo", "+hgetall"],
    )
    with structlog.testing.capture_logs() as lines:
        store = watching("redis", f"127.0.0.1:{server.port},username=reader,password=s")
        assert ids(store, [1]) == [1]
        wait_until(lambda: lines, "a refusal", 5)
        assert ids(store, [1, 2]) == [1, 2]
        assert not store.is_listening
        store.close()
    assert [line["event"] for line in lines] == ["key_watch_refused"]


WRITER = """
import socket, sys, time
data = bytes.fromhex(sys.argv[2])
with socket.create_connection(("127.0.0.1", int(sys.argv[1]))) as connection:
    while True:
        connection.sendall(data)
        connection.recv(1 << 16)
"""


@contextmanager
def written_to(server):
    """Writes cached keys as fast as it can, from processes of their own."""
    words = hiredis.pack_command(("HSET", key_of(10**6), FIELD, b"\x35aaaa"))
    command = [sys.executable, "-c", WRITER, str(server.port), words.hex()]
    writers = [subprocess.Popen(command) for _ in range(2)]
    try:
        wait_until(lambda: server.call("EXISTS", key_of(10**6)), "the first write")
        yield
    finally:
        for writer in writers:
            writer.kill()
            writer.wait(10)


def test_a_server_that_is_being_written_to_is_heard_at_the_first_try(server, redis):
    with written_to(server), structlog.testing.capture_logs() as lines:
        for _ in range(10):
            store = watching("redis", f"127.0.0.1:{server.port}")
            ids(store, [0])
            wait_until(lambda store=store: store.is_listening, "listening", 5)
            write(redis, 0, 1)
            wait_until(lambda store=store: ids(store, [0]) == [1], "hearing of a write", 5)
            write(redis, 0, 0)
            store.close()
    assert [line["event"] for line in lines if line["event"].startswith("key_watch")] == []


def test_a_server_that_cannot_be_heard_is_told_of_once(server, redis):
    store = watching("redis", f"127.0.0.1:{server.port}")
    opened = []

    def refuse(deadline_s):
        opened.append(deadline_s)
        raise ConnectionRefusedError("closed for today")

    store._servers.open = refuse
    store._servers.take = lambda: (0, RedisConnection(RedisOptions(port=server.port), 1.0))
    with structlog.testing.capture_logs() as lines:
        assert ids(store, [1]) == [1]
        wait_until(lambda: len(opened) > 1, "another try", 10)
    store.close()
    assert [line["event"] for line in lines if line["event"].startswith("key_watch")] == [
        "key_watch_failed"
    ]


def test_many_keys_written_at_once_forget_everything(store, redis):
    assert ids(store, [1, 2]) == [1, 2]
    with redis.pipeline() as pipeline:
        for entity in range(FORGOTTEN_AT_ONCE_MAX + 1):
            pipeline.hset(key_of(10**6 + entity), FIELD, b"")
        pipeline.execute()
    misses = store.cache_misses
    wait_until(lambda: ids(store, [2]) == [2] and store.cache_misses > misses, "forgetting", 5)


def test_plans_of_the_same_entities_hear_of_a_write_alike(store, redis):
    """One parses the key for both."""
    other = compile_plan(
        "another", "demo", "1", [ViewSource("view", KEY, FEATURES, cache_max_age_s="60")]
    )

    def both():
        keys = {"id": np.array([5], np.int64)}
        rows = store.read(other, keys, now_s=1_700_000_001.0, timeout_s=10.0)
        return ids(store, [5]) + rows.values[0].tolist()

    assert both() == [5, 5]
    write(redis, 5, 55)
    wait_until(lambda: both() == [55, 55], "hearing of a write", 5)
    assert store.cache_invalidations == 2


def test_after_a_failover_that_closed_nothing_the_new_master_is_heard(tmp_path):
    with sentinel("valkey", tmp_path) as (master, replica, watcher):
        with redis_py.Redis(port=master.port) as client:
            write_rows(client, 10)
            client.wait(1, 5000)
        store = RedisStore(
            open_redis("redis_sentinel", f"127.0.0.1:{watcher.port}", "features"),
            cache_rows=1000,
            hears_writes=True,
        )
        ids(store, [0])
        wait_until(lambda: store.is_listening, "listening")
        assert heard_by(master) == 1
        # As one that was cut off, and comes back alone: the old master goes on, as a master.
        watcher.call("SENTINEL", "REMOVE", "features")
        replica.call("REPLICAOF", "NO", "ONE")
        watcher.call("SENTINEL", "MONITOR", "features", "127.0.0.1", replica.port, "1")
        store.check()
        assert ids(store, [1]) == [1]
        wait_until(lambda: heard_by(replica) == 1 and heard_by(master) == 0, "hearing it", 10)
        wait_until(lambda: store.is_listening, "listening")
        assert ids(store, [1]) == [1]
        with redis_py.Redis(port=replica.port) as client:
            write(client, 1, 77)
        wait_until(lambda: ids(store, [1]) == [77], "hearing of a write", 5)
        store.close()


def heard_by(server):
    """How many listen to it."""
    with redis_py.Redis(port=server.port) as client:
        return sum("B" in other["flags"] for other in client.client_list())


def test_every_node_of_a_cluster_is_heard(tmp_path):
    with cluster("valkey", tmp_path) as nodes:
        client = redis_py.RedisCluster("127.0.0.1", nodes[0].port)
        write_rows(client, 60)
        store = watching("redis_cluster", f"127.0.0.1:{nodes[0].port}")
        everybody = list(range(60))
        assert ids(store, everybody) == everybody
        wait_until(lambda: store.is_listening, "listening", 10)
        assert ids(store, everybody) == everybody
        for entity in everybody:
            write(client, entity, entity + 1000)
        expected = [entity + 1000 for entity in everybody]
        wait_until(lambda: ids(store, everybody) == expected, "hearing of every write", 5)
        store.close()
        client.close()


def test_nobody_listens_after_the_end(server, redis):
    before = {thread.ident for thread in threading.enumerate()}
    store = watching("redis", f"127.0.0.1:{server.port}")
    ids(store, [0])
    wait_until(lambda: store.is_listening, "listening")
    store.close()

    def own():
        return [
            thread
            for thread in threading.enumerate()
            if thread.name.startswith("key-watch") and thread.ident not in before
        ]

    deadline_s = time.monotonic() + 5
    for thread in own():
        thread.join(max(0.0, deadline_s - time.monotonic()))
    assert own() == []
