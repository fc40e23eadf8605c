"""The load generator against servers: real ones of gRPC's, and some that misbehave on purpose."""

import contextlib
import itertools
import json
import socket
import struct
import subprocess
import sys
import threading
import time
from concurrent import futures

import bench_modules
import grpc
import pytest

bench = bench_modules.load("http2", "frames", "answers", "connection", "header_blocks", "arrivals")
http2, frames = bench.http2, bench.frames

PATH = "/a.Service/Method"
CODES = {code.value[0]: code for code in grpc.StatusCode}


@contextlib.contextmanager
def serving(handle, **options):
    """Run a real gRPC server whose one method is `handle(message, context)`; yield its port."""

    class Handler(grpc.GenericRpcHandler):
        def service(self, details):
            return grpc.unary_unary_rpc_method_handler(handle) if details.method == PATH else None

    server = grpc.server(
        futures.ThreadPoolExecutor(8),
        (Handler(),),
        options=[(f"grpc.{name}", value) for name, value in options.items()],
    )
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield port
    server.stop(0).wait(10)


def bodies(*messages):
    return [b"\0" + struct.pack(">I", len(message)) + message for message in messages]


def closed(port, messages, answers=None, **more):
    options = {"connections": 2, "in_flight": 3, "warm_up_s": 0.0, "seconds": 0.3, **more}
    return http2.run(port, PATH, bodies(*messages), answers=answers, **options)


def opened(port, messages, answers=None, rate_per_s=100.0, **more):
    options = {"connections": 2, "in_flight": 1, "warm_up_s": 0.0, "seconds": 0.4, **more}
    return http2.run(
        port, PATH, bodies(*messages), rate_per_s=rate_per_s, answers=answers, **options
    )


NUMBERS = [struct.pack("<f", number) for number in range(16)]


@pytest.mark.parametrize("load", [closed, opened])
def test_each_reply_is_compared_with_the_answer_to_its_own_request(load):
    with serving(lambda message, context: b"before it " + message) as port:
        own = load(port, NUMBERS, bench.answers.Answers(NUMBERS, 1e-6))
        as_bytes = load(port, NUMBERS, bench.answers.Answers(NUMBERS))
        anothers = load(port, NUMBERS, bench.answers.Answers(NUMBERS[1:] + NUMBERS[:1], 1e-6))

    assert own["requests"] > 0
    assert (own["wrong"], own["errors"], as_bytes["wrong"]) == (0, 0, 0)
    assert anothers["wrong"] >= anothers["requests"] == anothers["errors"] > 0


def test_an_answer_over_many_frames_is_put_together():
    message = bytes(range(256)) * 1_000

    with serving(lambda _, context: message) as port:
        figures = closed(port, [b"x"], bench.answers.Answers([message]))

    assert figures["requests"] > 0
    assert figures["errors"] == 0


def test_statuses_are_counted_by_name():
    """As C-core writes them: some with a message of their own, in turn, many times over."""

    def handle(message, context):
        code = message[0]
        if code:
            context.set_trailing_metadata((("grpc-retry-pushback-ms", "100"),))
            context.abort(CODES[code], f"it was {code}" * (code % 3))
        return b"fine"

    codes = [0, 8, 0, 4, 14, 1, 13, 8]
    with serving(handle) as port:
        figures = opened(port, [bytes((code,)) for code in codes], rate_per_s=400.0, is_even=True)

    answered = figures["requests"]
    assert answered == figures["offered"] == 160
    assert figures["statuses"] == {
        "OK": answered // 4,
        "RESOURCE_EXHAUSTED": answered // 4,
        "DEADLINE_EXCEEDED": answered // 8,
        "UNAVAILABLE": answered // 8,
        "CANCELLED": answered // 8,
        "other": answered // 8,
    }
    assert figures["errors"] == answered * 3 // 4
    assert figures["refused_p50_ms"] >= figures["refused_from_send_p50_ms"] > 0


def test_every_call_tells_the_server_its_path_and_how_long_it_has():
    left_s, seen = [], set()

    def handle(message, context):
        left_s.append(context.time_remaining())
        seen.update(context.invocation_metadata())
        return b"fine"

    with serving(handle) as port:
        figures = closed(port, [b"x"], timeout_s=30.0)

    assert figures["errors"] == 0
    assert len(left_s) >= figures["requests"] > 6  # more than the first ones of their connections
    assert all(20 < one <= 30 for one in left_s)


def test_a_call_whose_time_is_over_is_one_that_exceeded_its_deadline():
    def handle(message, context):
        time.sleep(0.3)
        return b"fine"

    with serving(handle) as port:
        figures = opened(port, [b"x"], rate_per_s=20.0, timeout_s=0.05, seconds=0.2, is_even=True)

    assert figures["statuses"]["DEADLINE_EXCEEDED"] == figures["requests"] == 4
    assert figures["goodput_per_s"] == 0


def test_no_more_are_open_than_the_server_allows_and_the_others_are_counted():
    lock, running, most = threading.Lock(), [], 0
    ends = threading.Event()

    def handle(message, context):
        nonlocal most
        with lock:
            running.append(context)
            most = max(most, sum(one.is_active() for one in running))  # not those given up by now
        ends.wait(0.2)
        with lock:
            running.remove(context)
        return b"fine"

    with serving(handle, max_concurrent_streams=2) as port:
        figures = opened(
            *(port, [b"x"]),
            rate_per_s=4_000.0,
            seconds=0.01,
            is_even=True,
            connections=1,
            timeout_s=1.0,
        )
        ends.set()

    assert most == 2
    assert figures["held"] >= figures["offered"] - 4
    assert figures["offered"] == 40
    assert figures["unsent"] > 0  # of a second, two at a time, 0.2 each
    assert figures["requests"] + figures["unsent"] == 40


def test_a_call_that_has_waited_for_its_turn_tells_the_server_how_much_time_is_left():
    left_s = []

    def handle(message, context):
        left_s.append(context.time_remaining())
        time.sleep(0.1)
        return b"fine"

    with serving(handle, max_concurrent_streams=1) as port:
        opened(port, [b"x"], rate_per_s=50.0, connections=1, timeout_s=20.0, seconds=0.1)

    # Five are due at once, about, and each waits for those before it: a tenth of a second each.
    for before, after in itertools.pairwise(left_s):
        assert 0.05 < before - after < 0.3
    assert len(left_s) > 2


def test_the_load_that_follows_tells_when_the_server_is_well_again():
    ill_until_s = time.monotonic() + 60

    def handle(message, context):
        if time.monotonic() < ill_until_s:
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "too much")
        return b"fine"

    with serving(handle) as port:
        then = bench.arrivals.Step(150.0, 3.0)
        ill_until_s = time.monotonic() + 1.5
        figures = opened(port, [b"x"], rate_per_s=50.0, then=then, timeout_s=10.0, seconds=0.3)

    assert figures["statuses"]["OK"] == 0
    assert 0 < figures["recovered_s"] < 1.3  # 1.2, less what it took to connect


def test_the_command_reports_as_json(tmp_path):
    http2.write_bodies(tmp_path / "bodies", NUMBERS)
    http2.write_answers(tmp_path / "answers", NUMBERS)
    command = [sys.executable, http2.__file__, "--path", PATH, "--bodies", tmp_path / "bodies"]
    command += ["--answers", tmp_path / "answers", "--tolerance", "1e-6", "--seconds", "0.3"]
    command += ["--warm-up", "0.1", "--connections", "1", "--timeout", "20"]

    with serving(lambda message, context: message) as port:
        command += ["--port", str(port)]
        closed, opened = (
            json.loads(subprocess.run([*command, *more], capture_output=True, check=True).stdout)
            for more in (
                ["--in-flight", "2"],
                ["--rate", "50", "--arrivals", "even", "--then", "20:0.2"],
            )
        )

    for figures in (closed, opened):
        assert figures["requests_per_s"] > 0
        assert (figures["errors"], figures["wrong"]) == (0, 0)
        assert 0 < figures["p50_ms"] <= figures["p99_ms"]
    assert opened["window_s"] == pytest.approx(0.3)
    assert opened["offered"] == 15
    assert opened["recovered_s"] is not None


def test_bodies_are_read_as_written(tmp_path):
    messages = [b"", b"one", bytes(range(256)) * 300]

    http2.write_bodies(tmp_path / "bodies", messages)

    framed = http2.read_bodies(tmp_path / "bodies")
    assert [body[5:] for body in framed] == messages
    assert [int.from_bytes(body[1:5], "big") for body in framed] == [len(m) for m in messages]


@pytest.mark.parametrize(
    ("seconds", "written"),
    [(0.8, "800000u"), (1e-9, "1u"), (99.9, "99900000u"), (100.0, "100000m"), (3600, "3600000m")],
)
def test_a_timeout_is_written_in_eight_digits(seconds, written):
    assert bench.header_blocks.grpc_timeout(seconds) == written


@pytest.mark.parametrize("seconds", [0.0, -1.0, 86_401.0, float("nan")])
def test_a_timeout_that_is_none_is_refused(seconds):
    with pytest.raises(ValueError, match="above 0"):
        bench.header_blocks.grpc_timeout(seconds)


@contextlib.contextmanager
def scripted(serve):
    """Serve each connection by `serve(connection)` once it is greeted; yield the port."""
    ends = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def accept():
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    threading.Thread(target=run, args=(connection,), daemon=True).start()

        def run(connection):
            with connection, contextlib.suppress(OSError):
                connection.sendall(frames.frame(frames.SETTINGS, 0, 0))
                serve(connection)
                ends.wait(30)

        threading.Thread(target=accept, daemon=True).start()
        yield listener.getsockname()[1]
        ends.set()
        listener.shutdown(socket.SHUT_RDWR)


def more_of(connection):
    """Receive some bytes; one that is closed has no more, and a script must not ask for ever."""
    data = connection.recv(1 << 20)
    if not data:
        raise ConnectionResetError
    return data


STATUS_0 = b"\x00\x0bgrpc-status\x010"


def answer(stream, message=b"", *, ends=True):
    data = frames.frame(frames.DATA, 0, stream, message) if message else b""
    return data + (frames.frame(frames.HEADERS, 0x5, stream, STATUS_0) if ends else b"")


def answering(*replies):
    """Serve the requests, of `x` each, with these replies in turn."""

    def serve(connection):
        data = b""
        for number, reply in enumerate(replies):
            while data.count(bodies(b"x")[0]) <= number:
                data += more_of(connection)
            connection.sendall(reply(2 * number + 1))

    return serve


def test_ok_without_one_whole_message_is_wrong():
    fine = b"\0\0\0\0\4fine"
    replies = [fine, b"", fine[:-1], fine + fine]
    serve = answering(*[lambda stream, one=one: answer(stream, one) for one in replies])

    with scripted(serve) as port:
        figures = opened(port, [b"x"], rate_per_s=10.0, connections=1, is_even=True)

    assert figures["statuses"]["OK"] == 4
    assert (figures["wrong"], figures["errors"]) == (3, 3)


def test_streams_that_the_server_resets_count_by_why():
    resets = [7, 8, 11, 2]  # REFUSED_STREAM, CANCEL, ENHANCE_YOUR_CALM, INTERNAL_ERROR
    replies = [
        lambda stream, code=code: frames.frame(
            frames.RST_STREAM, 0, stream, struct.pack(">I", code)
        )
        for code in resets
    ]

    with scripted(answering(*replies)) as port:
        figures = opened(port, [b"x"], rate_per_s=10.0, connections=1, is_even=True)

    statuses = figures["statuses"]
    assert {name for name, count in statuses.items() if count} == {
        *("UNAVAILABLE", "CANCELLED", "RESOURCE_EXHAUSTED", "other")
    }


def test_requests_that_are_never_answered_count_with_their_age(monkeypatch):
    monkeypatch.setattr(http2, "STALL_S", 0.2)

    with scripted(lambda connection: connection.recv(1 << 16)) as port:
        figures = opened(port, [b"x" * 10], rate_per_s=50.0, is_even=True)

    assert figures["requests"] == 0
    assert figures["unanswered"] == 20
    assert figures["p50_ms"] > 300  # half of them were due in the first half


@pytest.mark.alone
def test_a_request_that_is_due_while_the_window_is_shut_is_sent_when_it_opens():
    """A window has room for four such bodies; the server opens it late, by one at a time."""
    body = b"x" * 16_000
    framed = bodies(body)[0]
    received = []

    def serve(connection):
        data, answered, opens_s = b"", 0, None
        connection.settimeout(0.05)
        while answered < 20:
            with contextlib.suppress(TimeoutError):
                data += more_of(connection)
            count = data.count(body)
            opens_s = opens_s or (time.monotonic() + 0.3 if count else None)
            while answered < count and time.monotonic() > (opens_s or 0):
                stream = 2 * answered + 1
                answered += 1
                received.append(stream)
                more = struct.pack(">I", len(framed))
                connection.sendall(
                    answer(stream, b"\0\0\0\0\1x") + frames.frame(frames.WINDOW_UPDATE, 0, 0, more)
                )

    with scripted(serve) as port:
        figures = opened(port, [body], rate_per_s=25.0, connections=1, is_even=True)

    assert len(received) == 10
    assert figures["errors"] == 0
    assert figures["held"] > 0
    assert figures["p99_ms"] > 250


def test_a_body_that_fits_no_frame_is_refused_before_it_is_sent():
    with (
        scripted(lambda connection: None) as port,
        pytest.raises(ValueError, match="16384 in a frame"),
    ):
        opened(port, [b"x" * 20_000])


def test_a_server_that_hangs_up_is_an_error():
    def hang_up(connection):
        connection.recv(1 << 16)
        connection.shutdown(socket.SHUT_RDWR)

    with scripted(hang_up) as port, pytest.raises(ConnectionError):
        closed(port, [b"x"])
