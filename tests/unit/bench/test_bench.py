"""The bench's arithmetic: what it reports is what it measured."""

import contextlib
import socket
import sys
import threading
from argparse import Namespace
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[3] / "loadtest" / "bench"


@pytest.fixture(scope="module")
def bench():
    sys.path.insert(0, str(BENCH))
    try:
        import features
        import http1
        import soak

        yield Namespace(features=features, http1=http1, soak=soak)
    finally:
        sys.path.remove(str(BENCH))


def test_a_line_that_grows_is_told_from_one_that_wobbles(bench):
    rising = bench.soak.growth([10.0, 10.3, 10.4, 10.8, 11.0])
    level = bench.soak.growth([10.0, 10.9, 9.8, 10.8, 10.1])
    falling = bench.soak.growth([12.0, 11.0, 10.0])

    assert rising.change == pytest.approx(0.095, abs=0.005)
    assert (rising.is_real, level.is_real, falling.is_real) == (True, False, False)


@contextlib.contextmanager
def server(serve):
    """Serve each connection by `serve(connection, number)` until the block ends; yield the port."""
    ends = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def accept():
            number = 0
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                thread = threading.Thread(target=run, args=(connection, number), daemon=True)
                thread.start()
                number += 1

        def run(connection, number):
            with connection, contextlib.suppress(OSError):
                serve(connection, number)
                ends.wait(30)

        threading.Thread(target=accept, daemon=True).start()
        yield listener.getsockname()[1]
        ends.set()
        listener.shutdown(socket.SHUT_RDWR)


def test_a_request_that_fails_twice_is_an_error(bench):
    def serve(connection, number):
        connection.recv(1 << 16)
        connection.close()

    with server(serve) as port:
        figures = bench.http1.run(port, "/", [b"{}"], connections=2, warm_up_s=0.0, seconds=1.0)

    assert figures["errors"] == figures["requests"] > 0


def test_a_fixed_rate_is_the_same_for_all_and_rounds_have_enough_requests(bench):
    rates = {rows: bench.features.Shape(rows, "paced").rate_per_s for rows in (1, 10, 64, 100, 500)}

    assert rates == {1: 100.0, 10: 50.0, 64: 50.0, 100: 10.0, 500: 1.0}
    assert bench.features.Shape(500, "paced").seconds(1.5) == 10.0
    assert bench.features.Shape(500, "loaded").seconds(1.5) == 1.5
    assert str(bench.features.Shape(10, "paced")) == "10 rows, 50 requests/s"
