"""No flood of one line fills a disk, and what is held back is told of."""

import io
import json
import re
from pathlib import Path

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st

import headrace
from headrace.telemetry.line_limit import LineLimit
from headrace.telemetry.logs import (
    FLOODING,
    FLOODING_LINES_PER_S,
    FLOODS_MAX,
    INCIDENT_LINES_PER_S,
    hold_back_floods,
)

SOURCES = "\n".join(path.read_text() for path in Path(headrace.__file__).parent.rglob("*.py"))


def test_a_rest_allows_as_many_as_a_second_has_and_no_more():
    limit = LineLimit(3)
    assert [limit.take(1.0) for _ in range(5)] == [0, 0, 0, None, None]
    assert limit.take(1000.0) == 2
    assert [limit.take(1000.0) for _ in range(3)] == [0, 0, None]


def test_a_clock_that_goes_back_allows_nothing():
    limit = LineLimit(1)
    assert limit.take(10.0) == 0
    assert limit.take(5.0) is None
    assert limit.take(10.0) is None
    assert limit.take(11.0) == 2


def test_a_line_that_stands_for_many_counts_them_all():
    limit = LineLimit(1)
    limit.take(0.0)
    assert limit.take(0.0, 40) is None
    assert limit.take(1.0, 40) == 40


def test_a_line_that_is_lost_is_told_of_with_all_that_it_told_of():
    limit = LineLimit(1)
    limit.take(0.0)
    limit.take(0.0)
    limit.lose(limit.take(1.0))
    assert limit.take(2.0) == 2


@given(
    st.lists(st.tuples(st.floats(0, 2), st.integers(1, 9)), max_size=200),
    st.sampled_from([1.0, 2.5, 10.0]),
)
def test_every_line_is_written_or_told_of_and_the_rate_is_kept(lines, lines_per_s):
    limit, now_s = LineLimit(lines_per_s), 0.0
    written, held_back, told, times_s = 0, 0, 0, []
    for pause_s, wanted in lines:
        now_s += pause_s
        suppressed = limit.take(now_s, wanted)
        if suppressed is None:
            held_back += wanted
        else:
            written += 1
            told += suppressed
            times_s.append(now_s)
            assert told == held_back
    assert len(times_s) == written
    for first, at_s in enumerate(times_s):
        within = sum(at_s <= other_s <= at_s + 1 for other_s in times_s[first:])
        assert within <= 2 * lines_per_s + 1


@pytest.fixture
def written():
    lines = io.StringIO()
    log = structlog.wrap_logger(
        structlog.PrintLogger(lines),
        processors=[hold_back_floods(), structlog.processors.JSONRenderer()],
    )

    def write(event, times, **fields):
        for _ in range(times):
            log.error(event, **fields)
        return lines.getvalue().splitlines()

    return write


def test_a_failure_of_every_request_leaves_few_lines(written):
    lines = written("rpc_failed", 5_000)
    assert FLOODING_LINES_PER_S <= len(lines) <= 500  # however slowly this machine writes them
    told = sum(int(number) for number in re.findall(r'"suppressed": (\d+)', "\n".join(lines)))
    assert len(lines) + told <= 5_000


def test_one_flood_silences_no_other_event(written):
    written("rpc_failed", 50)
    assert written("batch_failed", 1)[-1] == '{"event": "batch_failed"}'
    assert written("model_load_failed", 100)[-100:] == ['{"event": "model_load_failed"}'] * 100


def test_one_models_flood_silences_no_other_model(written):
    written("batch_failed", 50, model="one")
    assert (
        written("batch_failed", 1, model="two")[-1] == '{"model": "two", "event": "batch_failed"}'
    )


def test_one_kind_of_exception_silences_no_other(written):
    written("reply_failed", 50, exc_info=ValueError())
    assert "KeyError" in written("reply_failed", 1, exc_info=KeyError())[-1]


def test_models_without_end_have_no_limits_without_end(written):
    for number in range(3 * FLOODS_MAX):
        written("batch_failed", 1, model=f"m{number}")
    assert len(written("batch_failed", 0)) < 1.5 * FLOODS_MAX


def test_an_incident_that_a_caller_was_told_of_has_its_line(written):
    for number in range(100):
        written("rpc_failed", 1, incident=f"incident {number}", exc_info=ValueError("secret"))
    lines = [json.loads(line) for line in written("rpc_failed", 0)]

    assert [line["incident"] for line in lines] == [f"incident {n}" for n in range(100)]
    assert [line.get("suppressed") for line in lines] == [None] * 100
    brief = [line for line in lines if "exc_info" not in line]
    assert len(brief) <= 100 - FLOODING_LINES_PER_S
    assert brief[0] == {
        "incident": brief[0]["incident"],
        "exception_type": "ValueError",
        "event": "rpc_failed",
    }


def test_incidents_are_limited_too_and_those_held_back_are_told_of(written):
    lines = written("rpc_failed", 3_000, incident="incident 7", exc_info=ValueError())
    assert INCIDENT_LINES_PER_S <= len(lines) < 3_000
    told = sum(int(number) for number in re.findall(r'"suppressed": (\d+)', "\n".join(lines)))
    assert len(lines) + told <= 3_000


@pytest.mark.parametrize("event", sorted(FLOODING))
def test_what_is_held_back_is_an_event_of_ours(event):
    assert re.search(rf'_LOG\.\w+\(\s*"{event}"', SOURCES)
