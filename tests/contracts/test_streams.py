"""What a hot stream can rely on, whichever ingress carries it."""

import queue
import sys
import threading
import time
from concurrent import futures

import grpc
import pytest

from headrace.rpc.completion_queue.ingress import CompletionQueueIngress
from headrace.rpc.exchange import MESSAGES_MAX
from headrace.rpc.ingress import STALLED_S, HotMethod, HotStream
from headrace.rpc.status import Status
from headrace.rpc.threads import ThreadIngress

PATH = "/headrace.Test/Streamed"
UNARY_PATH = "/headrace.Test/Unary"
UNAVAILABLE = Status(grpc.StatusCode.UNAVAILABLE, "leaving", (("why", "maintenance"),))
MESSAGE_BYTES_MAX = 100_000


class Port:
    """A server with one stream and one unary method; each test chooses the stream's `accept`."""

    def __init__(self, ingress_class):
        self.accept = lambda call, message: call.reply(b"echo:" + message)
        self.begun = []
        self.server = grpc.server(
            futures.ThreadPoolExecutor(2),
            options=[
                ("grpc.so_reuseport", 0),
                ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
            ],
        )
        self.ingress = ingress_class(
            self.server,
            [HotMethod(UNARY_PATH, lambda call, message: call.reply(message))],
            [HotStream(PATH, self._begin)],
        )
        self.port = self.server.add_insecure_port("127.0.0.1:0")
        self.server.start()
        self.ingress.begin()
        self.channel = grpc.insecure_channel(f"127.0.0.1:{self.port}")
        self.unary = self.channel.unary_unary(UNARY_PATH)
        self.stream = self.channel.stream_stream(PATH)

    def _begin(self, metadata):
        self.begun.append(dict(metadata))
        return lambda call, message: self.accept(call, message)

    def close(self):
        self.channel.close()
        self.server.stop(0).wait(5)
        self.ingress.end()


class Talk:
    """A client's side of one stream: `say`, `hear`, `finish`."""

    def __init__(self, port, **options):
        self._said = queue.SimpleQueue()
        self.call = port.stream(iter(self._said.get, None), timeout=20, **options)

    def say(self, *messages):
        for message in messages:
            self._said.put(message)

    def hear(self):
        return next(self.call)

    def finish(self):
        """Say that no more comes."""
        self._said.put(None)

    def close(self):
        self.call.cancel()
        self.finish()


@pytest.fixture(params=[CompletionQueueIngress, ThreadIngress], ids=["completion-queue", "threads"])
def port(request):
    port = Port(request.param)
    yield port
    port.close()


@pytest.fixture
def talk(port):
    talk = Talk(port)
    yield talk
    talk.close()


def until(condition, timeout_s=5.0):
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "it did not happen"
        time.sleep(0.002)


def nothing_is_left(port):
    until(lambda: port.ingress.open_calls == 0 and port.ingress.open_streams == 0)


def steady(value, for_s=0.3):
    """Wait until a value has not changed for a while; return it."""
    seen, since_s = value(), time.monotonic()
    while time.monotonic() - since_s < for_s:
        if (now := value()) != seen:
            seen, since_s = now, time.monotonic()
        time.sleep(0.005)
    return seen


class Held:
    """An `accept` that keeps what it is given."""

    def __init__(self, port):
        self.calls = []
        port.accept = lambda call, message: self.calls.append((call, message))

    def __getitem__(self, i):
        return self.calls[i][0]

    def __len__(self):
        return len(self.calls)


def test_each_message_is_answered_while_the_stream_is_open(port, talk):
    for message in (b"one", b"", b"three"):
        talk.say(message)
        assert talk.hear() == b"echo:" + message

    assert port.ingress.open_streams == 1


def test_a_caller_that_sends_no_more_gets_its_answers_and_then_ok(port):
    answers = port.stream(iter([b"%d" % i for i in range(500)]), timeout=20)

    assert list(answers) == [b"echo:%d" % i for i in range(500)]
    assert answers.code() is grpc.StatusCode.OK
    nothing_is_left(port)


def test_a_stream_without_messages_ends_with_ok(port):
    answers = port.stream(iter(()), timeout=20)

    assert list(answers) == []
    assert answers.code() is grpc.StatusCode.OK
    nothing_is_left(port)


def test_what_is_still_open_after_the_last_message_is_answered_before_the_end(port, talk):
    held = Held(port)
    talk.say(b"x", b"y")
    talk.finish()
    until(lambda: len(held) == 2)

    held[1].reply(b"of y")
    assert talk.hear() == b"of y"
    until(lambda: port.ingress.open_calls == 1)
    held[0].reply(b"of x")

    assert list(talk.call) == [b"of x"]
    assert talk.call.code() is grpc.StatusCode.OK


def test_answers_go_out_in_the_order_in_which_they_are_given(port, talk):
    held = Held(port)
    talk.say(*[b"%d" % i for i in range(20)])
    until(lambda: len(held) == 20)

    for call, message in reversed(held.calls):
        call.reply(message)

    assert [talk.hear() for _ in range(20)] == [b"%d" % i for i in reversed(range(20))]


def test_initial_metadata_comes_before_any_message_is_sent(talk):
    came = threading.Event()
    threading.Thread(target=lambda: talk.call.initial_metadata() is not None and came.set()).start()

    assert came.wait(5)


def test_metadata_and_deadline_of_the_stream_are_those_of_each_message(port):
    port.accept = lambda call, message: call.reply(
        b"%s %.0f" % (dict(call.metadata)["who"].encode(), call.deadline_s - time.time())
    )

    answers = list(port.stream(iter([b"x", b"y"]), timeout=70, metadata=[("who", "me")]))

    assert answers == [b"me 70", b"me 70"]
    assert [metadata["who"] for metadata in port.begun] == ["me"]


def test_a_stream_without_a_deadline_has_an_infinite_one(port):
    port.accept = lambda call, message: call.reply(str(call.deadline_s).encode())

    assert list(port.stream(iter([b"x"]))) == [b"inf"]


def test_only_the_first_answer_to_a_message_counts(port):
    def accept(call, message):
        call.reply(message)
        call.reply(b"again")
        call.refuse(UNAVAILABLE)

    port.accept = accept
    answers = port.stream(iter([b"x", b"y"]), timeout=20)

    assert list(answers) == [b"x", b"y"]
    assert answers.code() is grpc.StatusCode.OK


def test_answers_come_from_many_threads(port, talk):
    port.accept = lambda call, message: threading.Thread(target=call.reply, args=[message]).start()
    messages = [b"%d" % i for i in range(300)]
    talk.say(*messages)
    talk.finish()

    assert sorted(talk.call) == sorted(messages)


def test_many_streams_are_open_at_once_and_unary_calls_go_on(port):
    talks = [Talk(port) for _ in range(200)]
    try:
        for i, talk in enumerate(talks):
            talk.say(b"%d" % i)
        assert [talk.hear() for talk in talks] == [b"echo:%d" % i for i in range(200)]
        assert port.ingress.open_streams == 200
        assert port.unary(b"meanwhile", timeout=5) == b"meanwhile"
    finally:
        for talk in talks:
            talk.close()
    nothing_is_left(port)


def test_one_stream_too_many_is_refused_and_there_is_room_again_when_one_ends(port, monkeypatch):
    module = sys.modules[type(port.ingress._streams).__module__]
    monkeypatch.setattr(module, "STREAMS_MAX", 3)
    talks = [Talk(port) for _ in range(3)]
    until(lambda: port.ingress.open_streams == 3)

    with pytest.raises(grpc.RpcError) as refused:
        next(port.stream(iter([b"x"]), timeout=20))
    assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    talks[0].close()
    until(lambda: port.ingress.open_streams == 2)

    assert list(port.stream(iter([b"x"]), timeout=20)) == [b"echo:x"]
    for talk in talks:
        talk.close()
    nothing_is_left(port)


def test_a_caller_who_leaves_is_seen_at_once_and_leaves_nothing_behind(port, talk):
    held = Held(port)
    talk.say(b"x", b"y")
    until(lambda: len(held) == 2)
    assert not held[0].gone

    talk.call.cancel()

    until(lambda: held[0].gone and held[1].gone)
    held[0].reply(b"too late")
    held[1].refuse(UNAVAILABLE)
    nothing_is_left(port)


def test_each_message_that_waits_is_told_once_when_its_stream_is_lost(port, talk):
    came, told = [], []

    def accept(call, message):
        came.append(message)
        call.on_gone = lambda: told.append(message)
        if message == b"answered":
            call.reply(b"done")

    port.accept = accept
    talk.say(b"x", b"answered", b"y")
    assert talk.hear() == b"done"
    until(lambda: len(came) == 3 and port.ingress.open_calls == 2)
    assert told == []

    talk.call.cancel()

    nothing_is_left(port)
    until(lambda: sorted(told) == [b"x", b"y"])
    assert steady(lambda: len(told)) == 2


def test_messages_are_told_when_the_deadline_passes_or_the_stream_is_refused(port):
    told = []

    def accept(call, message):
        call.on_gone = lambda: told.append(message)
        if message == b"refused":
            call.refuse(UNAVAILABLE)

    port.accept = accept
    late = port.stream(iter([b"late"]), timeout=0.2)
    with pytest.raises(grpc.RpcError):
        next(late)
    until(lambda: told == [b"late"])

    with pytest.raises(grpc.RpcError):
        next(port.stream(iter([b"never answered", b"refused"]), timeout=20))
    until(lambda: told == [b"late", b"never answered"])


def test_one_message_that_cannot_be_told_does_not_keep_the_others_from_it(port, talk):
    told = []

    def accept(call, message):
        def on_gone():
            told.append(message)
            raise RuntimeError("secret")

        call.on_gone = on_gone

    port.accept = accept
    talk.say(b"x", b"y", b"z")
    until(lambda: port.ingress.open_calls == 3)

    talk.call.cancel()

    until(lambda: sorted(told) == [b"x", b"y", b"z"])
    nothing_is_left(port)
    assert list(port.stream(iter(()), timeout=20)) == []
    assert port.ingress.is_alive


def test_a_message_that_is_answered_knows_no_longer_whom_to_tell(port, talk):
    held = Held(port)
    talk.say(b"x", b"y")
    until(lambda: len(held) == 2)
    for call, _ in held.calls:
        call.on_gone = lambda: None

    held[0].reply(b"of x")
    assert held[0].on_gone is None
    talk.call.cancel()
    until(lambda: held[1].on_gone is None)


def test_a_caller_who_leaves_while_its_message_is_accepted_is_told_of_after_that(port, talk):
    accepted, told = threading.Event(), []

    def accept(call, message):
        talk.call.cancel()
        waited_s = time.monotonic() + 0.3
        while not call.gone and time.monotonic() < waited_s:
            time.sleep(0.002)
        call.on_gone = lambda: told.append(accepted.is_set())
        accepted.set()

    port.accept = accept
    talk.say(b"x")

    until(lambda: told == [True])
    nothing_is_left(port)


def test_an_idle_stream_whose_caller_leaves_is_no_longer_open(port, talk):
    until(lambda: port.ingress.open_streams == 1)

    talk.call.cancel()

    nothing_is_left(port)


def test_a_deadline_that_passes_ends_the_stream(port):
    held = Held(port)
    answers = port.stream(iter([b"x"]), timeout=0.2)

    with pytest.raises(grpc.RpcError) as late:
        next(answers)

    assert late.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    until(lambda: held[0].gone)
    held[0].reply(b"too late")
    nothing_is_left(port)


def test_an_accept_that_raises_ends_its_stream_without_a_word_and_no_other(port, talk):
    def accept(call, message):
        if message == b"bad":
            raise RuntimeError("secret")
        call.reply(message)

    port.accept = accept
    talk.say(b"good")
    assert talk.hear() == b"good"

    answers = port.stream(iter([b"good", b"bad", b"never"]), timeout=20)
    assert next(answers) == b"good"
    with pytest.raises(grpc.RpcError) as failed:
        next(answers)

    assert failed.value.code() is grpc.StatusCode.INTERNAL
    assert "secret" not in failed.value.details()
    talk.say(b"still here")
    assert talk.hear() == b"still here"
    assert port.ingress.is_alive


def test_a_refused_message_ends_the_stream_with_that_status_after_the_answers_given(port, talk):
    held = Held(port)
    talk.say(b"x", b"y", b"z")
    until(lambda: len(held) == 3)

    held[1].reply(b"of y")
    held[2].refuse(UNAVAILABLE)
    held[0].reply(b"too late")

    assert talk.hear() == b"of y"
    with pytest.raises(grpc.RpcError) as refused:
        talk.hear()
    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
    assert ("why", "maintenance") in refused.value.trailing_metadata()
    nothing_is_left(port)


def test_a_message_over_the_limit_ends_its_stream_and_no_other(port, talk):
    large = port.stream(iter([b"x" * (MESSAGE_BYTES_MAX + 1)]), timeout=20)

    with pytest.raises(grpc.RpcError) as refused:
        next(large)

    assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "larger than max" in refused.value.details()
    talk.say(b"x")
    assert talk.hear() == b"echo:x"
    assert port.unary(b"x", timeout=5) == b"x"


def test_no_more_messages_are_taken_than_may_be_unanswered(port, talk):
    held = Held(port)
    talk.say(*[b"%d" % i for i in range(3 * MESSAGES_MAX)])
    until(lambda: len(held) == MESSAGES_MAX)
    assert port.unary(b"a round trip", timeout=5) == b"a round trip"
    assert len(held) == MESSAGES_MAX

    for i in range(3 * MESSAGES_MAX):
        until(lambda count=i: len(held) > count)
        held[i].reply(b"%d" % i)

    assert [talk.hear() for _ in range(3 * MESSAGES_MAX)] == [
        b"%d" % i for i in range(3 * MESSAGES_MAX)
    ]


def test_a_reader_that_does_not_read_is_held_back_and_gets_everything_later(port, talk):
    answer = bytes(64 << 10)
    taken = []

    def accept(call, message):
        taken.append(message)
        call.reply(answer)

    port.accept = accept
    count = 5 * MESSAGES_MAX
    talk.say(*[b"%d" % i for i in range(count)])
    talk.finish()

    assert 0 < steady(lambda: len(taken)) < count
    assert port.unary(b"meanwhile", timeout=5) == b"meanwhile"
    assert sum(1 for _ in talk.call) == count
    assert len(taken) == count


def test_after_refusing_idle_streams_end_at_once_and_new_ones_are_refused(port, talk):
    talk.say(b"x")
    talk.hear()

    port.ingress.refuse_new(UNAVAILABLE)

    for call in (talk.call, port.stream(iter([b"x"]), timeout=20)):
        with pytest.raises(grpc.RpcError) as refused:
            next(call)
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
        assert refused.value.details() == "leaving"
    nothing_is_left(port)


def test_after_refusing_messages_that_were_taken_are_answered_and_the_stream_ends(port, talk):
    held = Held(port)
    talk.say(b"x", b"y")
    until(lambda: len(held) == 2)

    port.ingress.refuse_new(UNAVAILABLE)
    talk.say(b"too late")
    held[0].reply(b"of x")
    assert talk.hear() == b"of x"
    until(lambda: port.ingress.open_calls == 1)
    held[1].reply(b"of y")
    assert talk.hear() == b"of y"

    with pytest.raises(grpc.RpcError) as refused:
        talk.hear()
    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
    assert len(held) == 2
    nothing_is_left(port)


def test_a_reader_that_takes_nothing_is_not_waited_for(port, talk):
    port.accept = lambda call, message: call.reply(bytes(1 << 20))
    talk.say(*[b"x"] * MESSAGES_MAX)
    assert steady(lambda: port.ingress.open_calls) > 0

    port.ingress.refuse_new(UNAVAILABLE)

    assert port.ingress.open_calls > 0
    until(lambda: port.ingress.open_calls == 0, timeout_s=STALLED_S + 3)
    assert port.ingress.open_streams == 1


def test_clients_that_leave_in_the_middle_of_everything_leave_nothing_behind(port):
    port.accept = lambda call, message: threading.Thread(target=call.reply, args=[message]).start()
    for i in range(10):
        with grpc.insecure_channel(f"127.0.0.1:{port.port}") as channel:
            stream = channel.stream_stream(PATH)
            calls = [
                stream(iter([b"x"] * 50), timeout=0.002 if j % 3 == 0 else 5) for j in range(8)
            ]
            if i % 2:
                next(calls[1])

    nothing_is_left(port)
    assert port.unary(b"still here", timeout=5) == b"still here"
    assert port.ingress.is_alive
