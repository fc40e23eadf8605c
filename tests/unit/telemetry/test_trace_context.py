"""Which calls are traced: W3C Trace Context read with suspicion, and a decision made cheaply."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.errors import StartupError
from headrace.telemetry.trace_context import (
    Parent,
    Rule,
    Sampler,
    format_traceparent,
    parse_sampler,
    parse_traceparent,
)

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
SAMPLED, UNSAMPLED = f"00-{TRACE}-{SPAN}-01", f"00-{TRACE}-{SPAN}-00"

IDS = {n: st.binary(min_size=n, max_size=n).filter(any) for n in (8, 16)}


@given(IDS[16], IDS[8])
def test_what_is_written_is_read(trace_id, span_id):
    text = format_traceparent(trace_id, span_id)
    assert parse_traceparent(text) == Parent(trace_id, span_id, is_sampled=True)


@pytest.mark.parametrize(
    ("text", "is_sampled"),
    [
        (SAMPLED, True),
        (UNSAMPLED, False),
        (f"00-{TRACE}-{SPAN}-ff", True),
        (f"00-{TRACE}-{SPAN}-02", False),
        (f"01-{TRACE}-{SPAN}-01", True),
        (f"cc-{TRACE}-{SPAN}-01-what-comes-later", True),
    ],
)
def test_flags_and_later_versions_are_understood(text, is_sampled):
    assert parse_traceparent(text).is_sampled is is_sampled


@pytest.mark.parametrize(
    "text",
    [
        "",
        f"ff-{TRACE}-{SPAN}-01",
        f"00-{TRACE}-{SPAN}-01-more",
        f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE.upper()}-{SPAN}-01",
        f"00-{TRACE[:-1]}-{SPAN}-01",
        f"00-{TRACE}-{SPAN}-1",
        f"00-{TRACE}-{SPAN}",
        f" {SAMPLED}",
        f"{SAMPLED}\n",
        f"cc-{TRACE}-{SPAN}-01.more",
    ],
)
def test_what_is_no_traceparent_is_ignored(text):
    assert parse_traceparent(text) is None


@given(st.text())
def test_no_text_breaks_the_parser(text):
    parse_traceparent(text)


def ratio(rule, calls=20_000, metadata=()):
    sampler = Sampler(rule, random.Random(5).random)
    return sum(sampler.sample(metadata) is not None for _ in range(calls)) / calls


@pytest.mark.parametrize("wanted", [0.01, 0.2, 0.9])
def test_root_calls_are_sampled_at_their_ratio(wanted):
    assert ratio(Rule(wanted)) == pytest.approx(wanted, rel=0.15)


def test_all_or_none_are_exactly_that():
    assert ratio(Rule(1.0)) == 1
    assert ratio(Rule(0.0)) == 0


def test_a_sampled_caller_is_always_followed_and_an_unsampled_one_never():
    assert ratio(Rule(0.0), metadata=[("traceparent", SAMPLED)]) == 1
    assert ratio(Rule(1.0), metadata=[("traceparent", UNSAMPLED)]) == 0


def test_a_rule_that_does_not_follow_keeps_the_trace_all_the_same():
    sampler = Sampler(Rule(1.0, follows_parent=False))
    assert sampler.sample([("traceparent", UNSAMPLED)]).trace_id.hex() == TRACE


def test_a_call_is_a_child_of_its_callers_span():
    trace = Sampler(Rule(0.0)).sample(
        [
            ("user-agent", "x"),
            ("traceparent", SAMPLED),
            ("tracestate", "a=1"),
            ("tracestate", "b=2"),
        ]
    )
    assert (trace.trace_id.hex(), trace.parent_id.hex(), trace.state) == (TRACE, SPAN, "a=1,b=2")
    assert any(trace.span_id)
    assert trace.span_id != trace.parent_id


def test_calls_of_one_stream_are_siblings_under_their_callers_span():
    sampler = Sampler(Rule(0.0))
    stream = sampler.sample([("traceparent", SAMPLED), ("tracestate", "a=1")])

    calls = [sampler.another(stream) for _ in range(3)]

    assert {(c.trace_id.hex(), c.parent_id.hex(), c.state) for c in calls} == {(TRACE, SPAN, "a=1")}
    assert len({call.span_id for call in (stream, *calls)}) == 4


def test_calls_of_a_stream_without_a_caller_have_a_trace_each():
    sampler = Sampler(Rule(1.0))
    stream = sampler.sample([])

    calls = [sampler.another(stream) for _ in range(3)]

    assert len({call.trace_id for call in (stream, *calls)}) == 4
    assert {call.parent_id for call in calls} == {b""}


def test_a_broken_context_begins_a_trace_of_its_own():
    trace = Sampler(Rule(1.0)).sample([("traceparent", "00-nonsense"), ("tracestate", "a=1")])
    assert (trace.parent_id, trace.state) == (b"", "")
    assert len(trace.trace_id) == 16


def test_a_tracestate_that_is_too_long_is_left_out():
    metadata = [("traceparent", SAMPLED), ("tracestate", "a=" + "x" * 600)]
    assert Sampler(Rule(0.0)).sample(metadata).state == ""


def test_an_id_is_never_all_zero():
    sampler = Sampler(Rule(1.0), random_bits=lambda _: 0)
    for trace in (sampler.begin(), sampler.sample([("traceparent", SAMPLED)])):
        assert any(trace.trace_id)
        assert any(trace.span_id)


def test_ids_have_the_size_they_must_have():
    for trace in (
        Sampler(Rule(1.0)).begin(),
        Sampler(Rule(1.0)).sample([("traceparent", SAMPLED)]),
    ):
        assert len(trace.trace_id) == 16
        assert len({trace.span_id, trace.id_of(2), trace.id_of(255)}) == 3
        assert {len(trace.span_id), len(trace.id_of(2))} == {8}


@pytest.mark.parametrize(
    ("name", "argument", "rule"),
    [
        (None, None, Rule(0.01)),
        ("", "", Rule(0.01)),
        ("parentbased_traceidratio", "0.5", Rule(0.5)),
        ("traceidratio", "0.5", Rule(0.5, follows_parent=False)),
        ("always_on", None, Rule(1.0, follows_parent=False)),
        ("parentbased_always_on", None, Rule(1.0)),
        ("parentbased_always_off", None, Rule(0.0)),
        ("always_off", None, None),
    ],
)
def test_the_standard_names_of_samplers_are_known(name, argument, rule):
    assert parse_sampler(name, argument) == rule


@pytest.mark.parametrize(
    ("name", "argument"),
    [("sometimes", None), *((None, argument) for argument in ("2", "-1", "nan", "half"))],
)
def test_a_sampler_that_makes_no_sense_is_refused(name, argument):
    with pytest.raises(StartupError, match="OTEL_TRACES_SAMPLER"):
        parse_sampler(name, argument)
