"""The two cores of a bench: one is the server's, the other the generator's and its company's.

They are taken when this is first imported, before a bench pins itself to one of them.

Source: proc(5), `/proc/stat`: ticks of each core by what it did; `idle` and `iowait` are the fourth
and the fifth.
"""

import os
from collections.abc import Sequence
from pathlib import Path

CORES = sorted(os.sched_getaffinity(0))
ARE_ENOUGH = len(CORES) > 1
SERVER_CORE, GENERATOR_CORE = CORES[0], CORES[1 % len(CORES)]

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def on(core: int | None) -> Sequence[str]:
    """Return the words that make a command run on one core only; none for None."""
    return () if core is None else ("taskset", "--cpu-list", str(core))


def own_core() -> int | None:
    """Return the core that this process is kept on, if it is kept on one."""
    allowed = os.sched_getaffinity(0)
    return min(allowed) if len(allowed) == 1 else None


def idle_s(core: int | None) -> float | None:
    """Return how long a core had nothing to do since the machine began; None if that is unknown."""
    if core is None:
        return None
    return idle_of(Path("/proc/stat").read_text(), core)


def idle_of(stat: str, core: int) -> float | None:
    """Return the same from what `/proc/stat` says."""
    for line in stat.splitlines():
        name, *ticks = line.split()
        if name == f"cpu{core}":
            return (int(ticks[3]) + int(ticks[4])) / _TICKS_PER_S
    return None


def idle_share(before_s: float | None, after_s: float | None, seconds: float) -> float | None:
    """Return which share of some seconds a core was idle; ticks may say a little too much."""
    if before_s is None or after_s is None:
        return None
    return min(1.0, (after_s - before_s) / seconds)
