"""One Redis server behind a bad network, or in a bad state, under readers."""

import socket
import struct
import threading
import time
from contextlib import ExitStack

import pytest
import redis
import structlog
from own_ids import COUNT, FIELD, Readers, key_of, own_ids, write_rows
from redis_processes import BRANDS, RedisProcess, alone, binary, free_port, wait_until
from tcp_proxy import TcpProxy

from headrace.errors import FeatureStoreUnavailable
from headrace.features.redis_options import RedisOptions
from headrace.features.redis_pool import RedisPool
from headrace.features.redis_store import RedisStore

EVERYBODY = list(range(COUNT))
TIME = b"_ts:view"
BUDGET_S = 0.2


@pytest.fixture(scope="module", params=BRANDS)
def brand(request):
    return request.param


@pytest.fixture(scope="module")
def server(brand, tmp_path_factory):
    with alone(brand, tmp_path_factory.mktemp("alone")) as server:
        with redis.Redis(port=server.port) as client:
            write_rows(client)
        yield server


@pytest.fixture
def proxy(server):
    with TcpProxy(server.port) as proxy:
        yield proxy


@pytest.fixture
def store(proxy):
    store = store_at(proxy.port)
    yield store
    store.close()


def store_at(port, **login):
    return RedisStore(RedisPool.to(RedisOptions(host="127.0.0.1", port=port, **login)))


def failure_time_s(store, budget_s=BUDGET_S):
    started_s = time.monotonic()
    with pytest.raises(FeatureStoreUnavailable):
        own_ids(store, [1], timeout_s=budget_s)
    return time.monotonic() - started_s


def recovery_time_s(store):
    started_s = time.monotonic()
    while True:
        try:
            assert own_ids(store, [1, 2], timeout_s=BUDGET_S) == [1, 2]
            return time.monotonic() - started_s
        except FeatureStoreUnavailable:
            assert time.monotonic() < started_s + 20
            time.sleep(0.005)


def test_latency_within_the_budget_is_only_latency(proxy, store):
    proxy.delay_s = 0.05
    started_s = time.monotonic()
    assert own_ids(store, [1, 2, 3]) == [1, 2, 3]
    assert time.monotonic() - started_s >= 0.05


@pytest.mark.alone
def test_latency_beyond_the_budget_costs_the_budget_and_then_nothing(proxy, store):
    """The breaker opens within a second of the first failure, and less than 20 of them."""
    assert own_ids(store, [1]) == [1]
    proxy.delay_s = 0.5
    took_s = [failure_time_s(store)]
    first_s = time.monotonic()
    while not store.is_held_off():
        took_s.append(failure_time_s(store))
    assert len(took_s) < 20
    assert time.monotonic() - first_s < 1.0 + BUDGET_S
    assert max(took_s) < BUDGET_S + 0.15
    assert min(failure_time_s(store) for _ in range(5)) < 0.01


@pytest.mark.alone
def test_after_latency_it_is_read_again_within_a_second(proxy, store):
    proxy.delay_s = 0.5
    while not store.is_held_off():
        failure_time_s(store)
    proxy.delay_s = 0.0
    assert recovery_time_s(store) < 1.0
    assert not store.is_held_off()


@pytest.mark.alone
def test_one_probe_at_a_time_waits_for_a_store_that_is_held_off(proxy, store):
    proxy.delay_s = 0.5
    while not store.is_held_off():
        failure_time_s(store)
    waited, threads = [], []

    def reader():
        for _ in range(50):
            waited.append(failure_time_s(store))
            time.sleep(0.01)

    threads = [threading.Thread(target=reader) for _ in range(4)]
    started_s = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    elapsed_s = time.monotonic() - started_s
    assert len(waited) == 200
    assert sum(took_s > BUDGET_S / 2 for took_s in waited) <= elapsed_s / BUDGET_S + 2


def test_jitter_and_slices_mix_nothing_up(proxy, store):
    proxy.jitter_s, proxy.slice_bytes = 0.02, 1000
    with Readers(store, timeout_s=5.0) as readers:
        readers.wait_for_answers(60)
    assert (readers.wrong, readers.failures) == ([], [])


@pytest.mark.alone
def test_resets_in_the_middle_of_answers_are_errors_or_unseen_and_never_wrong(proxy, store):
    proxy.reset_share, proxy.slice_bytes = 0.1, 700
    with Readers(store, timeout_s=1.0) as readers:
        readers.wait_for_answers(200)
    assert readers.wrong == []
    proxy.reset_share = 0.0
    assert recovery_time_s(store) < 1.0
    assert own_ids(store, EVERYBODY) == EVERYBODY


@pytest.mark.alone
def test_a_network_that_goes_silent_costs_the_budget_and_comes_back(proxy, store):
    with Readers(store, timeout_s=BUDGET_S) as readers:
        readers.wait_for_answers(20)
        proxy.is_silent = True
        wait_until(store.is_held_off, "the breaker")
        proxy.is_silent = False
        readers.wait_for_answers(50, since_s=time.monotonic())
    assert readers.wrong == []
    assert max(took_s for _, took_s in readers.failures) < BUDGET_S + 0.2


@pytest.mark.alone
def test_a_server_that_accepts_and_never_answers_costs_the_budget(proxy, store):
    proxy.is_silent = True
    assert failure_time_s(store) < BUDGET_S + 0.15
    proxy.is_silent = False


@pytest.mark.alone
def test_a_killed_server_fails_reads_at_once_and_is_read_again_within_a_second(brand, tmp_path):
    port = free_port()
    server = RedisProcess(binary(brand), tmp_path, "--save", "", port=port)
    with redis.Redis(port=port) as client:
        write_rows(client, 10)
    store = store_at(port)
    assert own_ids(store, [1]) == [1]
    server.kill()
    assert max(failure_time_s(store, 1.0) for _ in range(30)) < 0.5
    assert store.is_held_off()
    server.start()
    with redis.Redis(port=port) as client:
        write_rows(client, 10)
    assert recovery_time_s(store) < 1.0
    store.close()
    server.kill()


def test_a_check_passes_an_open_breaker_and_closes_it(proxy, store):
    proxy.delay_s = 0.5
    while not store.is_held_off():
        failure_time_s(store)
    proxy.delay_s = 0.0
    store.check()
    assert not store.is_held_off()
    assert own_ids(store, [1]) == [1]


def test_the_breaker_says_in_the_log_that_it_opens_and_closes(proxy, store):
    proxy.delay_s = 0.5
    with structlog.testing.capture_logs() as log:
        while not store.is_held_off():
            failure_time_s(store)
        proxy.delay_s = 0.0
        recovery_time_s(store)
    events = [line["event"] for line in log if line["event"].startswith("redis_breaker")]
    assert events == ["redis_breaker_opened", "redis_breaker_closed"]


# States in which a server answers, and not with features.


def test_a_replica_that_only_reads_is_read(brand, server, tmp_path):
    """READONLY concerns who writes."""
    with alone(brand, tmp_path, "--replicaof", f"127.0.0.1 {server.port}") as replica:
        wait_until(lambda: replica.call("ROLE")[3] == b"connected", "the replica")
        store = store_at(replica.port)
        assert own_ids(store, EVERYBODY) == EVERYBODY
        store.close()


@pytest.mark.alone
def test_a_replica_without_its_master_that_serves_nothing_stale_is_unavailable(brand, tmp_path):
    gone = f"127.0.0.1 {free_port()}"
    with alone(brand, tmp_path, "--replicaof", gone, "--replica-serve-stale-data", "no") as replica:
        store = store_at(replica.port)
        assert failure_time_s(store) < 0.15
        with pytest.raises(FeatureStoreUnavailable):
            store.check()
        replica.call("REPLICAOF", "NO", "ONE")
        with redis.Redis(port=replica.port) as client:
            write_rows(client, 3)
        store.check()
        assert own_ids(store, [2]) == [2]
        store.close()


@pytest.mark.alone
def test_a_server_that_is_loading_is_unavailable_until_it_has_loaded(tmp_path):
    """`key-load-delay` makes it take its time over each key."""
    slowly = ("--key-load-delay", "3000", "--loading-process-events-interval-bytes", "1024")
    with alone("valkey", tmp_path, "--enable-debug-command", "yes", *slowly) as it:
        with redis.Redis(port=it.port) as client:
            write_rows(client, 1000)
        store = store_at(it.port)
        assert own_ids(store, [2]) == [2]
        reload = threading.Thread(target=lambda: it.call("DEBUG", "RELOAD"))
        reload.start()
        outcomes = set()
        while reload.is_alive():
            try:
                outcomes.add(own_ids(store, [2], timeout_s=1.0)[0])
            except FeatureStoreUnavailable:
                outcomes.add("unavailable")
        reload.join(30)
        assert outcomes <= {2.0, "unavailable"}
        assert "unavailable" in outcomes
        assert recovery_time_s(store) < 1.0
        store.close()


@pytest.mark.alone
def test_a_password_that_is_changed_under_readers_is_unavailable_to_new_connections(tmp_path):
    with alone("valkey", tmp_path) as server:
        server.call("CONFIG", "SET", "requirepass", "old")
        with redis.Redis(port=server.port, password="old") as client:
            write_rows(client)
            store = store_at(server.port, password="old")
            with Readers(store) as readers:
                readers.wait_for_answers(20)
                client.config_set("requirepass", "new")
                changed_s = time.monotonic()
                # Who is logged in stays so.
                readers.wait_for_answers(50, since_s=changed_s)
                assert readers.failures_after(0) == []
                client.client_kill_filter(_type="normal", skipme=True)
                killed_s = time.monotonic()
                wait_until(lambda: readers.failures_after(killed_s), "a refusal")
                wait_until(store.is_held_off, "the breaker")
                client.config_set("requirepass", "old")
                readers.wait_for_answers(50, since_s=time.monotonic())
        assert readers.wrong == []
        assert max(took_s for _, took_s in readers.failures) < 0.5
        store.close()


@pytest.mark.alone
def test_a_slow_line_costs_the_budget_and_not_the_size_of_the_reply(proxy, store):
    proxy.slice_bytes, proxy.bytes_per_s = 2000, 200_000
    started_s = time.monotonic()
    assert own_ids(store, EVERYBODY[:300], timeout_s=5.0) == EVERYBODY[:300]
    assert time.monotonic() - started_s > 300 * len(ROW) / proxy.bytes_per_s * 0.8
    started_s = time.monotonic()
    with pytest.raises(FeatureStoreUnavailable):
        own_ids(store, EVERYBODY, timeout_s=BUDGET_S)
    assert time.monotonic() - started_s < BUDGET_S + 0.15
    proxy.bytes_per_s = 0
    assert recovery_time_s(store) < 1.0


ROW = b"*2\r\n$5\r\n5....\r\n$6\r\n......\r\n"


def test_a_user_is_served_from_a_database_of_its_own(server):
    server.call("ACL", "SETUSER", "few", "on", ">s3cret", "~*", "+hmget", "+echo", "+select")
    with redis.Redis(port=server.port, db=3) as client:
        client.hset(key_of(7), mapping={FIELD: b"\x35" + struct.pack("<f", 3007), TIME: b"\x08\1"})
    store = store_at(server.port, username="few", password="s3cret", db=3)
    assert own_ids(store, [7]) == [3007]
    store.check()
    store.close()
    other = store_at(server.port, username="few", password="s3cret")
    assert own_ids(other, [7]) == [7]
    other.close()


def test_a_check_fails_for_a_user_who_may_not_read_at_all_and_passes_one_who_may(server):
    server.call("ACL", "SETUSER", "mute", "on", "nopass", "~*", "+echo")
    server.call("ACL", "SETUSER", "apart", "on", "nopass", "~other:*", "+hmget", "+echo")
    mute, apart = (store_at(server.port, username=name, password="x") for name in ("mute", "apart"))
    with structlog.testing.capture_logs() as lines, pytest.raises(FeatureStoreUnavailable):
        mute.check()
    assert [line.get("reason") for line in lines] == ["HMGET is refused: NOPERM"]
    apart.check()
    mute.close()
    apart.close()


def test_no_password_is_in_the_log_of_a_server_that_knows_no_login(brand, tmp_path):
    with alone(brand, tmp_path, "--rename-command", "AUTH", "") as server:
        store = store_at(server.port, password="hunter2")
        with structlog.testing.capture_logs() as lines, pytest.raises(FeatureStoreUnavailable):
            own_ids(store, [1])
        store.close()
    assert [line["reason"] for line in lines] == ["AUTH is refused: ERR"]


@pytest.mark.alone
def test_all_addresses_of_a_host_together_have_the_budget(monkeypatch):
    """Of listeners whose queues are full: connecting to them is silence."""
    with ExitStack() as open_sockets:
        ports = [full_listener(open_sockets) for _ in range(3)]
        found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port)) for port in ports]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
        store = store_at(1)
        assert failure_time_s(store) < BUDGET_S + 0.15
        store.close()


def full_listener(open_sockets):
    listener = open_sockets.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
    for _ in range(4):
        client = open_sockets.enter_context(socket.socket())
        client.setblocking(False)
        client.connect_ex(listener.getsockname())
    return listener.getsockname()[1]


@pytest.mark.alone
@pytest.mark.parametrize("host", ["redis..internal", "a" * 70, "nul\0"])
def test_a_host_that_is_no_name_is_unavailable_as_one_that_does_not_answer(host):
    """By a cluster or a Sentinel, which announce what they like."""
    store = RedisStore(RedisPool.to(RedisOptions(host=host)))
    assert failure_time_s(store) < 0.5
    with pytest.raises(FeatureStoreUnavailable):
        store.check()
    store.close()


@pytest.mark.alone
def test_a_user_who_may_not_read_those_keys_is_unavailable(server):
    server.call("ACL", "SETUSER", "other", "on", "nopass", "~other:*", "+hmget", "+echo")
    store = store_at(server.port, username="other", password="any")
    assert failure_time_s(store) < 0.15
    store.close()
