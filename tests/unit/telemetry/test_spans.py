"""Spans are built from timestamps, and their stages are the call."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.proto.trace.v1.trace_pb2 import ScopeSpans, Span, Status

from headrace.telemetry import spans
from headrace.telemetry.spans import FailedCall, TracedBatch, TracedCalls
from headrace.telemetry.trace_context import Trace

RUN = Trace(b"r" * 16, b"", b"run_run")


def trace(number, state="a=1"):
    return Trace(bytes([number]) * 16, b"caller_p", bytes([number]) * 7, state)


def batch_spans(batch, offset_s=0.0):
    return read(spans.batch_spans(batch, RUN, offset_s))


def read(written):
    """Return what a collector reads, and see that there is nothing in it but spans."""
    of_scope = ScopeSpans.FromString(written.data)
    assert len(of_scope.spans) == written.span_count
    assert of_scope == ScopeSpans(spans=of_scope.spans)
    return list(of_scope.spans)


def traced(calls):
    return TracedCalls(*zip(*calls, strict=True))


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
        calls=traced((trace(i + 1), "p.S/M", 1.0 + i / 8, 2, f"id{i}") for i in range(calls)),
    )


def by_name(found, trace_id):
    return {span.name: span for span in found if span.trace_id == trace_id}


@pytest.mark.parametrize("has_features", [True, False])
@given(st.lists(st.floats(0.001, 100), min_size=4, max_size=4))
def test_the_stages_of_a_call_add_up_to_it(has_features, durations_s):
    at = list(itertools.accumulate(durations_s, initial=1.0))[1:]
    one = batch(
        has_features=has_features,
        **dict(zip(("started_s", "joined_s", "inferred_s", "replied_s"), at, strict=True)),
    )
    found = by_name(batch_spans(one, 1_700_000_000.0), b"\1" * 16)
    request = found.pop("headrace.request")
    assert ("features.fetch" in found) is has_features
    stages = sorted(found.values(), key=lambda span: span.start_time_unix_nano)
    for earlier, later in itertools.pairwise(stages):
        assert earlier.end_time_unix_nano == later.start_time_unix_nano
    assert stages[0].start_time_unix_nano == request.start_time_unix_nano
    assert stages[-1].end_time_unix_nano == request.end_time_unix_nano
    assert {span.parent_span_id for span in stages} == {request.span_id}


def test_a_batch_and_its_members_are_linked_both_ways():
    found = batch_spans(batch(calls=3))
    run = by_name(found, RUN.trace_id)["batch.run"]
    members = [span for span in found if span.name == "headrace.request"]
    assert [(at.trace_id, at.span_id) for at in run.links] == [
        (span.trace_id, span.span_id) for span in members
    ]
    for span in members:
        assert [(at.trace_id, at.span_id) for at in span.links] == [(RUN.trace_id, run.span_id)]


def test_a_batch_of_many_links_with_the_first():
    run = by_name(batch_spans(batch(calls=200)), RUN.trace_id)["batch.run"]
    assert len(run.links) == spans.LINKS_MAX


def test_a_call_is_under_its_caller_and_says_what_it_was():
    span = by_name(batch_spans(batch()), b"\1" * 16)["headrace.request"]
    assert (span.parent_span_id, span.trace_state) == (b"caller_p", "a=1")
    assert span.kind == Span.SPAN_KIND_SERVER
    assert attributes_of(span) == {
        "rpc.system.name": "grpc",
        "rpc.method": "p.S/M",
        "rpc.response.status_code": "OK",
        "headrace.model": "homes",
        "headrace.version": "3",
        "headrace.rows": 2,
        "headrace.prediction_id": "id0",
    }


@given(st.text(max_size=600), st.text(min_size=1, max_size=300), st.text(min_size=1, max_size=40))
def test_whatever_callers_and_models_are_called_is_read_back(state, model, prediction_id):
    call = (trace(1, state), "p.S/M", 1.0, 10**9, prediction_id)
    found = batch_spans(batch()._replace(model=model, calls=traced([call])))
    assert {span.trace_state for span in found if span.name != "batch.run"} == {state}
    request = attributes_of(by_name(found, b"\1" * 16)["headrace.request"])
    assert (request["headrace.model"], request["headrace.rows"]) == (model, 10**9)
    assert request["headrace.prediction_id"] == prediction_id


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["p.S/M", "p.S/Other"]),
            st.sampled_from([1, 200, 300]),
            st.sampled_from(["", "id", "longer"]),
            st.sampled_from([b"", b"caller_p"]),
            st.sampled_from(["", "a=1"]),
        ),
        max_size=12,
    )
)
def test_calls_that_are_unlike_are_told_of_each_as_it_was(several):
    calls = [
        (Trace(bytes([i]) * 16, parent, bytes([i]) * 7, state), method, 1.0 + i / 8, rows, name)
        for i, (method, rows, name, parent, state) in enumerate(several, 1)
    ]
    one = batch()._replace(calls=traced(calls) if calls else TracedCalls((), (), (), (), ()))
    spans_of = batch_spans(one)
    assert len(spans_of) == 1 + 5 * len(calls)
    for trace_of, method, arrival_s, rows, name in calls:
        found = by_name(spans_of, trace_of.trace_id)
        assert {span.trace_state for span in found.values()} == {trace_of.state}
        request = found.pop("headrace.request")
        assert (request.span_id, request.parent_span_id) == (trace_of.span_id, trace_of.parent_id)
        told = attributes_of(request)
        assert (told["rpc.method"], told["headrace.rows"]) == (method, rows)
        assert told.get("headrace.prediction_id", "") == name
        assert {span.parent_span_id for span in found.values()} == {trace_of.span_id}
        assert request.start_time_unix_nano == int(arrival_s * 1e9)


def test_a_read_of_features_without_a_model_has_no_model_in_it():
    of = batch()._replace(model="", version="", feature_service="drivers", has_features=True)
    found = by_name(batch_spans(of), b"\1" * 16)
    assert set(found) == {"headrace.request", "batch.wait", "features.fetch", "batch.reply"}
    assert attributes_of(found["headrace.request"])["headrace.feature_service"] == "drivers"


def test_a_call_that_began_its_trace_is_under_nobody():
    call = (Trace(b"t" * 16, b"", b"stem_st"), "p.S/M", 1.0, 1, "id")
    found = batch_spans(batch()._replace(calls=traced([call])))
    span = by_name(found, b"t" * 16)["headrace.request"]
    assert span.parent_span_id == b""


def test_every_span_has_an_id_of_its_own():
    found = batch_spans(batch(calls=5))
    assert len({(span.trace_id, span.span_id) for span in found}) == len(found) == 1 + 5 * 5


def test_the_model_runs_under_the_id_that_another_server_was_told():
    found = by_name(batch_spans(batch()._replace(is_remote=True)), b"\1" * 16)
    assert found["backend.infer"].span_id == trace(1).id_of(spans.INFER)
    assert found["backend.infer"].kind == Span.SPAN_KIND_CLIENT


def failed(of=None):
    call = FailedCall("p.S/M", "NOT_FOUND", "no such model", 1.0, 1.5, "", "", 0, of)
    return read(spans.failed_spans(call, 10.0))


def test_a_failed_call_has_one_span_that_says_why():
    (span,) = failed(trace(1))
    assert span.status.code == Status.STATUS_CODE_ERROR
    assert span.status.message == "no such model"
    assert attributes_of(span)["rpc.response.status_code"] == "NOT_FOUND"
    assert span.end_time_unix_nano - span.start_time_unix_nano == 500_000_000


def test_a_call_that_failed_in_another_server_has_a_span_for_its_part():
    of = trace(1)
    of.called_s = 1.25
    request, infer = failed(of)
    assert (infer.name, infer.span_id) == ("backend.infer", of.id_of(spans.INFER))
    assert infer.parent_span_id == request.span_id
    assert infer.end_time_unix_nano - infer.start_time_unix_nano == 250_000_000


def test_a_failed_call_that_was_not_sampled_has_no_span():
    assert failed() == []


def attributes_of(span):
    return {
        pair.key: getattr(pair.value, pair.value.WhichOneof("value")) for pair in span.attributes
    }
