"""A worker does what its supervisor says, and ends in the right way whenever it is told to."""

import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from headrace.errors import Draining
from headrace.workers.channel import Decoder, encode
from headrace.workers.link import SupervisorLink

TIMEOUT_S = 10.0

# A thread that would have ended the process ends by raising.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")


class Supervisor:
    """The other end of a link."""

    def __init__(self):
        self._channel, self._theirs = socket.socketpair()
        self._channel.settimeout(TIMEOUT_S)
        self._decoder = Decoder()
        self.say(type="start", seen=0)
        self.link = SupervisorLink(self._theirs)
        self.link.receive_start()
        self.link.start(drain_timeout_s=0.0)

    def say(self, **message):
        self._channel.sendall(encode(message))

    def hear(self):
        messages = []
        while not messages:
            messages = self._decoder.feed(self._channel.recv(1 << 16))
        return messages

    def leave(self):
        self._channel.close()
        self.link._thread.join(TIMEOUT_S)
        assert not self.link._thread.is_alive()
        self._theirs.close()


@pytest.fixture
def exits(monkeypatch):
    """How the process would have ended; the thread that ends it goes no further."""
    codes, ended = [], threading.Event()

    def end(code):
        codes.append(code)
        ended.set()
        raise SystemExit

    monkeypatch.setattr("headrace.workers.link.os._exit", end)
    monkeypatch.setattr("headrace.workers.link.EXIT_TIMEOUT_S", 0.0)

    def wait():
        assert ended.wait(TIMEOUT_S)
        return codes

    return wait


@pytest.fixture
def supervisor(exits):
    """While `exits` keeps this process from being ended."""
    supervisor = Supervisor()
    yield supervisor
    supervisor.leave()


def test_a_worker_that_has_accepted_nothing_ends_at_once_when_all_drain(supervisor, exits):
    supervisor.say(type="drain")
    assert exits() == [0]


def test_one_that_may_have_accepted_requests_drains_though_it_has_not_said_so(supervisor):
    joining = threading.Thread(target=supervisor.link.join, args=({"seen": 0}, None))
    joining.start()
    assert supervisor.hear() == [{"type": "built", "seen": 0}]
    supervisor.say(type="begin")
    joining.join(TIMEOUT_S)
    assert not joining.is_alive()

    supervisor.say(type="drain")

    assert supervisor.link.asked_to_stop.wait(TIMEOUT_S)


def test_one_that_has_to_catch_up_first_has_accepted_nothing(supervisor, exits):
    joining = threading.Thread(
        target=supervisor.link.join, args=({"seen": 0}, lambda _state: None), daemon=True
    )
    joining.start()
    supervisor.hear()
    supervisor.say(type="catch_up", seen=1)
    assert supervisor.hear() == [{"type": "built", "seen": 1}]

    supervisor.say(type="drain")

    assert exits() == [0]


def test_who_waits_for_a_change_hears_that_the_worker_stops_and_so_does_who_asks_then(supervisor):
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(supervisor.link.ask, "load", "m", TIMEOUT_S)
        assert [message["type"] for message in supervisor.hear()] == ["ask"]

        supervisor.link.leave()

        assert isinstance(asked.exception(TIMEOUT_S), Draining)
    with pytest.raises(Draining):
        supervisor.link.ask("load", "m", TIMEOUT_S)
