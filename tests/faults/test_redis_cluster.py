"""A Redis Cluster whose slots move and whose nodes fail, under readers."""

import threading
import time
from contextlib import ExitStack, contextmanager
from itertools import islice

import pytest
import redis
from own_ids import COUNT, FIELD, Readers, key_of, own_ids, read, write_rows
from redis_processes import BRANDS, cluster, wait_until

from headrace.errors import FeatureStoreUnavailable
from headrace.features.plan import FeatureStatus
from headrace.features.redis_redirects import key_slot
from headrace.features.redis_store import RedisStore
from headrace.features.redis_topologies import open_redis

# All of them: a node that is not heard of for a second is believed to be gone.
pytestmark = pytest.mark.alone

NODE_TIMEOUT_S = 1.0
EVERYBODY = list(range(COUNT))


def store_of(*nodes):
    named = ",".join(f"127.0.0.1:{node.port}" for node in nodes)
    return RedisStore(open_redis("redis_cluster", named, ""))


@pytest.fixture(scope="module", params=BRANDS)
def nodes(request, tmp_path_factory):
    """Three masters."""
    with cluster(request.param, tmp_path_factory.mktemp("cluster")) as nodes:
        with redis.RedisCluster("127.0.0.1", nodes[0].port) as client:
            write_rows(client)
        yield nodes


@pytest.fixture
def store(nodes):
    store = store_of(nodes[1])
    yield store
    store.close()


def identity(node):
    return node.call("CLUSTER", "MYID").decode()


def owner_of(nodes, slot):
    for first, last, (_, port, *_), *_ in nodes[0].call("CLUSTER", "SLOTS"):
        if first <= slot <= last:
            return next(node for node in nodes if node.port == port)
    raise AssertionError("nobody has it")


def begin_migration(slot, source, target):
    target.call("CLUSTER", "SETSLOT", slot, "IMPORTING", identity(source))
    source.call("CLUSTER", "SETSLOT", slot, "MIGRATING", identity(target))


def move_keys(slot, source, target):
    for key in source.call("CLUSTER", "GETKEYSINSLOT", slot, 1000):
        source.call("MIGRATE", "127.0.0.1", target.port, key, 0, 5000)


def end_migration(slot, nodes, target):
    for node in (target, *(node for node in nodes if node is not target)):
        node.call("CLUSTER", "SETSLOT", slot, "NODE", identity(target))


def begin_moving(entity, nodes):
    """Move an entity's slot but for the end; return it, and from which node to which."""
    slot = key_slot(key_of(entity))
    source = owner_of(nodes, slot)
    target = next(node for node in nodes if node is not source)
    begin_migration(slot, source, target)
    move_keys(slot, source, target)
    return slot, source, target


def test_each_row_is_read_from_its_node_and_returned_in_its_place(store):
    assert own_ids(store, EVERYBODY) == EVERYBODY
    assert own_ids(store, EVERYBODY[::-1]) == EVERYBODY[::-1]
    twice = [i % 70 for i in range(500)]
    assert own_ids(store, twice) == twice


def test_one_row_asks_one_node(store):
    assert [own_ids(store, [i]) for i in range(20)] == [[i] for i in range(20)]


def test_a_batch_larger_than_any_buffer_is_read_whole(store):
    many = [i % COUNT for i in range(0, 7 * 9000, 7)]
    assert own_ids(store, many) == many


def test_a_slot_that_has_moved_is_followed(nodes, store):
    assert own_ids(store, EVERYBODY) == EVERYBODY
    slot, _, target = begin_moving(5, nodes)
    end_migration(slot, nodes, target)
    assert own_ids(store, EVERYBODY) == EVERYBODY
    assert owner_of(nodes, slot) is target


def test_a_key_under_way_to_another_node_is_asked_for_there(nodes, store):
    assert own_ids(store, EVERYBODY) == EVERYBODY
    slot, _, target = begin_moving(6, nodes)
    try:
        assert own_ids(store, [5, 6, 7]) == [5, 6, 7]
        # One that is nowhere is asked for there, too, and is missing there.
        assert own_ids(store, [6] * 3) == [6] * 3
    finally:
        end_migration(slot, nodes, target)


def test_slots_that_move_under_readers_disturb_nobody(nodes, store):
    slots = sorted({key_slot(key_of(entity)) for entity in range(400)})[:60]
    with Readers(store) as readers:
        readers.wait_for_answers(10)
        for slot in slots:
            source = owner_of(nodes, slot)
            target = nodes[(nodes.index(source) + 1) % 3]
            begin_migration(slot, source, target)
            move_keys(slot, source, target)
            end_migration(slot, nodes, target)
        readers.wait_for_answers(10, since_s=time.monotonic())
    assert (readers.wrong, readers.failures) == ([], [])


def test_the_check_fails_while_a_node_is_gone_and_passes_when_it_is_back(nodes, store):
    store.check()
    with nodes[2].paused(), pytest.raises(FeatureStoreUnavailable):
        store.check()
    wait_until(lambda: b"cluster_state:ok" in nodes[0].call("CLUSTER", "INFO"), "recovery")
    store.check()
    assert own_ids(store, EVERYBODY) == EVERYBODY


def entities_of(node, nodes, count=20):
    """Some whose slots it has."""
    own = (entity for entity in EVERYBODY if owner_of(nodes, key_slot(key_of(entity))) is node)
    return list(islice(own, count))


def timed_failure_s(store, entities, timeout_s):
    started_s = time.monotonic()
    with pytest.raises(FeatureStoreUnavailable):
        own_ids(store, entities, timeout_s=timeout_s)
    return time.monotonic() - started_s


@contextmanager
def all_paused(nodes):
    with ExitStack() as paused:
        for node in nodes:
            paused.enter_context(node.paused())
        yield
    wait_until(
        lambda: all(b"cluster_state:ok" in node.call("CLUSTER", "INFO") for node in nodes),
        "recovery",
    )


@pytest.mark.parametrize("is_warm", [True, False])
def test_a_node_that_hangs_is_no_reason_to_leave_the_others_alone(nodes, is_warm):
    """Batches of every node time out with it; those of the others alone are served throughout."""
    store = store_of(nodes[1])
    own_ids(store, EVERYBODY if is_warm else entities_of(nodes[1], nodes, 1))
    hung, *others = nodes
    shares = {node.port: entities_of(node, nodes) for node in nodes}
    mixed = [entity for own in shares.values() for entity in own]
    pools = {pool.address[1]: pool for pool in store._servers.masters()}
    with all_paused([hung]):
        # The node's own timeout makes the others refuse every key, after a second.
        until_s = time.monotonic() + 0.8 * NODE_TIMEOUT_S
        while time.monotonic() < until_s:
            assert timed_failure_s(store, mixed, 0.1) < 0.3
            assert not any(pools[node.port]._breaker.is_failing for node in others)
            for node in others:
                assert own_ids(store, shares[node.port], timeout_s=1.0) == shares[node.port]
        assert pools[hung.port]._breaker.is_failing
    store.close()


def test_a_cluster_that_hangs_as_a_whole_costs_its_timeout_to_few_and_then_nothing(nodes):
    store = store_of(nodes[1])
    assert own_ids(store, EVERYBODY) == EVERYBODY
    with all_paused(nodes):
        until_s = time.monotonic() + 15
        while not all(pool.is_held_off() for pool in store._servers.masters()):
            timed_failure_s(store, EVERYBODY, 0.2)
            assert time.monotonic() < until_s
        while not store._servers._map_breaker.is_open:
            timed_failure_s(store, EVERYBODY, 0.2)
            assert time.monotonic() < until_s
        took_s = shared_failures_s(store)
    assert sum(at_s > 0.1 for at_s in took_s) < 0.19 * len(took_s)
    store.check()
    assert own_ids(store, EVERYBODY) == EVERYBODY
    store.close()


def test_a_cluster_that_never_told_its_slots_is_held_off_as_well(nodes):
    store = store_of(*nodes)
    with all_paused(nodes):
        until_s = time.monotonic() + 15
        while not store.is_held_off():
            assert timed_failure_s(store, [1], 0.2) < 0.5
            assert time.monotonic() < until_s
        took_s = shared_failures_s(store)
    assert sum(at_s > 0.1 for at_s in took_s) < 0.19 * len(took_s)
    store.check()
    assert not store.is_held_off()
    assert own_ids(store, [1]) == [1]
    store.close()


def shared_failures_s(store):
    """How long each read of several threads took to fail, over a second or two."""
    took_s = []

    def read_in_vain():
        for _ in range(30):
            took_s.append(timed_failure_s(store, [1, 2, 3], 0.2))
            time.sleep(0.03)

    threads = [threading.Thread(target=read_in_vain) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(took_s) == 120
    return took_s


def test_a_key_that_is_no_hash_and_a_damaged_value_cost_their_own_rows_only(nodes, store):
    text, damaged = COUNT + 1, COUNT + 2
    with redis.RedisCluster("127.0.0.1", nodes[0].port) as client:
        client.set(key_of(text), "no hash")
        client.hset(key_of(damaged), FIELD, b"\x35\0")
        try:
            rows = read(store, [1, text, damaged, 2, 3])
        finally:
            client.delete(key_of(text))
            client.delete(key_of(damaged))
    present, null, not_found, _ = FeatureStatus
    assert rows.statuses.tolist() == [[present, not_found, null, present, present]]
    assert store.mismatches == 2


def test_a_user_with_the_few_rights_that_it_takes_is_served(nodes):
    rights = ["+hmget", "+echo", "+cluster|slots"]
    for node in nodes:
        node.call("ACL", "SETUSER", "few", "on", ">hunter2", "~*", *rights)
    store = RedisStore(
        open_redis("redis_cluster", f"127.0.0.1:{nodes[0].port},username=few,password=hunter2", "")
    )
    assert own_ids(store, EVERYBODY) == EVERYBODY
    store.check()
    store.close()


@pytest.mark.parametrize("brand", BRANDS)
def test_a_dead_master_costs_errors_until_its_replica_serves_and_no_wrong_value(brand, tmp_path):
    with cluster(brand, tmp_path, replicas=1) as (first, second, third, replica):
        with redis.RedisCluster("127.0.0.1", first.port) as client:
            write_rows(client)
        wait_until(lambda: replica.call("DBSIZE") == first.call("DBSIZE"), "replication")
        store = store_of(first, second, third)
        with Readers(store) as readers:
            readers.wait_for_answers(20)
            first.kill()
            killed_s = time.monotonic()
            wait_until(lambda: replica.call("ROLE")[0] == b"master", "the failover")
            wait_until(lambda: b"cluster_state:ok" in second.call("CLUSTER", "INFO"), "the cluster")
            promoted_s = time.monotonic()
            readers.wait_for_answers(100, since_s=promoted_s)
        assert own_ids(store, EVERYBODY) == EVERYBODY
        store.close()
    assert readers.wrong == []
    assert readers.failures_after(killed_s)
    assert readers.failures_after(promoted_s + 1.0) == []
    # Refused connections are told at once, and so is what an open breaker refuses.
    assert max(took_s for _, took_s in readers.failures) < 1.5


@pytest.mark.parametrize("brand", BRANDS)
def test_a_master_that_hangs_holds_up_few_and_is_left_when_its_replica_serves(brand, tmp_path):
    with cluster(brand, tmp_path, replicas=1) as (first, second, third, replica):
        with redis.RedisCluster("127.0.0.1", first.port) as client:
            write_rows(client)
        wait_until(lambda: replica.call("DBSIZE") == first.call("DBSIZE"), "replication")
        store = store_of(first, second, third)
        with Readers(store, timeout_s=0.3) as readers:
            readers.wait_for_answers(20)
            with first.paused():
                wait_until(lambda: replica.call("ROLE")[0] == b"master", "the failover")
                promoted_s = time.monotonic()
                readers.wait_for_answers(100, since_s=promoted_s + 1.0)
            # The old master wakes up, believing that it still is one.
            woken_s = time.monotonic()
            readers.wait_for_answers(100, since_s=woken_s)
        store.close()
    assert readers.wrong == []
    assert readers.failures_after(promoted_s + 1.5) == []
    slow = [took_s for _, took_s in readers.failures if took_s > 0.25]
    assert len(slow) < 20
