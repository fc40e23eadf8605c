"""The page: one file, nothing loaded, nothing that came from outside taken for markup."""

import json
from html.parser import HTMLParser

import numpy as np
import pytest
from prometheus_client import CollectorRegistry, generate_latest

from headrace.monitoring.judgement import Rules
from headrace.monitoring.metrics import MonitorMetrics
from headrace.monitoring.monitor import Monitor
from headrace.monitoring.page import page
from headrace.monitoring.profile import build_profile
from headrace.monitoring.records import Column, PredictionRows
from headrace.monitoring.report import report
from headrace.monitoring.state import MonitorState

EVIL = "<script>alert(1)</script>\"'&"
VOID = {"meta", "rect", "line", "circle", "polyline", "br"}


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self.attributes = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.text.append(data)


def rows(rng, shift=0.0, number=0):
    n = 1_000
    values = rng.normal(shift, 1, n)
    return PredictionRows(
        *(EVIL, 1, 0.0, "p", np.arange(n) + number, np.ones(n, np.int64), n),
        {EVIL: Column(values, None), "steady": Column(rng.normal(0, 1, n), None)},
        {"y": Column(values + 10, None)},
    )


@pytest.fixture(scope="module")
def monitor():
    rng = np.random.default_rng(0)
    training = rng.normal(0, 1, 10_000)
    profile = build_profile(
        {EVIL: training, "steady": training},
        {"y": training + 10},
        outcomes=np.full(10, 10.0),
        outcome_predictions=np.full(10, 10.5),
    )
    monitor = Monitor(Rules(window_s=1), MonitorState(None), lambda *_: profile)
    for window in range(4):
        batch = rows(rng, shift=1.0 if window > 1 else 0.0, number=10_000 * window)
        monitor.fold(batch, 10.0 * window)
        monitor.join([("p", 10_000 * window + i, 0, 12.0) for i in range(600)])
        monitor.tick(10.0 * window + 5)
    return monitor


@pytest.fixture
def document(monitor):
    return report(monitor, 50.0)


def test_the_report_is_plain_json(document):
    json.dumps(document, allow_nan=False)


def test_the_report_says_what_is_alarmed_and_how_far_off_the_model_is(document):
    (version,) = document["versions"]
    assert version["verdict"] == "alarm"
    assert {(a["signal"], a["column"]) for a in version["alarms"]} >= {
        ("drift", EVIL),
        ("prediction_drift", "y"),
        ("error", "y"),
    }
    known = version["performance"]["windows"]
    assert [window["labelled"] for window in known] == [600] * 4
    assert known[0]["error"] == pytest.approx(1 / 6, rel=0.1)
    assert version["performance"]["reference_error"] == pytest.approx(0.05)


def test_what_comes_from_outside_is_never_markup(document):
    parsed = Page(page(document))
    assert "script" not in parsed.tags
    assert any(EVIL in text for text in parsed.text)


def test_nothing_is_loaded_from_anywhere(document):
    names = {name for name, _ in Page(page(document)).attributes}
    assert not names & {"src", "href", "onload", "onclick"}


def test_the_page_shows_a_plot_for_each_column_and_the_error(document):
    parsed = Page(page(document))
    assert parsed.tags.count("rect") == 3 * 12 * 2
    assert "Realised error" in parsed.text
    assert len(page(document)) < 300_000


def test_alarmed_columns_come_first(document):
    text = page(document)
    features = text[text.index("<h3>Features") :]
    assert features.index("&lt;script&gt;") < features.index("steady")


def test_a_monitor_that_has_seen_nothing_says_how_to_begin():
    monitor = Monitor(Rules(), MonitorState(None), lambda *_: None)
    assert "--monitor-address" in page(report(monitor, 0.0))


def test_a_version_that_gets_no_more_rows_is_quiet_and_its_alarms_are_shown(monitor, document):
    later = report(monitor, 3_700.0)
    (version,) = later["versions"]
    assert version["verdict"] == "quiet"
    assert version["alarms"] == document["versions"][0]["alarms"] != []
    assert f"{len(version['alarms'])} open" in Page(page(later)).text


def profiled(profile, columns, *, value=10.0, outcomes=(), windows=1):
    """Return the report of windows of 1,000 rows with these columns."""
    monitor = Monitor(Rules(window_s=1), MonitorState(None), lambda *_: profile)
    for window in range(windows):
        batch = PredictionRows(
            *("m", 1, 0.0, "p", np.arange(1_000) + 10_000 * window, np.ones(1_000, np.int64)),
            rows=1_000,
            features={name: Column(values, None) for name, values in columns.items()},
            predictions={"y": Column(np.full(1_000, value), None)},
        )
        monitor.fold(batch, 10.0 * window)
        monitor.join([("p", 10_000 * window + i, 0, of) for i, of in enumerate(outcomes)])
        monitor.tick(10.0 * window + 5)
    return report(monitor, 10.0 * windows)


VALUES = np.random.default_rng(2).normal(0, 1, 1_000)
SPARSE = np.where(np.arange(1_000) % 5 < 2, VALUES, np.nan)


def test_the_page_names_what_only_one_side_has():
    shown = profiled(build_profile({"other": VALUES}, {"y": VALUES}), {"x": VALUES})
    assert "never came" in page(shown)
    assert {"other", "x"} <= set(Page(page(shown)).text)


def test_the_page_says_where_there_are_too_few_values_to_judge_drift():
    shown = profiled(build_profile({"x": SPARSE}, {"y": VALUES}), {"x": SPARSE})
    assert "400 of 500 values" in page(shown)
    (column,) = shown["versions"][0]["features"]
    assert column["drift_values"] == {"needed": 500, "waiting": 400, "windows": 1}
    assert column["drift_history"] == [None]


def test_the_page_says_how_many_outcomes_have_no_relative_error():
    shown = profiled(
        build_profile({}, {"y": [10.0]}, outcomes=[10.0], outcome_predictions=[10.0]),
        {"x": VALUES},
        outcomes=[0.0] * 40 + [10.0] * 60,
    )
    assert "40 outcomes of 0" in page(shown)
    assert "it is not judged" in page(shown), "the reference error is 0"


def test_no_outcome_makes_the_report_anything_but_plain_json():
    shown = profiled(build_profile({}, {"y": [10.0]}), {"x": VALUES}, outcomes=[5e-324, -5e-324])
    json.dumps(shown, allow_nan=False)
    page(shown)


def test_metrics_need_no_history_and_say_the_same(monitor):
    def metrics(**more):
        registry = CollectorRegistry()
        shown = report(monitor, 50.0, **more)
        registry.register(MonitorMetrics(lambda: shown, lambda: (0, 0), lambda: 0))
        return generate_latest(registry)

    assert metrics(has_history=False) == metrics()
    assert "windows" not in report(monitor, 50.0, has_history=False)["versions"][0]


def test_a_feature_and_an_output_of_one_name_are_two_series():
    shown = profiled(build_profile({"y": VALUES}, {"y": VALUES}), {"y": VALUES}, windows=2)
    registry = CollectorRegistry()
    registry.register(MonitorMetrics(lambda: shown, lambda: (0, 0), lambda: 0))
    lines = generate_latest(registry).decode().splitlines()
    series = [line.rpartition(" ")[0] for line in lines if not line.startswith("#")]
    assert len(series) == len(set(series))
    assert sum(line.startswith("headrace_monitor_missing_ratio{") for line in series) == 2


def test_a_version_without_a_profile_says_so():
    monitor = Monitor(Rules(window_s=1), MonitorState(None), lambda *_: None)
    monitor.fold(rows(np.random.default_rng(1)), 0.0)
    monitor.tick(5.0)
    assert "profile.json" in page(report(monitor, 9.0))
