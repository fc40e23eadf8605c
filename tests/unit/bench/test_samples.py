"""What the generator reports follows from what became of each request."""

import math

import bench_modules
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

bench = bench_modules.load("samples", "record")
samples, UNANSWERED = bench.samples, bench.record.UNANSWERED

NEVER = math.nan
OK, EXCEEDED, REFUSED = 0, 4, 8
WINDOW = samples.Window(10.0, 20.0)


def recorded(*requests):
    """Make a record of (due, sent, done, status[, held])."""
    record = bench.record.Record()
    for due_s, sent_s, done_s, status, *held in requests:
        number = record.add(due_s)
        record.sent_s[number], record.done_s[number] = sent_s, done_s
        record.statuses[number] = status
        record.held[number] = bool(held and held[0])
    return record


def opened(record, *, wrong=(), timeout_s=1.0, ended_s=30.0, cpu_share=0.1):
    return samples.open_loop(
        record, WINDOW, wrong, timeout_s=timeout_s, ended_s=ended_s, cpu_share=cpu_share
    )


def test_goodput_is_what_was_right_and_in_time_from_when_it_was_due():
    figures = opened(
        recorded(
            (11.0, 11.0, 11.5, OK),
            (12.0, 12.6, 13.1, OK),  # half a second from when it was sent, and too late
            (13.0, 13.0, 13.1, OK),  # wrong
            (14.0, 14.0, 14.1, REFUSED),
            (15.0, 15.0, NEVER, UNANSWERED),
        ),
        wrong=[2],
    )

    assert figures["goodput_per_s"] == pytest.approx(0.1)
    assert figures["offered_per_s"] == pytest.approx(0.5)
    assert figures["served_p50_ms"] == pytest.approx(500)
    assert (figures["requests"], figures["errors"], figures["wrong"]) == (4, 2, 1)
    assert figures["unanswered"] == 1


def test_a_refusal_is_timed_from_when_it_was_due_and_from_when_it_was_sent():
    figures = opened(recorded((11.0, 11.2, 11.203, REFUSED)))

    assert figures["refused_p50_ms"] == pytest.approx(203)
    assert figures["refused_from_send_p50_ms"] == pytest.approx(3)
    assert figures["served_p50_ms"] is None


def test_only_what_was_due_within_the_window_counts_whenever_it_was_answered():
    figures = opened(
        recorded(
            (9.9, 9.9, 10.5, OK),
            (10.0, 10.0, 10.1, OK),
            (19.9, 19.9, 20.4, OK),
            (20.0, 20.0, 20.1, OK),
        )
    )

    assert (figures["offered"], figures["requests"]) == (2, 2)
    assert figures["p99_ms"] == pytest.approx(500, rel=0.05)


def test_what_is_never_answered_counts_with_its_age():
    figures = opened(recorded((12.0, 12.0, NEVER, UNANSWERED)), ended_s=25.0)

    assert figures["p50_ms"] == pytest.approx(13_000)
    assert (figures["unanswered"], figures["unsent"]) == (1, 0)


def test_what_could_never_be_sent_is_told_apart_and_was_given_up_at_its_deadline():
    figures = opened(recorded((12.0, NEVER, NEVER, UNANSWERED, True)), timeout_s=1.0, ended_s=25.0)

    assert figures["p50_ms"] == pytest.approx(1_000)
    assert (figures["unanswered"], figures["unsent"], figures["held"]) == (0, 1, 1)


@pytest.mark.parametrize(
    ("requests", "cpu_share", "is_bottleneck"),
    [
        ([(11.0, 11.001, 11.1, OK)], 0.5, False),
        ([(11.0, 11.001, 11.1, OK)], 0.99, True),
        ([(11.0, 11.1, 11.2, OK)], 0.5, True),  # sent late, and nobody kept it
        ([(11.0, 11.1, 11.2, OK, True)], 0.5, False),  # the server did
        ([(11.0, NEVER, NEVER, UNANSWERED)], 0.5, True),
        ([], 0.0, False),
    ],
)
def test_the_generator_says_when_it_is_what_was_measured(requests, cpu_share, is_bottleneck):
    figures = opened(recorded(*requests), cpu_share=cpu_share)

    assert figures["generator_is_bottleneck"] is is_bottleneck


def test_what_is_sent_after_the_window_is_offered_and_not_achieved():
    figures = opened(recorded((19.0, 19.0, 19.1, OK), (19.5, 20.5, 20.6, OK)))

    assert (figures["offered_per_s"], figures["achieved_per_s"]) == (0.2, 0.1)


def test_a_closed_loop_counts_what_was_answered_within_the_window():
    record = recorded(
        (9.0, 9.0, 9.9, OK),
        (9.5, 9.5, 10.5, OK),
        (11.0, 11.0, 11.5, REFUSED),
        (12.0, 12.0, 12.5, OK),
        (19.0, 19.0, 20.5, OK),
        (19.5, 19.5, NEVER, UNANSWERED),
    )

    figures = samples.closed_loop(record, WINDOW, [3], cpu_share=0.5)

    assert (figures["requests"], figures["errors"], figures["wrong"]) == (3, 2, 1)
    assert figures["requests_per_s"] == pytest.approx(0.3)
    assert figures["mean_ms"] == pytest.approx(2_000 / 3)


def test_a_core_that_others_fill_is_told_and_no_bottleneck_of_a_generator_in_time():
    figures = samples.open_loop(
        recorded((11.0, 11.0, 11.1, OK)),
        *(WINDOW, ()),
        timeout_s=1.0,
        ended_s=30.0,
        cpu_share=0.1,
        idle_share=0.0,
    )

    assert figures["generator_idle_share"] == 0.0
    assert figures["generator_is_bottleneck"] is False


@given(statuses=st.lists(st.integers(0, 16), max_size=30))
def test_statuses_add_up_to_the_answers(statuses):
    record = recorded(*[(11.0, 11.0, 11.1, status) for status in statuses])

    found = opened(record)["statuses"]

    assert sum(found.values()) == len(statuses)
    assert found["RESOURCE_EXHAUSTED"] == statuses.count(REFUSED)
    assert found["DEADLINE_EXCEEDED"] == statuses.count(EXCEEDED)


def recovered_s(statuses, rate_per_s=100.0):
    due_s = 20.0 + np.arange(len(statuses)) / rate_per_s
    record = recorded(*[(at, at, at + 0.01, one) for at, one in zip(due_s, statuses)])
    after = samples.Window(20.0, 20.0 + len(statuses) / rate_per_s)
    return samples.recovery_s(record, after, (), 1.0)


def test_recovery_is_when_from_then_on_99_of_100_are_served():
    assert recovered_s([OK] * 500) == 0.0
    assert recovered_s([REFUSED] * 80 + [OK] * 420) == pytest.approx(0.8)
    assert recovered_s([OK, REFUSED] * 40 + [OK] * 420) == pytest.approx(0.72)  # 4 in 428 are bad
    assert recovered_s([OK] * 300 + [REFUSED] + [OK] * 199) == 0.0


def test_who_is_well_for_the_last_few_only_has_not_recovered():
    assert recovered_s([REFUSED] * 500) is None
    assert recovered_s([REFUSED] * 480 + [OK] * 20) is None
    assert recovered_s([]) is None


def test_after_few_requests_half_of_them_tell():
    assert recovered_s([REFUSED] * 20 + [OK] * 30) == pytest.approx(0.2)
    assert recovered_s([REFUSED] * 30 + [OK] * 20) is None


@given(drawn=st.binary(min_size=100, max_size=300), bad=st.integers(0, 20))
def test_after_recovery_99_of_100_are_served(drawn, bad):
    statuses = [REFUSED if byte < bad else OK for byte in drawn]

    recovered = recovered_s(statuses)

    if recovered is not None:
        rest = statuses[round(recovered * 100) :]
        assert rest.count(OK) >= 0.99 * len(rest)
        assert rest[0] == OK
    else:
        assert REFUSED in statuses
