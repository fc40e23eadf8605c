"""The bench's arithmetic: what it reports is what it measured."""

import contextlib
import socket
import struct
import sys
import threading
import time
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
        import http2
        import run
        import soak

        yield Namespace(features=features, http1=http1, http2=http2, run=run, soak=soak)
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


def test_bodies_are_read_as_written(bench, tmp_path):
    messages = [b"", b"one", bytes(range(256)) * 300]

    bench.http2.write_bodies(tmp_path / "bodies", messages)

    framed = bench.http2.read_bodies(tmp_path / "bodies")
    assert [body[5:] for body in framed] == messages
    assert [int.from_bytes(body[1:5], "big") for body in framed] == [len(m) for m in messages]


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


def frame(kind, flags, stream, payload=b""):
    head = len(payload).to_bytes(3, "big") + bytes((kind, flags))
    return head + struct.pack(">I", stream) + payload


def paced(bench, port, bodies, rate_per_s=50.0, seconds=0.4):
    return bench.http2.run(
        port,
        "/a/B",
        bodies,
        connections=1,
        in_flight=1,
        warm_up_s=0.0,
        seconds=seconds,
        rate_per_s=rate_per_s,
    )


def test_requests_that_are_never_answered_count_with_their_age(bench, monkeypatch):
    monkeypatch.setattr(bench.http2, "STALL_S", 0.2)

    with server(lambda connection, _: connection.recv(1 << 16)) as port:
        figures = paced(bench, port, [b"x" * 10])

    assert figures["requests"] == 0
    assert figures["p50_ms"] > 300  # half of them were due in the first half


@pytest.mark.alone
def test_a_request_that_is_due_while_the_window_is_shut_is_sent_when_it_opens(bench):
    """A window has room for one such body; the server opens it a second one late."""
    body = b"x" * 60_000
    received = []

    def serve(connection, _):
        data, answered, opened_s = b"", 0, None
        connection.settimeout(0.05)
        while answered < 20:
            with contextlib.suppress(TimeoutError):
                data += connection.recv(1 << 20)
            count = data.count(body)
            opened_s = opened_s or (time.monotonic() + 0.3 if count else None)
            while answered < count and time.monotonic() > (opened_s or 0):
                stream = 2 * answered + 1
                answered += 1
                received.append(stream)
                connection.sendall(
                    frame(bench.http2.DATA, 0, stream, bytes(6))
                    + frame(bench.http2.HEADERS, 0x5, stream)
                    + frame(bench.http2.WINDOW_UPDATE, 0, 0, struct.pack(">I", len(body)))
                )

    with server(serve) as port:
        figures = paced(bench, port, [body], rate_per_s=25.0)

    assert len(received) in {10, 11}  # of 0.4 seconds, the first at once
    assert figures["errors"] == 0
    assert figures["p99_ms"] > 250


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
