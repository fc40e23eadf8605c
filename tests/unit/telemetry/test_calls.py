"""One line per failed or sampled call, and no more of them than a disk can take."""

import pytest
import structlog

from headrace.telemetry import calls
from headrace.telemetry.calls import CallRecorder, failed_call
from headrace.telemetry.metrics import Metrics
from headrace.telemetry.spans import TracedBatch, TracedCalls
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


def failed_at(failed_s, code="INVALID_ARGUMENT", message="", trace=None):
    return failed_call("p.S/M", code, message, 0.0, trace=trace)._replace(failed_s=failed_s)


def test_a_flood_of_failures_is_held_back_by_code_and_counted(recorder):
    for number in range(500):
        recorder.failed(failed_at(1.0, message=str(number)))
    recorder.failed(failed_at(1.0, code="INTERNAL"))
    recorder.failed(failed_at(9.0, message="later"))
    lines = lines_of(recorder)
    assert [line["message"] for line in lines] == [*map(str, range(10)), "", "later"]
    assert [line.get("suppressed") for line in lines] == [None] * 11 + [490]


def test_a_refusal_that_has_no_line_and_no_span_is_not_kept(recorder):
    for _ in range(2 * calls.CALLS_MAX):
        recorder.failed(failed_at(1.0))
    assert len(recorder._records) == 10
    assert recorder.dropped == 0


def test_a_sampled_call_without_a_line_has_its_spans_all_the_same():
    sampler = Sampler(Rule(1.0))
    recorder = CallRecorder(Metrics(), sampler)
    for _ in range(11):
        recorder.failed(failed_at(1.0, trace=sampler.begin()))
    assert len(recorder._records) == 11
    assert len(lines_of(recorder)) == 10


def test_what_comes_while_too_much_waits_is_dropped_and_counted(recorder):
    trace = Sampler(Rule(1.0)).begin()
    for _ in range(calls.CALLS_MAX + 7):
        recorder.failed(failed_at(1.0, trace=trace))
    assert recorder.dropped == 7


def batch_of(traces):
    count = len(traces)
    traced = TracedCalls(traces, ["p.S/M"] * count, [0.0] * count, [1] * count, ["id"] * count)
    return TracedBatch("m", "1", count, count, 1.0, 2.0, 3.0, 4.0, False, False, traced)


def full_of_sampled_calls():
    sampler = Sampler(Rule(1.0))
    recorder = CallRecorder(Metrics(), sampler)
    recorder.answered(batch_of([sampler.begin()] * calls.CALLS_MAX))
    return recorder


def test_a_failed_call_has_its_line_however_many_sampled_ones_wait():
    recorder = full_of_sampled_calls()
    recorder.failed(failed_at(1.0, message="why"))

    lines = [line for line in lines_of(recorder) if line["code"] != "OK"]
    assert [line["message"] for line in lines] == ["why"]
    assert recorder.dropped == 0


def test_failures_that_are_dropped_with_their_lines_are_told_of_later(monkeypatch):
    monkeypatch.setattr(calls, "LINES_MAX", 0)
    recorder = full_of_sampled_calls()
    for _ in range(15):
        recorder.failed(failed_at(1.0))
    recorder._tell()  # there is room again

    recorder.failed(failed_at(2.0))

    lines = [line for line in lines_of(recorder) if line["code"] != "OK"]
    assert [line["suppressed"] for line in lines] == [15]


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


def test_a_call_that_cannot_be_told_of_does_not_silence_the_next(recorder):
    recorder.failed(failed_call("p.S/M", "INTERNAL", "first", "no number"))
    recorder.failed(failed_call("p.S/M", "INTERNAL", "second", 0.0))
    messages = [line.get("message") for line in lines_of(recorder)]
    assert messages[-1] == "second"
    assert "first" not in messages


def test_many_calls_of_one_batch_leave_as_many_lines_as_are_allowed():
    recorder = CallRecorder(Metrics(), Sampler(Rule(1.0)))
    traces = [Sampler(Rule(1.0)).begin() for _ in range(100)]
    for _ in range(2):
        recorder.answered(batch_of(traces))
    lines = lines_of(recorder)
    assert {line["code"] for line in lines} == {"OK"}
    assert 10 <= len(lines) <= 12
    assert lines[0]["trace_id"] == traces[0].trace_id.hex()
    assert (lines[0]["duration_s"], lines[0]["infer_s"]) == (4.0, 1.0)
