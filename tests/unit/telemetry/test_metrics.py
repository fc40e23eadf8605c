"""The numbers add up, and Prometheus can read them."""

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from headrace.features.memory_store import MemoryStore
from headrace.features.skew_log import SkewLog
from headrace.garbage.pauses import Pauses
from headrace.monitoring.stream import PredictionStream
from headrace.telemetry.calls import CallRecorder
from headrace.telemetry.feature_metrics import (
    AGE_BOUNDS_S,
    FeatureReadMetrics,
    RegistryMetrics,
    StoreMetrics,
    ViewMetrics,
)
from headrace.telemetry.instruments import METRICS
from headrace.telemetry.metrics import FEATURE_STATUSES, SECONDS_BOUNDS, Histogram, Metrics
from headrace.workers.numbers import supervisor_families


def samples(metrics):
    registry = CollectorRegistry()
    registry.register(metrics)
    families = text_string_to_metric_families(generate_latest(registry).decode())
    return {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in families
        for sample in family.samples
    }


def skew_log(folder):
    limits = {"max_queue_bytes": 2**20, "file_rows": 10, "file_s": 60, "folder_bytes": 2**20}
    return SkewLog(folder, share=0.5, **limits)


@given(
    st.lists(st.sampled_from([0.0, 0.0001, 0.00025, 0.0004, 0.003, 0.01, 0.2, 3.0, 99.0])),
    st.sampled_from([0.0, 1000.0]),
)
def test_a_batch_of_durations_is_counted_as_each_would_be(durations_s, end_s):
    together, one_by_one = Histogram(SECONDS_BOUNDS), Histogram(SECONDS_BOUNDS)
    starts_s = sorted(end_s - duration_s for duration_s in durations_s)

    together.observe_since(starts_s, end_s)
    for start_s in starts_s:
        one_by_one.observe(end_s - start_s)

    assert sum(together.counts) == len(durations_s)
    # A duration that lies on a bound to the last bit may fall on either side of it.
    upper = np.cumsum(one_by_one.counts) - np.cumsum(together.counts)
    on_bound = sum(any(abs(d - b) < 1e-9 for b in SECONDS_BOUNDS) for d in durations_s)
    assert np.abs(upper).max() <= on_bound
    assert together.total == pytest.approx(one_by_one.total, abs=1e-6)


@given(st.lists(st.floats(1e-6, 20.0), max_size=60))
def test_random_durations_are_counted_as_each_would_be(durations_s):
    together, one_by_one = Histogram(SECONDS_BOUNDS), Histogram(SECONDS_BOUNDS)
    starts_s = sorted(-duration_s for duration_s in durations_s)

    together.observe_since(starts_s, 0.0)
    for start_s in starts_s:
        one_by_one.observe(-start_s)

    assert together.counts == one_by_one.counts


def answered(metrics, **changes):
    batch = {
        "arrivals_s": [1.0, 1.5, 1.75],
        "rows": 5,
        "started_s": 2.0,
        "features_s": 0.25,
        "infer_s": 0.003,
        "finished_s": 3.0,
        "statuses": np.array([0, 3, 1, 1, 1]),
    }
    metrics.model("m", "1").answered(**{**batch, **changes})


def test_an_answered_batch_shows_in_every_metric_it_touches():
    metrics = Metrics()

    answered(metrics)

    found = samples(metrics)
    assert found["headrace_requests_total", "1", "m"] == 3
    assert found["headrace_batches_total", "1", "m"] == 1
    assert found["headrace_batch_rows_sum", "1", "m"] == 5
    assert found["headrace_request_seconds_sum", "1", "m"] == pytest.approx(2 + 1.5 + 1.25)
    assert found["headrace_queue_seconds_sum", "1", "m"] == pytest.approx(1 + 0.5 + 0.25)
    assert found["headrace_features_seconds_count", "1", "m"] == 1
    assert found["headrace_infer_seconds_sum", "1", "m"] == pytest.approx(0.003)
    statuses = {"PRESENT": 3, "NULL_VALUE": 1, "NOT_FOUND": 1, "OUTSIDE_MAX_AGE": 1}
    for status, count in statuses.items():
        key = ("headrace_feature_values_total", *sorted(["m", "1", status]))
        assert found[key] == count


def test_a_model_without_features_reports_no_feature_time():
    metrics = Metrics()

    answered(metrics, features_s=None, statuses=None)

    assert samples(metrics)["headrace_features_seconds_count", "1", "m"] == 0


def test_refusals_are_counted_by_method_and_code():
    metrics = Metrics()
    metrics.rpc_error("ModelInfer", "NOT_FOUND")
    metrics.rpc_error("ModelInfer", "NOT_FOUND")

    assert samples(metrics)["headrace_rpc_errors_total", "ModelInfer", "NOT_FOUND"] == 2


def test_a_version_keeps_its_numbers_when_asked_for_again():
    metrics = Metrics()

    assert metrics.model("m", "1") is metrics.model("m", "1")
    assert metrics.model("m", "1") is not metrics.model("m", "2")


def test_every_metric_that_is_listed_is_exported_and_none_besides(tmp_path):
    metrics = Metrics()
    answered(metrics)
    metrics.rpc_error("ModelInfer", "NOT_FOUND")
    metrics.stream = PredictionStream("127.0.0.1:1", max_queue_bytes=1)
    metrics.calls = CallRecorder(metrics)
    watch = SimpleNamespace(is_readable=True, reads=0, failures=0)
    store = StoreMetrics(MemoryStore(), lambda: True)
    metrics.more = [FeatureReadMetrics(), ViewMetrics(), RegistryMetrics(watch), store]
    metrics.more.append(Pauses())
    metrics.skew_log = skew_log(tmp_path)
    registry = CollectorRegistry()
    registry.register(metrics)

    names = set()
    for family in registry.collect():
        names.add(family.name + "_total" * (family.type == "counter"))
    for family in supervisor_families(ready=1, restarts={1: 0}):
        names.add(family.name + "_total" * (family.type == "counter"))

    assert names == set(METRICS)


@pytest.mark.parametrize("combinations_max", [1, 1_024])
def test_views_are_counted_by_status_and_age_whatever_they_are_read_with(
    combinations_max, monkeypatch
):
    monkeypatch.setattr("headrace.telemetry.feature_metrics.COMBINATIONS_MAX", combinations_max)
    views = ViewMetrics()
    for names in (("a", "b"), ("b",)):
        views.read(
            names,
            np.arange(len(names)),
            np.array([[1, 3]] * len(names), np.uint8),
            np.array([[0.5, np.nan], [5.0, 50.0]])[: len(names)],
        )

    views.collect()
    values, ages = views.collect()  # asking changes nothing

    counted = {tuple(s.labels.values()): s.value for s in values.samples if s.value}
    assert counted == {
        ("a", "PRESENT"): 1,
        ("a", "NOT_FOUND"): 1,
        ("b", "PRESENT"): 2,
        ("b", "NOT_FOUND"): 2,
    }
    of_b = {
        s.labels["le"]: s.value
        for s in ages.samples
        if s.labels["view"] == "b" and "le" in s.labels
    }
    assert (of_b["1.0"], of_b["10.0"], of_b["60.0"], of_b["+Inf"]) == (1, 2, 3, 3)
    assert {s.labels["view"]: s.value for s in ages.samples if s.name.endswith("_sum")} == {
        "a": 0.5,
        "b": 55.5,
    }


@st.composite
def view_batches(draw):
    """What a batch read of the views "a" and "b": each feature's view, statuses, and ages."""
    view_of_feature = np.array(draw(st.lists(st.integers(0, 1), min_size=1, max_size=4)))
    rows = draw(st.integers(1, 3))
    number = st.integers(1, len(FEATURE_STATUSES) - 1)
    column = st.lists(number, min_size=rows, max_size=rows)
    features = len(view_of_feature)
    statuses = draw(st.none() | st.lists(column, min_size=features, max_size=features))
    age = st.sampled_from([-1.0, 0.5, *AGE_BOUNDS_S, 1e9, np.nan])
    ages = draw(st.lists(st.lists(age, min_size=rows, max_size=rows), min_size=2, max_size=2))
    return view_of_feature, statuses and np.array(statuses, np.uint8), np.array(ages)


@given(st.lists(view_batches(), max_size=8), st.integers(1, 20), st.integers(1, 4))
def test_views_are_counted_whenever_batches_are(batches, held_max, held_batches_max):
    views = ViewMetrics()
    statuses_of, ages_of = Counter(), {"a": [], "b": []}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("headrace.telemetry.feature_metrics.HELD_MAX", held_max)
        patch.setattr("headrace.telemetry.feature_metrics.HELD_BATCHES_MAX", held_batches_max)
        for view_of_feature, statuses, ages_s in batches:
            views.read(("a", "b"), view_of_feature, statuses, ages_s)
            for feature, place in enumerate(view_of_feature.tolist()):
                row = [1] * ages_s.shape[1] if statuses is None else statuses[feature].tolist()
                statuses_of.update(("ab"[place], FEATURE_STATUSES[status]) for status in row)
            for place, view in enumerate("ab"):
                ages_of[view] += [age for age in ages_s[place].tolist() if age == age]  # not NaN

    values, ages = views.collect()

    assert {tuple(s.labels.values()): s.value for s in values.samples if s.value} == statuses_of
    for sample in ages.samples:
        own = ages_of[sample.labels["view"]]
        if "le" in sample.labels:
            assert sample.value == sum(age <= float(sample.labels["le"]) for age in own)
        elif sample.name.endswith("_sum"):
            assert sample.value == pytest.approx(sum(own))


def test_the_skew_log_says_what_became_of_its_rows(tmp_path):
    metrics = Metrics()
    log = metrics.skew_log = skew_log(tmp_path)
    log.rows_written, log.rows_dropped, log.rows_failed = 7, 5, 3

    found = samples(metrics)

    rows = {result: found["headrace_skew_log_rows_total", result] for _, result in ROW_RESULTS}
    assert rows == {result: count for count, result in ROW_RESULTS}
    assert found["headrace_skew_log_queue_bytes",] == 0
    assert found["headrace_skew_log_files_deleted_total",] == 0


ROW_RESULTS = [(7, "written"), (5, "dropped"), (3, "failed")]
