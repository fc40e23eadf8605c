"""One line per failed or sampled call, and no more of them than a disk can take."""

import pytest
import structlog

from headrace.telemetry import calls
from headrace.telemetry.calls import CallRecorder, failed_call
from headrace.telemetry.metrics import Metrics
from headrace.telemetry.trace_context import Rule, Sampler


def lines_of(recorder):
    with structlog.testing.capture_logs() as lines:
        recorder.start()
        recorder.stop(10)
    return lines


@pytest.fixture
def recorder():
    return CallRecorder(Metrics())


def test_a_failed_call_is_told_of_with_what_is_known(recorder):
    recorder.failed(failed_call("p.S/M", "INTERNAL", "text", 0.0, model="m", version="2", rows=3))
    (line,) = lines_of(recorder)
    expected = {"code": "INTERNAL", "message": "text", "model": "m", "version": "2", "rows": 3}
    assert expected.items() <= line.items()
    assert line["duration_s"] > 0


def test_a_call_that_reached_no_model_names_none(recorder):
    recorder.failed(failed_call("p.S/M", "NOT_FOUND", "text", 0.0))
    (line,) = lines_of(recorder)
    assert "model" not in line


def test_a_flood_of_failures_is_held_back_by_code_and_counted(recorder, monkeypatch):
    for _ in range(500):
        recorder.failed(failed_call("p.S/M", "INVALID_ARGUMENT", "", 0.0))
    recorder.failed(failed_call("p.S/M", "INTERNAL", "", 0.0))
    recorder.start()
    with structlog.testing.capture_logs() as lines:
        recorder._tell()
        codes = [line["code"] for line in lines]
        monkeypatch.setattr(calls.time, "monotonic", lambda: 1e9)
        recorder.failed(failed_call("p.S/M", "INVALID_ARGUMENT", "", 0.0))
        recorder._tell()
    recorder.stop(10)
    assert 10 <= codes.count("INVALID_ARGUMENT") <= 12
    assert codes.count("INTERNAL") == 1
    assert lines[-1]["suppressed"] == 500 - codes.count("INVALID_ARGUMENT")


def test_what_comes_while_too_much_waits_is_dropped_and_counted(recorder):
    for _ in range(calls.CALLS_MAX + 7):
        recorder.failed(failed_call("p.S/M", "INTERNAL", "", 0.0))
    assert recorder.dropped == 7


def test_every_failure_counts_in_the_metrics_whatever_is_told():
    metrics = Metrics()
    recorder = CallRecorder(metrics)
    for _ in range(calls.CALLS_MAX + 7):
        recorder.failed(failed_call("p.S/M", "INTERNAL", "", 0.0))
    errors = next(f for f in metrics.collect() if f.name == "headrace_rpc_errors")
    assert errors.samples[0].value == calls.CALLS_MAX + 7


def test_without_a_sampler_no_call_is_looked_at(recorder):
    assert recorder.sample is None
    assert CallRecorder(Metrics(), Sampler(Rule(1.0))).sample is not None
