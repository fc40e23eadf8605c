"""Whether calls are traced is what OpenTelemetry's environment says, and its tools would do."""

import re

import pytest

from headrace.telemetry.trace_context import Rule
from headrace.telemetry.tracing import _is_loopback, tracing_rule, worker_attributes

ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"


@pytest.fixture
def environment(monkeypatch):
    """Return a function that sets OpenTelemetry's environment, all of it."""

    def only(**variables):
        for name in (
            ENDPOINT,
            "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT",
            "OTEL_SDK_DISABLED",
            "OTEL_TRACES_EXPORTER",
            "OTEL_TRACES_SAMPLER",
            "OTEL_TRACES_SAMPLER_ARG",
        ):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return only


@pytest.mark.parametrize("name", [ENDPOINT, "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"])
def test_an_endpoint_switches_tracing_on(environment, name):
    environment(**{name: "http://127.0.0.1:4317"})
    assert tracing_rule() == Rule(0.01)


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {ENDPOINT: ""},
        {ENDPOINT: "http://c:4317", "OTEL_SDK_DISABLED": "true"},
        {ENDPOINT: "http://c:4317", "OTEL_TRACES_EXPORTER": "none"},
        {ENDPOINT: "http://c:4317", "OTEL_TRACES_SAMPLER": "always_off"},
    ],
    ids=["no endpoint", "an empty one", "disabled", "no exporter", "never sampled"],
)
def test_otherwise_no_call_is_looked_at(environment, variables):
    environment(**variables)
    assert tracing_rule() is None


@pytest.mark.parametrize(
    ("endpoint", "expected"),
    [
        ("http://127.0.0.1:4317", True),
        ("http://localhost:4317", True),
        ("localhost:4317", True),
        ("http://[::1]:4317", True),
        ("https://collector.example:4317", False),
        ("10.0.0.1:4317", False),
    ],
)
def test_a_proxy_is_passed_by_only_on_the_way_to_this_machine(endpoint, expected):
    assert _is_loopback(endpoint) is expected


@pytest.mark.parametrize(
    ("named", "instance"),
    [({"service.instance.id": "pod-7"}, "pod-7-2"), ({}, r"[0-9a-f-]{36}-2")],
)
def test_several_processes_are_instances_of_their_own(named, instance):
    attributes = worker_attributes(named, 2)

    assert attributes["headrace.worker"] == 2
    assert re.fullmatch(instance, attributes["service.instance.id"])
