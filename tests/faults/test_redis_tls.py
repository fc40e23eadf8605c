"""Redis behind TLS, its certificates made by the test."""

import time

import pytest
import redis
from own_ids import COUNT, own_ids, write_rows
from redis_processes import alone
from tls_terminator import TlsTerminator, make_certificate

from headrace.errors import FeatureStoreUnavailable
from headrace.features.redis_store import RedisStore
from headrace.features.redis_topologies import open_redis

MANY = [i % COUNT for i in range(0, 7 * 9000, 7)]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with alone("valkey", tmp_path_factory.mktemp("server")) as server:
        with redis.Redis(port=server.port) as client:
            write_rows(client)
        yield server


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("certificates")


@pytest.fixture(scope="module")
def own(folder):
    """A certificate for localhost and its key."""
    return make_certificate(folder)


@pytest.fixture
def terminator(server, own):
    with TlsTerminator(server.port, *own) as terminator:
        yield terminator


def store_of(terminator, options, host="localhost"):
    return RedisStore(open_redis("redis", f"{host}:{terminator.port},ssl=true{options}", ""))


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1"])
def test_rows_are_read_whole_by_name_and_by_address(terminator, own, host):
    store = store_of(terminator, f",ssl_ca_certs={own[0]}", host)
    assert own_ids(store, [1, 2, 3]) == [1, 2, 3]
    assert own_ids(store, MANY) == MANY
    store.check()
    store.close()


@pytest.mark.parametrize(
    ("name", "options", "is_served"),
    [
        ("localhost", "", True),
        ("another", "", False),
        ("another", ",ssl_check_hostname=false", True),
        ("another", ",ssl_check_hostname=1", False),
        ("another", ",ssl_cert_reqs=none", True),
    ],
)
def test_a_certificate_of_another_name_is_refused_unless_told_otherwise(
    server, folder, name, options, is_served
):
    certificate, key = make_certificate(folder, name)
    with TlsTerminator(server.port, certificate, key) as terminator:
        store = store_of(terminator, f",ssl_ca_certs={certificate}{options}")
        if is_served:
            assert own_ids(store, [5]) == [5]
        else:
            with pytest.raises(FeatureStoreUnavailable):
                own_ids(store, [5])
        store.close()


def test_a_certificate_that_nobody_vouches_for_is_refused(terminator):
    store = store_of(terminator, "")
    with pytest.raises(FeatureStoreUnavailable):
        own_ids(store, [5])
    store.close()


def test_a_server_that_asks_for_a_certificate_is_shown_one(server, own, folder):
    client, key = make_certificate(folder, "client")
    with TlsTerminator(server.port, *own, client_authority=client) as terminator:
        store = store_of(
            terminator, f",ssl_ca_certs={own[0]},ssl_certfile={client},ssl_keyfile={key}"
        )
        assert own_ids(store, [5]) == [5]
        store.close()
        without = store_of(terminator, f",ssl_ca_certs={own[0]}")
        with pytest.raises(FeatureStoreUnavailable):
            own_ids(without, [5])
        without.close()


@pytest.mark.alone
def test_a_handshake_that_hangs_costs_the_budget(terminator, own):
    terminator.hangs = True
    store = store_of(terminator, f",ssl_ca_certs={own[0]}")
    started_s = time.monotonic()
    with pytest.raises(FeatureStoreUnavailable):
        own_ids(store, [5], timeout_s=0.2)
    assert time.monotonic() - started_s < 0.35
    store.close()
