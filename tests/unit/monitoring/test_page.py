"""The page: one file, nothing loaded, nothing that came from outside taken for markup."""

import json
from html.parser import HTMLParser

import numpy as np
import pytest

from headrace.monitoring.monitor import Monitor
from headrace.monitoring.page import page
from headrace.monitoring.profile import build_profile
from headrace.monitoring.records import Column, PredictionRows
from headrace.monitoring.report import report
from headrace.monitoring.state import MonitorState
from headrace.monitoring.watched import Rules

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


@pytest.fixture
def document():
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


def test_a_version_that_gets_no_more_rows_is_quiet_and_alarms_nobody():
    monitor = Monitor(Rules(window_s=1), MonitorState(None), lambda *_: None)
    monitor.fold(rows(np.random.default_rng(1)), 0.0)
    (version,) = report(monitor, 3_700.0)["versions"]
    assert (version["verdict"], version["alarms"]) == ("quiet", [])


def test_a_version_without_a_profile_says_so():
    monitor = Monitor(Rules(window_s=1), MonitorState(None), lambda *_: None)
    monitor.fold(rows(np.random.default_rng(1)), 0.0)
    monitor.tick(5.0)
    assert "profile.json" in page(report(monitor, 9.0))
