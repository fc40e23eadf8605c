"""Processor time is that of a process and of all that descend from it."""

import os
import subprocess
import sys

import pytest

BURN_S = 0.2
TICK_S = 1 / os.sysconf("SC_CLK_TCK")
# A child burns, says so, and ends when it is told to; its parent says that it has waited for it.
FAMILY = f"""
import os, sys, time
child = os.fork()
if child == 0:
    while time.process_time() < {BURN_S}:
        pass
    print("burnt", flush=True)
    sys.stdin.readline()
    os._exit(0)
os.wait()
print("waited", flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def family():
    with subprocess.Popen(
        [sys.executable, "-c", FAMILY], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield process
        process.kill()


def test_a_child_counts_while_it_lives_and_when_it_has_ended(bench, family):
    assert family.stdout.readline() == "burnt\n"
    while_it_lives_s = bench.processor_time.used_s(family.pid)
    family.stdin.write("end\n")
    family.stdin.flush()
    assert family.stdout.readline() == "waited\n"
    when_it_has_ended_s = bench.processor_time.used_s(family.pid)

    assert while_it_lives_s >= BURN_S
    assert when_it_has_ended_s >= BURN_S - 2 * TICK_S  # user's and system's, each cut to ticks


def test_waiting_costs_nothing_that_is_counted(bench, family):
    assert family.stdout.readline() == "burnt\n"

    before_s = bench.processor_time.used_s(family.pid)
    assert bench.processor_time.used_s(family.pid) - before_s < BURN_S / 10


def test_a_process_that_has_ended_is_not_measured_as_idle(bench):
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()

        with pytest.raises(ProcessLookupError):
            bench.processor_time.used_s(process.pid)
