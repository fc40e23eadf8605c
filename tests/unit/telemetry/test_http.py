"""The HTTP port answers probes, whatever else is done to it."""

import http.client
import socket

import pytest

from headrace.errors import StartupError
from headrace.telemetry.http import MAX_CONNECTIONS, HttpEndpoint
from headrace.telemetry.metrics import Metrics


@pytest.fixture(params=["127.0.0.1", "::1"])
def endpoint(request):
    try:
        with socket.create_server((request.param, 0), family=_family(request.param)):
            pass
    except OSError:
        pytest.skip(f"{request.param} cannot be listened on here")
    endpoint = HttpEndpoint(request.param, 0, lambda: True, Metrics())
    endpoint.start()
    endpoint.host = request.param
    yield endpoint
    endpoint.stop()


def _family(host):
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def get(endpoint, path):
    connection = http.client.HTTPConnection(endpoint.host, endpoint.port, timeout=10)
    try:
        connection.request("GET", path)
        return connection.getresponse().status
    finally:
        connection.close()


@pytest.mark.parametrize(
    ("path", "status"), [("/healthz", 200), ("/readyz", 200), ("/metrics", 200), ("/", 404)]
)
def test_pages_are_answered(endpoint, path, status):
    assert get(endpoint, path) == status


def test_connections_are_limited_and_given_back(endpoint):
    address = (endpoint.host, endpoint.port)
    idle = [socket.create_connection(address) for _ in range(MAX_CONNECTIONS)]
    with socket.create_connection(address, timeout=10) as one_more:
        assert one_more.recv(1) == b""
    for connection in idle:
        connection.close()

    statuses = set()
    while 200 not in statuses:  # the places come back as their threads notice
        try:
            statuses.add(get(endpoint, "/healthz"))
        except (OSError, http.client.HTTPException):
            statuses.add(None)


def test_a_client_that_leaves_in_the_middle_prints_nothing(endpoint, capfd):
    for _ in range(20):
        with socket.create_connection((endpoint.host, endpoint.port)) as leaving:
            leaving.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            leaving.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")

    assert get(endpoint, "/healthz") == 200
    assert capfd.readouterr().err == ""


def test_a_taken_port_is_refused_in_one_line():
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(StartupError) as refused:
        HttpEndpoint("127.0.0.1", taken.getsockname()[1], lambda: True, Metrics())

    assert "Address already in use" in str(refused.value)
