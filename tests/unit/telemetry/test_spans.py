"""Spans are built from timestamps, and their stages are the call."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.proto.trace.v1.trace_pb2 import Status

from headrace.telemetry.spans import FailedCall, TracedBatch, TracedCall, batch_spans, failed_span
from headrace.telemetry.trace_context import Trace

RUN = b"r" * 16


def ids():
    return (number.to_bytes(8, "big") for number in itertools.count(1))


def trace(number):
    return Trace(bytes([number]) * 16, b"caller_p", bytes([number]) * 8, "a=1")


def batch(calls=1, *, has_features=True, **times):
    stages = {"started_s": 2.0, "joined_s": 3.0, "inferred_s": 5.0, "replied_s": 5.5, **times}
    return TracedBatch(
        "homes",
        "3",
        rows=20,
        requests=7,
        **stages,
        has_features=has_features,
        is_remote=False,
        calls=[TracedCall(trace(i + 1), "p.S/M", 1.0 + i / 8, 2, f"id{i}") for i in range(calls)],
    )


def by_name(spans, trace_id):
    return {span.name: span for span in spans if span.trace_id == trace_id}


@pytest.mark.parametrize("has_features", [True, False])
@given(st.lists(st.floats(0.001, 100), min_size=4, max_size=4))
def test_the_stages_of_a_call_add_up_to_it(has_features, durations_s):
    at = list(itertools.accumulate(durations_s, initial=1.0))[1:]
    one = batch(
        has_features=has_features,
        **dict(zip(("started_s", "joined_s", "inferred_s", "replied_s"), at, strict=True)),
    )
    spans = by_name(batch_spans(one, RUN, ids(), 1_700_000_000.0), b"\1" * 16)
    request = spans.pop("headrace.request")
    assert ("features.fetch" in spans) is has_features
    stages = sorted(spans.values(), key=lambda span: span.start_time_unix_nano)
    for earlier, later in itertools.pairwise(stages):
        assert earlier.end_time_unix_nano == later.start_time_unix_nano
    assert stages[0].start_time_unix_nano == request.start_time_unix_nano
    assert stages[-1].end_time_unix_nano == request.end_time_unix_nano
    assert {span.parent_span_id for span in stages} == {request.span_id}


def test_a_batch_and_its_members_are_linked_both_ways():
    spans = batch_spans(batch(calls=3), RUN, ids(), 0.0)
    run = by_name(spans, RUN)["batch.run"]
    members = [span for span in spans if span.name == "headrace.request"]
    assert [(at.trace_id, at.span_id) for at in run.links] == [
        (span.trace_id, span.span_id) for span in members
    ]
    for span in members:
        assert [(at.trace_id, at.span_id) for at in span.links] == [(RUN, run.span_id)]


def test_a_call_is_under_its_caller_and_says_what_it_was():
    span = by_name(batch_spans(batch(), RUN, ids(), 0.0), b"\1" * 16)["headrace.request"]
    assert (span.parent_span_id, span.trace_state) == (b"caller_p", "a=1")
    attributes = {
        pair.key: pair.value.string_value or pair.value.int_value for pair in span.attributes
    }
    assert attributes == {
        "rpc.system": "grpc",
        "rpc.service": "p.S",
        "rpc.method": "M",
        "rpc.grpc.status_code": 0,
        "headrace.model": "homes",
        "headrace.version": "3",
        "headrace.rows": 2,
        "headrace.prediction_id": "id0",
    }


def test_every_span_has_an_id_of_its_own():
    spans = batch_spans(batch(calls=5), RUN, ids(), 0.0)
    assert len({(span.trace_id, span.span_id) for span in spans}) == len(spans) == 1 + 5 * 5


def test_an_announced_span_keeps_the_id_it_was_announced_with():
    call = TracedCall(trace(1), "p.S/M", 1.0, 1, "id", infer_id=b"announce")
    spans = batch_spans(batch()._replace(calls=[call]), RUN, ids(), 0.0)
    assert by_name(spans, b"\1" * 16)["backend.infer"].span_id == b"announce"


def test_a_failed_call_has_one_span_that_says_why():
    call = FailedCall("p.S/M", "NOT_FOUND", "no such model", 1.0, 1.5, "", "", 0, trace(1))
    span = failed_span(call, 10.0)
    assert span.status.code == Status.STATUS_CODE_ERROR
    assert span.status.message == "no such model"
    assert span.end_time_unix_nano - span.start_time_unix_nano == 500_000_000


def test_a_failed_call_that_was_not_sampled_has_no_span():
    assert failed_span(FailedCall("p.S/M", "INTERNAL", "", 1.0, 1.5, "m", "1", 1, None), 0) is None
