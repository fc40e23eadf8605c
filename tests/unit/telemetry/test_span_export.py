"""Spans wait for their collector on a thread of their own, and not without end."""

import threading
import time

import pytest
from opentelemetry.sdk.trace.export import SpanExportResult

from headrace.telemetry import tracing
from headrace.telemetry.spans import Spans
from headrace.telemetry.tracing import SpanExporter

TAKEN, REFUSED = SpanExportResult.SUCCESS, SpanExportResult.FAILURE


class Connection:
    """In place of OpenTelemetry's exporter: takes messages, and hangs while it is told to."""

    def __init__(self):
        self.messages = []
        self.result = TAKEN
        self.asked = threading.Semaphore(0)
        self.gate = threading.Event()
        self.gate.set()
        self.is_closed = False

    def export(self, message):
        self.asked.release()
        assert self.gate.wait(30)
        self.messages.append(message)
        if isinstance(self.result, Exception):
            raise self.result
        return self.result

    def shutdown(self):
        self.is_closed = True


@pytest.fixture
def exporter(monkeypatch):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    exporter = SpanExporter()
    exporter._exporter.shutdown()
    exporter._exporter = Connection()
    exporter.start()
    yield exporter
    exporter._exporter.gate.set()
    exporter.stop(10)
    assert exporter._exporter.is_closed


def until(condition):
    deadline_s = time.monotonic() + 15
    while not condition():
        assert time.monotonic() < deadline_s, "it did not happen"
        time.sleep(0.005)


def hang(exporter):
    exporter._exporter.gate.clear()
    exporter.export([Spans(b"first", 1)])
    assert exporter._exporter.asked.acquire(timeout=15)


def test_nobody_waits_for_a_collector_that_hangs_and_all_that_has_room_is_sent(exporter):
    hang(exporter)
    for _ in range(10):
        exporter.export([Spans(b"later", 2), Spans(b"and more", 3)])

    assert (exporter.exported, exporter.dropped) == (0, 0)
    exporter._exporter.gate.set()
    until(lambda: exporter.exported == 51)
    assert all(b"laterand more" in message for message in exporter._exporter.messages[1:])


def test_what_comes_while_too_much_waits_is_dropped_and_counted(exporter, monkeypatch):
    monkeypatch.setattr(tracing, "WAITING_BYTES_MAX", 100)
    hang(exporter)
    for _ in range(5):
        exporter.export([Spans(bytes(30), 7)])  # the first has 5 bytes

    assert exporter.dropped == 2 * 7
    exporter._exporter.gate.set()
    until(lambda: exporter.exported == 1 + 3 * 7)
    exporter.export([Spans(bytes(95), 7)])  # there is room again
    until(lambda: exporter.exported == 1 + 4 * 7)


@pytest.mark.parametrize("failure", [REFUSED, RuntimeError("a bug")], ids=["refused", "raised"])
def test_after_a_failure_spans_are_dropped_for_a_while_and_then_sent_again(
    exporter, monkeypatch, failure
):
    exporter._exporter.result = failure
    for _ in range(3):
        exporter.export([Spans(b"lost", 2)])
    until(lambda: exporter.dropped == 6)
    assert len(exporter._exporter.messages) == 1

    exporter._exporter.result = TAKEN
    exporter._resume_s = 0.0  # the while is over
    exporter.export([Spans(b"sent", 5)])

    until(lambda: exporter.exported == 5)
    assert exporter.dropped == 6


def test_a_stop_sends_what_waits(exporter):
    hang(exporter)
    exporter.export([Spans(b"last", 4)])
    exporter._exporter.gate.set()

    exporter.stop(15)

    assert (exporter.exported, exporter.dropped) == (5, 0)


def test_a_stop_does_not_wait_longer_than_it_is_told(exporter):
    hang(exporter)
    started_s = time.monotonic()

    exporter.stop(0.05)

    assert time.monotonic() - started_s < 10  # of the thirty that the collector hangs
