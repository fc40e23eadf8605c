"""The least severe line that is written can be changed while loggers are in use."""

import subprocess
import sys

import pytest

# In a process of its own: structlog is set up once in each.
WRITE = """
import sys
import structlog
from headrace.telemetry.logs import LOG_LEVELS, log_level, set_log_level, set_up_logs

log = structlog.get_logger("one")
set_up_logs(sys.argv[1])

def write_all():
    for level in LOG_LEVELS:
        getattr(log, level)(f"{level} at {log_level()}")
    log.critical(f"critical at {log_level()}")
    try:
        1 / 0
    except ZeroDivisionError:
        log.exception(f"exception at {log_level()}")

write_all()
for level in sys.argv[2:]:
    set_log_level(level)
    write_all()
"""
ALL = ("debug", "info", "warning", "error", "critical", "exception")


@pytest.mark.parametrize(
    "levels", [("info",), ("info", "debug", "error"), ("error", "warning", "warning", "info")]
)
def test_loggers_in_use_follow_the_level(levels):
    done = subprocess.run(
        [sys.executable, "-c", WRITE, *levels], capture_output=True, text=True, check=True
    )

    expected = [f"{method} at {level}" for level in levels for method in ALL[ALL.index(level) :]]
    lines = [line for line in done.stderr.splitlines() if "log_level_changed" not in line]
    assert len(lines) == len(expected)
    assert all(said in line for said, line in zip(expected, lines, strict=True))


def test_a_change_is_written_whichever_way_it_goes_and_no_change_is_not():
    levels = ("info", "error", "error", "warning", "debug")
    done = subprocess.run(
        [sys.executable, "-c", WRITE, *levels], capture_output=True, text=True, check=True
    )

    changes = [line for line in done.stderr.splitlines() if "log_level_changed" in line]
    assert [('"to": "error"' in line, '"before": "error"' in line) for line in changes] == [
        (True, False),
        (False, True),
        (False, False),
    ]
