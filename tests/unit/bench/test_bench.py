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
        import run
        import soak

        yield Namespace(features=features, http1=http1, run=run, soak=soak)
    finally:
        sys.path.remove(str(BENCH))


def contest(bench, target, gateway, other):
    return bench.run.Contest(
        "who is faster",
        ("gateway", "ceiling"),
        "requests_per_s",
        target,
        {"gateway": gateway, "ceiling": other},
    )


def test_a_ratio_is_of_medians_so_that_one_odd_round_decides_nothing(bench):
    found = contest(bench, 0.75, [80.0, 1.0, 82.0], [100.0, 100.0, 900.0])

    assert found.ratio == pytest.approx(0.8)
    assert not found.is_missed


def test_a_target_is_missed_below_it_and_not_at_it(bench):
    assert contest(bench, 0.8, [79.0], [100.0]).is_missed
    assert not contest(bench, 0.8, [80.0], [100.0]).is_missed
    assert not contest(bench, None, [1.0], [100.0]).is_missed


def test_the_page_shows_every_round_and_how_to_repeat_it(bench):
    found = contest(bench, 0.75, [80.0, 81.0], [100.0, 101.0])

    page = bench.run._page([found], Namespace(rounds=2, seconds=1.5, only="tensor"))

    for shown in ("80.00, 81.00", "100.00, 101.00", "0.80, 0.80", "| 0.80 | ≥ 0.75 |"):
        assert shown in page
    assert "run.py --rounds 2 --seconds 1.5 --only tensor" in page


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
        figures = bench.http1.run(port, "/", [b"{}"], connections=2, warm_up_s=0.0, seconds=0.2)

    assert figures["errors"] == figures["requests"] > 0


def test_a_fixed_rate_is_the_same_for_all_and_rounds_have_enough_requests(bench):
    rates = {rows: bench.features.Shape(rows, "paced").rate_per_s for rows in (1, 10, 64, 100, 500)}

    assert rates == {1: 100.0, 10: 50.0, 64: 50.0, 100: 10.0, 500: 1.0}
    assert bench.features.Shape(500, "paced").seconds(1.5) == 10.0
    assert bench.features.Shape(500, "loaded").seconds(1.5) == 1.5
    assert str(bench.features.Shape(10, "paced")) == "10 rows, 50 requests/s"
