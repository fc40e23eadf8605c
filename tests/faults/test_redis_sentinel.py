"""A failover by Redis Sentinel, under readers."""

import socket
import time
from contextlib import ExitStack, contextmanager

import pytest
import redis
import structlog
from own_ids import COUNT, Readers, own_ids, write_rows
from redis_processes import BRANDS, RedisProcess, binary, free_port, sentinel, wait_until

from headrace.errors import FeatureStoreUnavailable
from headrace.features.redis_store import RedisStore
from headrace.features.redis_topologies import open_redis

# All of them: a master that is not heard of for half a second is left for another.
pytestmark = pytest.mark.alone

EVERYBODY = list(range(COUNT))


def store_of(*sentinels, options="", name="features"):
    named = ",".join(f"127.0.0.1:{port}" for port in sentinels)
    return RedisStore(open_redis("redis_sentinel", named + options, name))


@contextmanager
def written(brand, folder):
    with sentinel(brand, folder) as servers:
        with redis.Redis(port=servers[0].port) as client:
            write_rows(client)
            client.wait(1, 5000)
        yield servers


@pytest.fixture(params=BRANDS)
def servers(request, tmp_path):
    """For tests that leave the roles changed."""
    with written(request.param, tmp_path) as servers:
        yield servers


@pytest.fixture(scope="module", params=BRANDS)
def lasting(request, tmp_path_factory):
    """For tests that leave them as they are."""
    with written(request.param, tmp_path_factory.mktemp("lasting")) as servers:
        yield servers


def test_a_failover_is_followed_with_errors_until_then_and_no_wrong_value(servers):
    master, replica, watcher = servers
    store = store_of(watcher.port)
    with Readers(store) as readers:
        readers.wait_for_answers(20)
        master.kill()
        killed_s = time.monotonic()
        wait_until(lambda: announced(watcher) == replica.port, "the failover")
        announced_s = time.monotonic()
        readers.wait_for_answers(100, since_s=announced_s)
    assert own_ids(store, EVERYBODY) == EVERYBODY
    store.close()
    assert readers.wrong == []
    assert readers.failures_after(killed_s)
    assert readers.failures_after(announced_s + 1.0) == []


def test_a_master_that_hangs_is_left_for_the_new_one_and_never_read_again(servers):
    master, replica, watcher = servers
    store = store_of(watcher.port)
    with Readers(store, timeout_s=0.3) as readers:
        readers.wait_for_answers(20)
        with master.paused():
            wait_until(lambda: announced(watcher) == replica.port, "the failover")
            announced_s = time.monotonic()
            readers.wait_for_answers(100, since_s=announced_s + 1.0)
        reads_before = reads_of(master)
        readers.wait_for_answers(100, since_s=time.monotonic())
        assert reads_of(master) == reads_before
    store.close()
    assert readers.wrong == []
    assert readers.failures_after(announced_s + 1.0) == []


def reads_of(server):
    with redis.Redis(port=server.port) as client:
        return client.info("commandstats").get("cmdstat_hmget", {}).get("calls", 0)


def test_a_check_notices_a_failover_that_closed_no_connection(servers):
    _, replica, watcher = servers
    store = store_of(watcher.port)
    assert own_ids(store, [1, 2]) == [1, 2]
    watcher.call("SENTINEL", "FAILOVER", "features")
    wait_until(lambda: replica.call("ROLE")[0] == b"master", "the failover")
    wait_until(lambda: announced(watcher) == replica.port, "the announcement")
    store.check()
    before = reads_of(replica)
    assert own_ids(store, [1, 2]) == [1, 2]
    assert reads_of(replica) > before
    store.close()


def announced(watcher):
    return int(watcher.call("SENTINEL", "GET-MASTER-ADDR-BY-NAME", "features")[1])


def test_a_sentinel_that_is_gone_is_passed_over(lasting):
    store = store_of(free_port(), lasting[2].port)
    assert own_ids(store, [3]) == [3]
    store.close()


def test_a_sentinel_that_hangs_costs_its_share_of_the_time(lasting):
    """Both of two addresses lead to Sentinels; the first says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        store = store_of(silent.getsockname()[1], lasting[2].port)
        started_s = time.monotonic()
        assert own_ids(store, [3], timeout_s=1.0) == [3]
        assert time.monotonic() - started_s < 0.9
        store.close()


def test_a_name_that_no_sentinel_knows_is_unavailable(lasting):
    store = store_of(lasting[2].port, name="another")
    with pytest.raises(FeatureStoreUnavailable):
        own_ids(store, [3])
    with pytest.raises(FeatureStoreUnavailable):
        store.check()


def test_a_store_whose_sentinels_are_lost_is_read_from_its_last_master(servers):
    master, _, watcher = servers
    store = store_of(watcher.port, free_port())
    assert own_ids(store, [1]) == [1]
    with structlog.testing.capture_logs() as lines:
        watcher.kill()
        store.check()
        store._servers.drop()  # it takes a new connection
        assert own_ids(store, [2]) == [2]
        store.check()
        watcher.start()
        store.check()
    assert [line["event"] for line in lines if "sentinels" in line["event"]] == [
        "redis_sentinels_gone",
        "redis_sentinels_back",
    ]
    watcher.kill()
    # One that has become a replica meanwhile is not read.
    master.call("REPLICAOF", "127.0.0.1", free_port())
    store._servers.drop()
    with pytest.raises(FeatureStoreUnavailable):
        own_ids(store, [2], timeout_s=0.5)
    with pytest.raises(FeatureStoreUnavailable):
        store.check()
    store.close()


def test_a_store_whose_sentinels_were_never_there_is_unavailable(lasting):
    store = store_of(free_port(), free_port())
    with pytest.raises(FeatureStoreUnavailable):
        own_ids(store, [1])
    with pytest.raises(FeatureStoreUnavailable):
        store.check()
    store.close()


def test_a_failover_is_followed_by_whichever_of_several_sentinels_lives(tmp_path):
    with written("valkey", tmp_path) as (master, replica, first), ExitStack() as more:
        others = [
            RedisProcess(
                binary("valkey"),
                tmp_path,
                "--sentinel",
                config=f"sentinel monitor features 127.0.0.1 {master.port} 2\n"
                "sentinel down-after-milliseconds features 500\n"
                "sentinel failover-timeout features 3000\n",
            )
            for _ in range(2)
        ]
        for other in others:
            more.callback(other.kill)
        sentinels = [first, *others]
        wait_until(lambda: all(knows(it, sentinels=2, replicas=1) for it in sentinels), "company")
        store = store_of(*(it.port for it in sentinels))
        with Readers(store) as readers:
            readers.wait_for_answers(20)
            others[0].kill()
            readers.wait_for_answers(20, since_s=time.monotonic())
            master.kill()
            live = (first, others[1])
            wait_until(lambda: all(announced(it) == replica.port for it in live), "the failover")
            announced_s = time.monotonic()
            readers.wait_for_answers(100, since_s=announced_s)
        assert own_ids(store, EVERYBODY) == EVERYBODY
        store.close()
    assert readers.wrong == []
    assert readers.failures_after(announced_s + 1.0) == []


def knows(watcher, *, sentinels, replicas):
    found = watcher.call("SENTINEL", "MASTER", "features")
    if not isinstance(found, dict):
        found = dict(zip(found[::2], found[1::2], strict=True))
    found = {
        (key.decode() if isinstance(key, bytes) else key): value for key, value in found.items()
    }
    return int(found["num-other-sentinels"]) == sentinels and int(found["num-slaves"]) == replicas


@pytest.fixture
def guarded(lasting):
    """The master with one password, the Sentinel with another."""
    master, _, watcher = lasting
    watcher.call("ACL", "SETUSER", "default", "resetpass", ">own")
    master.call("ACL", "SETUSER", "default", "resetpass", ">hunter2")
    yield watcher.port
    for server, password in ((watcher, "own"), (master, "hunter2")):
        with redis.Redis(port=server.port, password=password) as client:
            client.execute_command("ACL", "SETUSER", "default", "nopass")


def test_sentinels_have_a_password_of_their_own(guarded):
    store = store_of(guarded, options=',password=hunter2,sentinel_kwargs={"password": "own"}')
    assert own_ids(store, [3]) == [3]
    store.close()
    wrong = store_of(guarded, options=",password=hunter2")
    with pytest.raises(FeatureStoreUnavailable):
        own_ids(wrong, [3])
