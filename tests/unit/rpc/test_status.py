"""What a caller learns of an error, and what it never learns."""

import itertools
from urllib.parse import quote

import grpc
import pytest
import structlog
from google.rpc import error_details_pb2, status_pb2

from headrace import errors
from headrace.rpc.status import (
    DETAILS_BYTES_MAX,
    REMEMBERED_CHARS_MAX,
    REMEMBERED_MAX,
    RETRY_SPREAD,
    _remembered,
    status_of,
)
from headrace.telemetry.trace_context import Rule, Sampler

CODE = grpc.StatusCode


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.InvalidRequest, CODE.INVALID_ARGUMENT),
        (errors.InvalidTensor, CODE.INVALID_ARGUMENT),
        (errors.ModelNotFound, CODE.NOT_FOUND),
        (errors.ModelVersionNotFound, CODE.NOT_FOUND),
        (errors.MissingFeatures, CODE.FAILED_PRECONDITION),
        (errors.ModelUnavailable, CODE.UNAVAILABLE),
        (errors.Draining, CODE.UNAVAILABLE),
        (errors.Overloaded, CODE.RESOURCE_EXHAUSTED),
        (errors.DeadlineExceeded, CODE.DEADLINE_EXCEEDED),
        (errors.CallerLeft, CODE.CANCELLED),
        (errors.FeatureStoreUnavailable, CODE.UNAVAILABLE),
        (errors.BackendError, CODE.INTERNAL),
    ],
)
def test_a_serving_error_keeps_its_message_and_has_a_code(error, code):
    status = status_of(error("what was wrong"))

    assert status.code is code
    assert status.details == "what was wrong"


def test_a_machine_can_read_the_reason():
    status = status_of(errors.ModelVersionNotFound("version 7 is not found"))

    rich = status_pb2.Status.FromString(dict(status.trailing)["grpc-status-details-bin"])
    info = error_details_pb2.ErrorInfo()
    assert rich.code == CODE.NOT_FOUND.value[0]
    assert rich.details[0].Unpack(info)
    assert (info.reason, info.domain) == ("MODEL_VERSION_NOT_FOUND", "headrace.v1")


def test_only_overload_asks_clients_to_wait():
    pushback = "grpc-retry-pushback-ms"

    assert int(dict(status_of(errors.Overloaded("full")).trailing)[pushback]) > 0
    assert pushback not in dict(status_of(errors.Draining("stopping")).trailing)


@pytest.mark.parametrize(
    ("retry_after_s", "pushback_ms"), [(0.0001, "1"), (0.25, "250"), (1e9, "60000")]
)
def test_who_has_used_up_his_quota_is_told_when_to_come_again(retry_after_s, pushback_ms):
    status = status_of(errors.QuotaExceeded("too much", retry_after_s))

    assert status.code is CODE.RESOURCE_EXHAUSTED
    assert ("grpc-retry-pushback-ms", pushback_ms) in status.trailing


def test_a_bug_shows_only_an_incident_number_that_the_log_explains():
    with structlog.testing.capture_logs() as log:
        status = status_of(KeyError("/secret/path"))

    assert status.code is CODE.INTERNAL
    assert "secret" not in status.details
    assert log[0]["incident"] in status.details
    assert isinstance(log[0]["exc_info"], KeyError)


@pytest.mark.parametrize("character", ["x", "日", "😀", "%", "\n"])
def test_details_never_outgrow_the_headers_they_travel_in(character):
    status = status_of(errors.InvalidRequest(character * 100_000))

    assert status.details.endswith("…")
    assert len(quote(status.details, safe=" !\"#$&'()*+,/:;<=>?@[\\]^`{|}~")) <= DETAILS_BYTES_MAX
    assert sum(len(value) for _, value in status.trailing) < 4_096


def test_details_that_fit_are_left_alone():
    assert status_of(errors.InvalidRequest("größer als 10 %")).details == "größer als 10 %"


def test_equal_errors_are_built_once():
    once = status_of(errors.NotFound("no such thing"))
    again = status_of(errors.NotFound("no such thing"))

    assert again is once
    assert status_of(errors.NotReady("no such thing")) != once


def overloaded(after_s):
    return errors.Overloaded("full", after_s)


@pytest.mark.parametrize(("after_s", "after_ms"), [(None, 100), (0.025, 25), (6.4, 6_400)])
def test_who_is_refused_at_one_moment_is_not_sent_back_at_one_moment(after_s, after_ms):
    statuses = [status_of(overloaded(after_s)) for _ in range(64)]
    asked_ms = [int(dict(status.trailing)["grpc-retry-pushback-ms"]) for status in statuses]

    assert after_ms / 2 <= min(asked_ms) < 0.6 * after_ms
    assert 1.4 * after_ms < max(asked_ms) <= 1.5 * after_ms
    assert sum(asked_ms) / 64 == pytest.approx(after_ms, rel=0.03)
    assert len({id(status) for status in statuses}) == len(RETRY_SPREAD), "built once"
    assert all(abs(a - b) > after_ms / 8 for a, b in itertools.pairwise(asked_ms))


def test_what_callers_make_up_takes_no_memory_for_good():
    for number in range(2 * REMEMBERED_MAX):
        status_of(errors.ModelNotFound(f"no model '{number}'"))
    long = "x" * (REMEMBERED_CHARS_MAX + 1)

    assert status_of(errors.ModelNotFound(long)) is not status_of(errors.ModelNotFound(long))
    assert _remembered.cache_info().currsize <= REMEMBERED_MAX


def test_a_failure_of_a_sampled_call_names_its_own_trace():
    traces = [Sampler(Rule(1.0)).begin() for _ in range(2)]
    details = [status_of(errors.BackendError("the model failed"), one).details for one in traces]

    assert details == [f"the model failed, trace {one.trace_id.hex()}" for one in traces]
