"""How many workers, on what, replaced when, ready when."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.workers.policy import (
    FIRST_DELAY_S,
    MAX_DELAY_S,
    STEADY_S,
    WorkerState,
    deaths_in_a_row,
    plan_workers,
    quota_cores,
    readiness,
    restart_delay_s,
    visible_devices,
)


@pytest.mark.parametrize(
    ("asked", "cores", "devices", "plan"),
    [
        pytest.param(None, 1, [], [None], id="one core has one"),
        pytest.param(None, 2, [], [None], id="two cores have one: the other is for the rest"),
        pytest.param(None, 8, [], [None] * 7, id="a core is left over"),
        pytest.param(3, 8, [], [None] * 3, id="what is asked for"),
        pytest.param(4, 1, [], [None] * 4, id="more than cores, if asked for"),
        pytest.param(None, 16, ["0"], [None], id="one GPU has one, which sees all there is"),
        pytest.param(None, 16, ["0", "1"], ["0", "1"], id="one for each GPU"),
        pytest.param(None, 2, ["GPU-a", "GPU-b"], ["GPU-a", "GPU-b"], id="by name too"),
        pytest.param(1, 16, ["0", "1"], [None], id="a single one sees every GPU"),
        pytest.param(3, 16, ["0", "1"], ["0", "1", "0"], id="more than GPUs share them"),
        pytest.param(2, 16, ["4", "5", "6"], ["4", "5"], id="fewer than GPUs leave some alone"),
        pytest.param(2, 16, ["0"], ["0", "0"], id="two on one GPU"),
    ],
)
def test_workers_follow_cores_and_gpus(asked, cores, devices, plan):
    assert plan_workers(asked, cores=cores, devices=devices) == plan


@pytest.mark.parametrize(
    ("variable", "present", "devices"),
    [
        (None, 0, []),
        (None, 2, ["0", "1"]),
        ("", 2, []),
        ("-1", 2, []),
        ("1", 2, ["1"]),
        ("1, 0", 2, ["1", "0"]),
        ("0,5,1", 2, ["0"]),
        ("0,-1,1", 2, ["0"]),
        ("0,0", 2, []),
        ("GPU-8932f937,MIG-1/2/3", 2, ["GPU-8932f937", "MIG-1/2/3"]),
        ("NoDevFiles", 2, []),
    ],
)
def test_gpus_are_those_that_cuda_would_show(variable, present, devices):
    assert visible_devices(variable, present) == devices


@pytest.mark.parametrize(
    ("before", "served_s", "deaths"),
    [
        pytest.param(0, 1.0, 1, id="the first"),
        pytest.param(3, 1.0, 4, id="one more, soon after it served"),
        pytest.param(3, None, 4, id="one more, before it served"),
        pytest.param(3, STEADY_S, 1, id="the first again, after a good while"),
    ],
)
def test_deaths_soon_after_one_another_are_in_a_row(before, served_s, deaths):
    assert deaths_in_a_row(before, served_s) == deaths


@pytest.mark.parametrize(
    ("limit", "cores", "usable"),
    [
        ("max 100000\n", 8, 8),
        ("200000 100000\n", 64, 2),
        ("150000 100000", 64, 2),
        ("10000 100000", 64, 1),
        ("6400000 100000", 8, 8),
        ("-1 100000", 8, 8),
        ("", 8, 8),
        ("100000 0", 8, 8),
    ],
)
def test_a_share_of_cpu_time_counts_as_whole_cores(limit, cores, usable):
    assert quota_cores(limit, cores) == usable


def test_pauses_double_up_to_a_limit():
    longest = [restart_delay_s(deaths, 1.0) for deaths in range(1, 12)]

    assert longest[:4] == [FIRST_DELAY_S, 2 * FIRST_DELAY_S, 4 * FIRST_DELAY_S, 8 * FIRST_DELAY_S]
    assert longest[-3:] == [MAX_DELAY_S] * 3


@given(st.integers(1, 10**6), st.floats(0, 1))
def test_half_of_a_pause_is_chance_and_none_is_beyond_the_limit(deaths, chance):
    longest_s = restart_delay_s(deaths, 1.0)

    assert longest_s / 2 <= restart_delay_s(deaths, chance) <= longest_s <= MAX_DELAY_S


NEW = WorkerState()
READY = WorkerState(was_ready=True, is_started=True, is_ready=True)
NOT_READY = WorkerState(was_ready=True, is_started=True)
DEAD = WorkerState(was_ready=True)
NEVER_READY = WorkerState(is_started=True)


@pytest.mark.parametrize(
    ("workers", "is_ready", "notes"),
    [
        pytest.param([NEW, NEW], False, ["0 of 2 workers are ready"], id="not before they start"),
        pytest.param([READY, NEW], False, ["1 of 2 workers are ready"], id="not before the last"),
        pytest.param(
            [READY, NEVER_READY], False, ["1 of 2 workers are ready"], id="started is not ready"
        ),
        pytest.param([READY, READY], True, [], id="all are"),
        pytest.param([READY, DEAD], True, ["1 of 2 workers are ready"], id="one is enough then"),
        pytest.param([DEAD, NOT_READY], False, ["0 of 2 workers are ready"], id="none is not"),
    ],
)
def test_ready_once_all_have_been_then_while_one_is(workers, is_ready, notes):
    assert readiness(workers) == (is_ready, notes)


def test_what_several_workers_note_is_said_once():
    noting = WorkerState(was_ready=True, is_started=True, is_ready=True, notes=("the registry …",))

    assert readiness([noting, noting]) == (True, ["the registry …"])
