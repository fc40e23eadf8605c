"""Alarms going out: delivered once they can be, in order, to the one address that was named."""

import json
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from headrace.errors import StartupError
from headrace.monitoring import notices
from headrace.monitoring.detectors import Signal
from headrace.monitoring.judgement import Change
from headrace.monitoring.notices import Webhook, cloud_event


class Receiver:
    """A real web server that answers as it is told."""

    def __init__(self, port=0):
        self.answers, self.got = [], []
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                receiver.got.append((self.headers["Content-Type"], json.loads(body)))
                self.send_response(receiver.answers.pop(0) if receiver.answers else 204)
                self.send_header("Location", "/elsewhere")
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,))
        self.thread.start()
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/alarms"

    def close(self):
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


@pytest.fixture
def receiver():
    receiver = Receiver()
    yield receiver
    receiver.close()


@pytest.fixture
def done():
    return []


@pytest.fixture
def webhook(receiver, done, monkeypatch):
    monkeypatch.setattr(notices, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    webhook = Webhook(receiver.url, done.append)
    webhook.start()
    yield webhook
    webhook.stop(5)


def soon(condition):
    deadline_s = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


EVENT = cloud_event("homes", 2, Change(Signal.DRIFT, "age", True, 0.31, 0.1), 7, 1_700_000_000.0)


def test_an_alarm_is_a_cloud_event():
    event = json.loads(EVENT)
    assert {"specversion", "id", "source", "type"} <= event.keys()
    assert event["type"] == "io.headrace.drift.detected"
    assert event["time"] == "2023-11-14T22:13:20+00:00"
    assert event["data"]["column"] == "age"
    assert event["data"]["statistic"] == 0.31


@pytest.mark.parametrize("signal", list(Signal))
def test_every_signal_has_a_type_and_ends_in_a_recovery(signal):
    opened = json.loads(cloud_event("m", 1, Change(signal, "x", True, 1.0, 1.0), 1, 0.0))
    resolved = json.loads(cloud_event("m", 1, Change(signal, "x", False, 1.0, 1.0), 1, 0.0))
    assert opened["type"] != resolved["type"] == "io.headrace.recovered"
    assert opened["id"] != resolved["id"]


def test_notices_are_delivered_in_order(webhook, receiver, done):
    for notice in (1, 2, 3):
        webhook.put(notice, json.dumps({"n": notice}))
    soon(lambda: len(done) == 3)
    assert [body["n"] for _, body in receiver.got] == [1, 2, 3]
    assert receiver.got[0][0] == "application/cloudevents+json; charset=utf-8"


def test_a_failure_is_tried_again(webhook, receiver, done):
    receiver.answers = [500, 503]
    webhook.put(1, EVENT)
    soon(lambda: done == [1])
    assert len(receiver.got) == 3
    assert (webhook.delivered, webhook.failed) == (1, 0)


@pytest.mark.parametrize(("status", "patience"), [(500, "PATIENCE_S"), (404, "REFUSED_PATIENCE_S")])
def test_a_receiver_that_never_takes_it_is_given_up_when_patience_ends(
    webhook, receiver, done, monkeypatch, status, patience
):
    monkeypatch.setattr(notices, patience, 0.2)
    receiver.answers = [status] * 100
    webhook.put(1, EVENT)
    webhook.put(2, EVENT)
    soon(lambda: done == [1, 2])
    assert 2 <= len(receiver.got) < 100
    assert (webhook.delivered, webhook.failed) == (0, 2)


def test_a_notice_waits_for_hours_until_its_receiver_is_back(done):
    """The clock is made to run ten minutes a second; no pause may be longer than five minutes."""
    began_s, pauses_s = time.monotonic(), []

    class HurriedEvent(threading.Event):
        def wait(self, timeout=None):
            pauses_s.append(timeout)
            return super().wait(timeout / 600)

    receiver = Receiver()
    receiver.close()
    webhook = Webhook(receiver.url, done.append)
    webhook._stopping = HurriedEvent()
    webhook.start()
    webhook.put(1, EVENT)
    soon(lambda: sum(pauses_s) > 1_200)
    assert done == []
    back = Receiver(receiver.server.server_address[1])
    try:
        soon(lambda: done == [1])
    finally:
        webhook.stop(5)
        back.close()
    assert time.monotonic() - began_s < 10
    assert max(pauses_s) <= 300
    assert [body["id"] for _, body in back.got] == ["homes/2/7/opened"]


@pytest.mark.parametrize(
    "garbage",
    [b"220 mail.example.com ESMTP\r\n", b"HTTP/1.1 200\r\n" + b"x" * 70_000, b"\x15\x03\x01", b""],
)
def test_an_answer_that_is_not_http_is_a_failure_and_no_more(done, monkeypatch, garbage):
    monkeypatch.setattr(notices, "FIRST_PAUSE_S", 0.01)
    answers = [garbage, garbage, b"HTTP/1.1 204 No Content\r\n\r\n"]
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve():
            for answer in answers:
                connection, _ = listening.accept()
                with connection:
                    connection.recv(65_536)
                    connection.sendall(answer)

        threading.Thread(target=serve, daemon=True).start()
        webhook = Webhook(f"http://127.0.0.1:{listening.getsockname()[1]}/", done.append)
        webhook.start()
        webhook.put(1, EVENT)
        soon(lambda: done == [1])
        assert webhook.is_alive
        assert (webhook.delivered, webhook.failed) == (1, 0)
        webhook.stop(5)


def test_a_fault_of_our_own_ends_no_thread(receiver, done, monkeypatch):
    webhook = Webhook(receiver.url, done.append)
    monkeypatch.setattr(webhook, "_post", lambda body: {}[body])
    webhook.start()
    webhook.put(1, EVENT)
    soon(lambda: webhook._queue.empty())
    monkeypatch.undo()
    webhook.put(2, EVENT)
    soon(lambda: done == [2])
    webhook.stop(5)


def test_a_statistic_without_a_number_is_still_json():
    change = Change(Signal.ERROR, "", True, float("inf"), 1.5)
    assert json.loads(cloud_event("m", 1, change, 1, 0.0))["data"]["statistic"] is None


def test_a_redirection_is_not_followed(webhook, receiver, done):
    receiver.answers = [302]
    webhook.put(1, EVENT)
    soon(lambda: done == [1])
    assert len(receiver.got) == 2  # refused, then taken at the same address


def test_a_stop_leaves_what_was_not_delivered_for_the_next_start(receiver, done):
    receiver.answers = [500] * 100
    webhook = Webhook(receiver.url, done.append)
    webhook.start()
    webhook.put(1, EVENT)
    soon(lambda: receiver.got)
    webhook.stop(5)
    assert done == []


@pytest.mark.parametrize(
    "url",
    [
        *("ftp://host/", "file:///etc/passwd", "host:80", "http://", "", "http://host:abc/"),
        *(
            "http://host:99999/",
            "http://[::1/",
            "http://host/a b",
            "http://host/\x00",
            "http://höst/",
        ),
        *("http://user:secret@host/", "http://host/\n"),
    ],
)
def test_only_web_addresses_are_taken(url):
    with pytest.raises(StartupError, match="--webhook-url"):
        Webhook(url, lambda _: None)
