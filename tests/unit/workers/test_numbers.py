"""The numbers of several workers are one page, and no sum falls when a worker is replaced."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

from headrace.telemetry.instruments import GAUGES, METRICS
from headrace.telemetry.metrics import Metrics
from headrace.workers.numbers import Ledger, page_of

WORKERS = (1, 2, 3)


def counter(value, version="1", name="headrace_requests"):
    family = CounterMetricFamily(name, "help", labels=["model", "version"])
    family.add_metric(["m", version], value)
    return family


def read(families):
    return {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in families
        for sample in family.samples
    }


def of_version(version="1"):
    return ("headrace_requests_total", ("model", "m"), ("version", version))


def test_every_gauge_has_a_rule_and_nothing_else_has():
    gauges = {
        name for name in METRICS if not name.endswith(("_total", "_seconds", "_rows"))
    }  # the rest are counters and histograms

    assert set(GAUGES) == gauges
    assert set(GAUGES.values()) <= {"sum", "min", "max"}


def test_counters_and_histograms_add_up():
    ledger = Ledger(2)
    for worker, counts in ((1, [1, 3]), (2, [10, 10])):
        histogram = HistogramMetricFamily("headrace_queue_seconds", "help")
        histogram.add_metric([], list(zip(["0.1", "+Inf"], counts)), sum_value=0.5)
        ledger.report(worker, page_of([counter(worker), histogram]))

    assert read(ledger.together([1, 2])) == {
        of_version(): 3,
        ("headrace_queue_seconds_bucket", ("le", "0.1")): 11,
        ("headrace_queue_seconds_bucket", ("le", "+Inf")): 13,
        ("headrace_queue_seconds_count",): 13,
        ("headrace_queue_seconds_sum",): 1.0,
    }


@pytest.mark.parametrize(
    ("name", "values", "expected"),
    [
        ("headrace_rpc_open_calls", (3, 4), 7),
        ("headrace_registry_readable", (1, 0), 0),
        ("headrace_registry_readable", (1, 1), 1),
        ("headrace_feature_store_held_off", (0, 1), 1),
    ],
)
def test_gauges_are_the_sum_or_the_worst(name, values, expected):
    ledger = Ledger(2)
    for worker, value in enumerate(values, 1):
        ledger.report(worker, page_of([GaugeMetricFamily(name, "help", value=value)]))

    assert read(ledger.together([1, 2])) == {(name,): expected}


def test_a_worker_that_does_not_answer_is_in_the_counters_only():
    ledger = Ledger(2)
    for worker in (1, 2):
        gauge = GaugeMetricFamily("headrace_rpc_open_calls", "help", value=5)
        ledger.report(worker, page_of([counter(7), gauge]))

    assert read(ledger.together([2])) == {of_version(): 14, ("headrace_rpc_open_calls",): 5}


def test_versions_that_no_worker_serves_are_forgotten():
    ledger = Ledger(2)
    for worker in (1, 2):
        ledger.report(worker, page_of([counter(5, "1")]))
    ledger.report(1, page_of([counter(1, "2")]))
    assert read(ledger.together([1, 2]))[of_version("1")] == 10  # worker 2 has it still

    ledger.report(2, page_of([counter(1, "2")]))

    assert read(ledger.together([1, 2])) == {of_version("2"): 2}


def test_what_a_dead_worker_had_counted_without_a_version_stays():
    ledger = Ledger(1)
    errors = CounterMetricFamily("headrace_rpc_errors", "help", labels=["code"])
    errors.add_metric(["INTERNAL"], 3)
    ledger.report(1, page_of([errors]))
    ledger.ended(1)
    ledger.report(1, page_of([counter(0)]))

    key = ("headrace_rpc_errors_total", ("code", "INTERNAL"))
    assert read(ledger.together([1]))[key] == 3


def test_each_workers_page_has_its_number():
    ledger = Ledger(2)
    ledger.report(1, page_of([counter(1)]))
    ledger.report(2, page_of([counter(2)]))

    assert read(ledger.one_by_one([1, 2])) == {
        (*of_version(), ("worker", "1")): 1,
        (*of_version(), ("worker", "2")): 2,
    }


def test_a_page_survives_the_channel():
    metrics = Metrics()
    metrics.model("m", "1").queue_size = lambda: 3
    page = page_of(metrics.collect())

    ledger = Ledger(1)
    ledger.report(1, json.loads(json.dumps(page)))

    assert read(ledger.together([1])) == read(metrics.collect())


@given(
    st.lists(
        st.tuples(st.sampled_from(WORKERS), st.sampled_from(["count", "report", "die"])),
        max_size=60,
    )
)
def test_sums_never_fall_whoever_dies_when(events):
    ledger, counts, before = Ledger(len(WORKERS)), dict.fromkeys(WORKERS, 0), 0.0
    for worker, event in events:
        if event == "count":
            counts[worker] += 1
        elif event == "report":
            ledger.report(worker, page_of([counter(counts[worker])]))
        else:
            ledger.ended(worker)
            counts[worker] = 0
        now = read(ledger.together(WORKERS)).get(of_version(), 0.0)
        assert now >= before
        before = now
