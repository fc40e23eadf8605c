"""The bench's cores: which ones it may use, and what is left of one."""

import subprocess
import sys

import pytest

STAT = """\
cpu  300 0 100 1000 50 0 0 0 0 0
cpu0 100 0 50 400 20 0 0 0 0 0
cpu1 200 0 50 600 30 0 0 0 0 0
cpu11 1 0 1 9 9 0 0 0 0 0
intr 7
"""
TICKS_PER_S = 100


@pytest.fixture
def cores(bench, monkeypatch):
    monkeypatch.setattr(bench.cores, "_TICKS_PER_S", TICKS_PER_S)
    return bench.cores


@pytest.mark.parametrize(("core", "idle_s"), [(0, 4.2), (1, 6.3), (11, 0.18), (5, None)])
def test_a_core_s_idle_time_is_its_own_and_includes_waiting_for_disks(cores, core, idle_s):
    assert cores.idle_of(STAT, core) == (None if idle_s is None else pytest.approx(idle_s))


def test_a_share_of_idle_time_is_known_only_where_both_ends_are(cores):
    assert cores.idle_share(1.0, 1.5, 2.0) == pytest.approx(0.25)
    assert cores.idle_share(1.0, 3.01, 2.0) == 1.0
    assert cores.idle_share(None, 1.5, 2.0) is None


def test_a_command_stays_on_the_core_that_it_is_given(cores):
    core = cores.SERVER_CORE
    words = [sys.executable, "-c", "import os; print(os.sched_getaffinity(0))"]

    assert subprocess.check_output([*cores.on(core), *words], text=True) == f"{{{core}}}\n"


def test_the_cores_are_those_that_may_be_used(cores):
    """A container may have the cores 4 and 5, and a bench that is pinned only one of them."""
    program = "import cores; print(cores.SERVER_CORE, cores.GENERATOR_CORE, cores.ARE_ENOUGH)"
    core = cores.GENERATOR_CORE
    found = subprocess.check_output(
        [*cores.on(core), sys.executable, "-c", program],
        text=True,
        env={"PYTHONPATH": cores.__file__.rpartition("/")[0]},
    )

    assert found.split() == [str(core), str(core), "False"]
