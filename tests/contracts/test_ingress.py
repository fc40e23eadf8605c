"""What a hot method can rely on, whichever ingress carries its calls."""

import contextlib
import threading
import time
from concurrent import futures

import grpc
import pytest

from headrace.rpc.completion_queue.ingress import CompletionQueueIngress
from headrace.rpc.completion_queue.self_check import unusable_because
from headrace.rpc.ingress import HotMethod
from headrace.rpc.status import Status
from headrace.rpc.threads import ThreadIngress

PATH = "/headrace.Test/Hot"
STREAMS_MAX = 200
UNAVAILABLE = Status(grpc.StatusCode.UNAVAILABLE, "leaving")


class Port:
    """A server with one hot method, whose `accept` each test chooses."""

    def __init__(self, ingress_class):
        self.accept = lambda call, message: call.reply(b"echo:" + message)
        self.glance = lambda call: None
        self.server = grpc.server(
            futures.ThreadPoolExecutor(2),
            options=[
                ("grpc.so_reuseport", 0),
                ("grpc.max_receive_message_length", 1_000),
                ("grpc.max_send_message_length", 2_000),
                ("grpc.max_concurrent_streams", STREAMS_MAX),
            ],
        )
        method = HotMethod(
            PATH,
            lambda call, message: self.accept(call, message),
            lambda call: self.glance(call),
        )
        self.ingress = ingress_class(self.server, [method])
        self.port = self.server.add_insecure_port("127.0.0.1:0")
        self.server.start()
        self.ingress.begin()
        self.channel = grpc.insecure_channel(f"127.0.0.1:{self.port}")
        self.hot = self.channel.unary_unary(PATH)

    def close(self):
        self.channel.close()
        self.server.stop(0).wait(5)
        self.ingress.end()


@pytest.fixture(params=[CompletionQueueIngress, ThreadIngress], ids=["completion-queue", "threads"])
def port(request):
    port = Port(request.param)
    yield port
    port.close()


def until(condition, timeout_s=5.0):
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "it did not happen"
        time.sleep(0.002)


def test_the_installed_grpcio_has_what_the_completion_queue_needs():
    assert unusable_because() is None


def test_a_proxy_from_the_environment_does_not_come_between(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "grpc_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")

    assert unusable_because() is None


def test_a_reply_reaches_its_caller(port):
    assert port.hot(b"hello", timeout=5) == b"echo:hello"


def test_an_empty_message_is_a_message(port):
    assert port.hot(b"", timeout=5) == b"echo:"


def test_a_reply_may_come_later_from_another_thread(port):
    held = []
    arrived = threading.Event()

    def accept(call, message):
        held.append(call)
        arrived.set()

    port.accept = accept
    future = port.hot.future(b"x", timeout=5)
    assert arrived.wait(5)
    held[0].reply(b"later")

    assert future.result() == b"later"


def test_many_calls_in_flight_are_each_answered_once_and_right(port):
    port.accept = lambda call, message: threading.Thread(
        target=call.reply, args=(b"echo:" + message,)
    ).start()

    pending = [port.hot.future(b"%d" % i, timeout=10) for i in range(150)]

    assert [f.result() for f in pending] == [b"echo:%d" % i for i in range(150)]
    until(lambda: port.ingress.open_calls == 0)


def test_whoever_keeps_an_answered_call_keeps_no_stream_of_its_connection(port):
    kept = []

    def accept(call, message):
        kept.append(call)
        call.reply(message)

    port.accept = accept
    with contextlib.ExitStack() as stack:
        stack.callback(kept.clear)
        for number in range(2 * STREAMS_MAX):
            assert port.hot(b"%d" % number, timeout=10) == b"%d" % number
    until(lambda: port.ingress.open_calls == 0)


def test_only_the_first_answer_counts(port):
    def accept(call, message):
        call.reply(b"first")
        call.reply(b"second")
        call.refuse(UNAVAILABLE)

    port.accept = accept

    assert port.hot(b"x", timeout=5) == b"first"
    until(lambda: port.ingress.open_calls == 0)


def test_a_refusal_carries_code_details_and_trailing_metadata(port):
    status = Status(
        grpc.StatusCode.RESOURCE_EXHAUSTED, "too much", (("grpc-retry-pushback-ms", "100"),)
    )
    port.accept = lambda call, message: call.refuse(status)

    with pytest.raises(grpc.RpcError) as refused:
        port.hot(b"x", timeout=5)

    assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert refused.value.details() == "too much"
    assert ("grpc-retry-pushback-ms", "100") in refused.value.trailing_metadata()


def test_metadata_of_the_caller_is_there(port):
    port.accept = lambda call, message: call.reply(dict(call.metadata)["who"].encode())

    assert port.hot(b"x", timeout=5, metadata=[("who", "me")]) == b"me"


def test_the_deadline_is_known_in_unix_seconds(port):
    port.accept = lambda call, message: call.reply(b"%f" % (call.deadline_s - time.time()))

    assert float(port.hot(b"x", timeout=7)) == pytest.approx(7, abs=0.5)


def test_no_deadline_is_infinite(port):
    port.accept = lambda call, message: call.reply(str(call.deadline_s).encode())

    assert port.hot(b"x") == b"inf"


def test_a_cancelled_caller_is_seen_while_its_call_waits(port):
    held = []
    port.accept = lambda call, message: held.append(call)
    future = port.hot.future(b"x", timeout=30)
    until(lambda: held)
    assert not held[0].gone

    future.cancel()

    until(lambda: held[0].gone)
    held[0].reply(b"too late")
    until(lambda: port.ingress.open_calls == 0)


def test_a_deadline_that_passes_is_seen_while_its_call_waits(port):
    held = []
    port.accept = lambda call, message: held.append(call)
    with pytest.raises(grpc.RpcError) as late:
        port.hot(b"x", timeout=0.1)

    assert late.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    until(lambda: held[0].gone)
    held[0].refuse(UNAVAILABLE)
    until(lambda: port.ingress.open_calls == 0)


def test_a_caller_who_leaves_is_told_of_once_and_not_when_the_call_is_answered(port):
    held, told = [], []

    def accept(call, message):
        call.on_gone = lambda: told.append(message)
        held.append(call)

    port.accept = accept
    leaving, staying = (port.hot.future(name, timeout=30) for name in (b"leaving", b"staying"))
    until(lambda: len(held) == 2)

    leaving.cancel()
    until(lambda: told == [b"leaving"])
    for call in held:
        call.reply(b"done")

    assert staying.result() == b"done"
    until(lambda: port.ingress.open_calls == 0)
    assert told == [b"leaving"]
    assert all(call.on_gone is None for call in held)


def test_a_caller_who_leaves_while_its_call_is_accepted_is_told_of_after_that(port):
    begun, accepted, told = threading.Event(), threading.Event(), []

    def accept(call, message):
        assert begun.wait(5)
        future.cancel()
        waited_s = time.monotonic() + 0.3
        while not call.gone and time.monotonic() < waited_s:
            time.sleep(0.002)
        call.on_gone = lambda: (told.append(accepted.is_set()), call.refuse(UNAVAILABLE))
        accepted.set()

    port.accept = accept
    future = port.hot.future(b"x", timeout=30)
    begun.set()

    until(lambda: told == [True])
    until(lambda: port.ingress.open_calls == 0)


def test_a_lost_connection_is_seen_while_its_call_waits(port):
    held = []
    port.accept = lambda call, message: held.append(call)
    future = port.hot.future(b"x", timeout=30)
    until(lambda: held)

    port.channel.close()

    assert future.code() is grpc.StatusCode.CANCELLED

    until(lambda: held[0].gone)
    held[0].reply(b"too late")
    until(lambda: port.ingress.open_calls == 0)


def test_a_method_that_raises_fails_its_call_without_a_word_and_not_the_next(port):
    def accept(call, message):
        if message == b"bad":
            raise RuntimeError("secret")
        call.reply(b"fine")

    port.accept = accept

    with pytest.raises(grpc.RpcError) as failed:
        port.hot(b"bad", timeout=5)

    assert failed.value.code() is grpc.StatusCode.INTERNAL
    assert "secret" not in failed.value.details()
    assert port.hot(b"good", timeout=5) == b"fine"
    assert port.ingress.is_alive


def test_a_glance_that_raises_fails_its_call_without_a_word_and_not_the_next(port):
    def glance(call):
        raise RuntimeError("secret")

    port.accept, port.glance = lambda call, message: call.reply(message), glance
    with pytest.raises(grpc.RpcError) as failed:
        port.hot(b"bad", timeout=5)
    port.glance = lambda call: None

    assert failed.value.code() is grpc.StatusCode.INTERNAL
    assert "secret" not in failed.value.details()
    assert port.hot(b"good", timeout=5) == b"good"


def test_a_message_over_the_limit_is_refused_and_the_next_is_served(port):
    with pytest.raises(grpc.RpcError) as refused:
        port.hot(b"x" * 1_001, timeout=5)

    assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "larger than max" in refused.value.details()
    assert port.hot(b"x", timeout=5) == b"echo:x"
    until(lambda: port.ingress.open_calls == 0)


def test_a_reply_over_the_limit_fails_its_call_and_not_the_next(port):
    port.accept = lambda call, message: call.reply(message * 100)

    with pytest.raises(grpc.RpcError) as refused:
        port.hot(b"x" * 100, timeout=5)

    assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert port.hot(b"x", timeout=5) == b"x" * 100
    until(lambda: port.ingress.open_calls == 0)


def test_a_call_without_a_message_is_refused(port):
    stream = port.channel.stream_unary(PATH)

    with pytest.raises(grpc.RpcError) as refused:
        stream(iter(()), timeout=5)

    assert refused.value.code() in (
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.UNIMPLEMENTED,  # grpcio's own handlers
    )
    assert port.hot(b"x", timeout=5) == b"echo:x"


def test_new_calls_are_refused_politely_and_those_accepted_are_answered(port):
    held = []
    port.accept = lambda call, message: held.append(call)
    accepted = port.hot.future(b"x", timeout=30)
    until(lambda: held)

    port.ingress.refuse_new(UNAVAILABLE)
    with pytest.raises(grpc.RpcError) as refused:
        port.hot(b"late", timeout=5)
    held[0].reply(b"kept")

    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
    assert refused.value.details() == "leaving"
    assert accepted.result() == b"kept"
    until(lambda: port.ingress.open_calls == 0)


def test_a_call_that_is_refused_at_a_glance_is_not_accepted_and_others_are(port):
    accepted, seen = [], []

    def accept(call, message):
        accepted.append(message)
        call.reply(message)

    def glance(call):
        who = dict(call.metadata).get("who")
        seen.append((who, call.deadline_s - time.time() < 6))
        return UNAVAILABLE if who == "nobody" else None

    port.accept, port.glance = accept, glance

    with pytest.raises(grpc.RpcError) as refused:
        port.hot(b"unread", timeout=5, metadata=[("who", "nobody")])

    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
    assert refused.value.details() == "leaving"
    assert port.hot(b"read", timeout=5) == b"read"
    assert accepted == [b"read"]
    assert seen == [("nobody", True), (None, True)]
    until(lambda: port.ingress.open_calls == 0)


def test_a_call_that_is_refused_at_a_glance_may_be_of_any_size_or_none(port):
    port.glance = lambda call: UNAVAILABLE

    for message in (b"", b"x" * 1_000):
        assert port.hot.future(message, timeout=5).code() is grpc.StatusCode.UNAVAILABLE
    until(lambda: port.ingress.open_calls == 0)
    port.glance = lambda call: None
    assert port.hot(b"x", timeout=5) == b"echo:x"


def test_a_call_that_never_sends_its_message_does_not_hold_up_a_stop(port):
    waiting = threading.Event()

    def nothing():
        waiting.wait(20)
        yield from ()

    stream = port.channel.stream_unary(PATH).future(nothing(), timeout=20)
    assert port.hot(b"x", timeout=5) == b"echo:x"  # behind it on the same connection

    port.ingress.refuse_new(UNAVAILABLE)

    until(lambda: port.ingress.open_calls == 0)
    stream.cancel()
    waiting.set()


def test_clients_that_leave_in_the_middle_of_everything_leave_nothing_behind(port):
    for _ in range(20):
        with contextlib.ExitStack() as stack:
            channel = stack.enter_context(grpc.insecure_channel(f"127.0.0.1:{port.port}"))
            hot = channel.unary_unary(PATH)
            for i in range(20):
                hot.future(b"%d" % i, timeout=0.001 if i % 3 == 0 else 5)

    assert port.hot(b"still here", timeout=5) == b"echo:still here"
    until(lambda: port.ingress.open_calls == 0)
