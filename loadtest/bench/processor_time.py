"""Processor time of a process and of all that descend from it, to the microsecond.

A server's requests per processor second say what it costs where requests per second of a busy
machine do not: what others take from its core, or the generator from the wall clock, is not in it.

Source: clock_getcpuclockid(3); Linux `include/linux/posix-timers_types.h`, `CPUCLOCK_SCHED` and
how a clock's id is made of a process's; proc(5), `/proc/pid/stat`, `/proc/pid/task/tid/children`.
"""

import os
import time
from contextlib import suppress
from pathlib import Path

_SCHEDULED = 2
"""What the clock of a process counts: time on a processor, as the scheduler sees it."""


def used_s(pid: int) -> float:
    """
    Return the processor seconds of a process and its descendants since they began.

    Those that have ended count once their parents have waited for them, in hundredths of a second;
    never less than at an earlier call while none ends.

    Raises:
        ProcessLookupError: there is no such process.
    """
    try:
        own_s = time.clock_gettime((~pid << 3) | _SCHEDULED)
    except OSError:
        raise ProcessLookupError(f"process {pid} has ended") from None
    return own_s + _waited_for_s(pid) + sum(map(_still_used_s, _children(pid)))


def _still_used_s(pid: int) -> float:
    with suppress(ProcessLookupError):
        return used_s(pid)
    return 0.0


def _waited_for_s(pid: int) -> float:
    """Return what children used that have ended."""
    with suppress(OSError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return sum(map(int, fields[13:15])) / os.sysconf("SC_CLK_TCK")
    return 0.0


def _children(pid: int) -> list[int]:
    """Return the children that any of its threads has."""
    found: list[int] = []
    with suppress(OSError):
        for thread in Path(f"/proc/{pid}/task").iterdir():
            with suppress(OSError):
                found += map(int, (thread / "children").read_text().split())
    return found
