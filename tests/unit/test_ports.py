"""A port that somebody listens on is refused; one that is held is shared by those who may."""

import socket

import pytest

from headrace.errors import StartupError
from headrace.ports import hold_port, refuse_taken_port


@pytest.fixture
def held():
    with hold_port("--grpc-address", "127.0.0.1", 0) as held:
        yield held


def listener(port):
    made = socket.socket()
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    made.bind(("127.0.0.1", port))
    made.listen()
    return made


def test_a_held_port_is_refused_to_others_before_anybody_listens(held):
    port = held.getsockname()[1]

    for take in (refuse_taken_port, hold_port):
        with pytest.raises(StartupError, match=r"--grpc-address .*Address already in use"):
            take("--grpc-address", "127.0.0.1", port)


def test_connections_reach_those_who_listen_and_never_the_holder(held):
    port = held.getsockname()[1]
    with listener(port) as first, listener(port) as second:
        reached = set()
        for _ in range(60):
            with socket.create_connection(("127.0.0.1", port), timeout=5):
                for one in (first, second):
                    one.settimeout(0.0)
                    try:
                        one.accept()[0].close()
                    except BlockingIOError:
                        continue
                    reached.add(one)

        assert reached == {first, second}


def test_a_port_whose_last_connections_linger_can_be_held():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)) as client:
            accepted, _ = server.accept()
            accepted.close()  # first: its side stays in TIME_WAIT
            assert client.recv(1) == b""

    hold_port("--grpc-address", "127.0.0.1", port).close()


def test_a_port_that_is_listened_on_is_not_held():
    with socket.create_server(("127.0.0.1", 0)) as server, pytest.raises(StartupError):
        hold_port("--grpc-address", "127.0.0.1", server.getsockname()[1])


def test_a_host_that_does_not_exist_is_refused():
    with pytest.raises(StartupError, match=r"nowhere\.invalid"):
        hold_port("--grpc-address", "nowhere.invalid", 0)
