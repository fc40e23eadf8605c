"""Triton's log switches on one threshold: what is asked for comes out, or is refused."""

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tritonclient.grpc import service_pb2

from headrace.errors import Draining, InvalidRequest
from headrace.rpc.log_settings import LogSettings, level_for, switches
from headrace.rpc.status import status_of
from headrace.telemetry.logs import LOG_LEVELS

LEVELS = st.sampled_from(list(LOG_LEVELS))
WANTED = st.fixed_dictionaries(
    {},
    optional={
        "log_info": st.booleans(),
        "log_warning": st.booleans(),
        "log_error": st.booleans(),
        "log_verbose_level": st.integers(0, 3),
    },
)


@pytest.mark.parametrize(
    ("before", "wanted", "after"),
    [
        pytest.param("info", {"log_verbose_level": 1}, "debug", id="verbose"),
        pytest.param("error", {"log_verbose_level": 4}, "debug", id="more verbose, from errors"),
        pytest.param("debug", {"log_verbose_level": 0}, "info", id="not verbose any more"),
        pytest.param("error", {"log_verbose_level": 0}, "error", id="not verbose before either"),
        pytest.param("debug", {"log_info": False}, "warning", id="no information, nor verbosity"),
        pytest.param("error", {"log_info": True}, "info", id="information, so warnings too"),
        pytest.param("info", {"log_warning": False}, "error", id="no warnings, nor information"),
        pytest.param("error", {"log_warning": True}, "warning", id="warnings again"),
        pytest.param("warning", {"log_error": True}, "warning", id="it is so already"),
        pytest.param(
            "debug", {"log_info": False, "log_warning": True}, "warning", id="two that agree"
        ),
    ],
)
def test_what_is_not_asked_for_changes_as_little_as_it_can(before, wanted, after):
    assert level_for(wanted, before) == after


@pytest.mark.parametrize(
    "wanted",
    [
        {"log_error": False},
        {"log_info": True, "log_warning": False},
        {"log_info": False, "log_verbose_level": 1},
    ],
)
def test_what_no_threshold_can_be_is_refused(wanted):
    with pytest.raises(InvalidRequest, match="no log level has these settings"):
        level_for(wanted, "info")


@given(LEVELS, LEVELS)
def test_what_was_read_can_be_written_back(level, now):
    assert level_for(switches(level), now) == level


@given(WANTED, LEVELS)
def test_an_accepted_request_is_fulfilled_and_asking_again_changes_nothing(wanted, now):
    try:
        level = level_for(wanted, now)
    except InvalidRequest:
        return
    got = switches(level)

    assert all(bool(got[name]) == bool(value) for name, value in wanted.items())
    assert level_for(wanted, level) == level


def request(**settings):
    message = service_pb2.LogSettingsRequest()
    for name, value in settings.items():
        if value is None:
            message.settings[name].SetInParent()
        else:
            kind = {bool: "bool_param", int: "uint32_param", str: "string_param"}[type(value)]
            setattr(message.settings[name], kind, value)
    return message


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        pytest.param({"log_file": "elsewhere.log"}, "unknown log setting 'log_file'", id="a file"),
        pytest.param({"log_info": 1}, "'log_info' needs a bool_param", id="wrong kind"),
        pytest.param({"log_verbose_level": None}, "needs a uint32_param", id="no value"),
    ],
)
def test_settings_that_are_none_are_refused_before_anything_changes(settings, said):
    changed = []
    logs = LogSettings(lambda level, _: changed.append(level))

    with pytest.raises(InvalidRequest, match=said):
        logs.answer(request(log_warning=True, **settings))
    assert changed == []


def test_what_is_so_already_undoes_no_change_that_is_under_way():
    changed = []
    logs = LogSettings(lambda level, _: changed.append(level))

    logs.answer(request(log_error=True))

    assert changed == []


def test_whoever_may_not_change_it_may_ask_for_it():
    logs = LogSettings(None)

    assert set(logs.answer(request()).settings) == set(switches("info"))
    with pytest.raises(Exception, match="--allow-log-settings") as refused:
        logs.answer(request(log_verbose_level=1))
    assert status_of(refused.value).code is grpc.StatusCode.PERMISSION_DENIED


@pytest.mark.parametrize(
    ("problem", "code"),
    [
        (TimeoutError(), grpc.StatusCode.DEADLINE_EXCEEDED),
        (Draining("this server is stopping"), grpc.StatusCode.UNAVAILABLE),
    ],
)
def test_a_change_that_did_not_reach_all_says_so(problem, code):
    def change(_level, _timeout_s):
        raise problem

    with pytest.raises(Exception) as refused:
        LogSettings(change).answer(request(log_verbose_level=1))
    assert status_of(refused.value).code is code
