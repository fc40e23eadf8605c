"""How many workers there are, what each sees, when one is replaced, whether they are ready."""

from collections.abc import Sequence
from dataclasses import dataclass

FIRST_DELAY_S = 0.2
"""Until the first replacement, at most. Every death in a row doubles it."""

MAX_DELAY_S = 30.0

STEADY_S = 60.0
"""A worker that has served for so long and dies has not died several times in a row."""


def plan_workers(asked: int | None, *, cores: int, devices: Sequence[str]) -> list[str | None]:
    """
    Return the GPU that each worker sees; None leaves it whatever the supervisor sees.

    By default there is a worker for each GPU, or for each core but one, which is left to Redis, the
    kernel and whatever else there is. Where more workers are asked for than there are GPUs, several
    share one. A single worker sees all.

    Args:
        asked: How many; None for the default.
        cores: That this process may use.
        devices: GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them.
    """
    count = asked or len(devices) or max(1, cores - 1)
    if count == 1 or not devices:
        return [None] * count
    return [devices[number % len(devices)] for number in range(count)]


def quota_cores(limit: str, cores: int) -> int:
    """
    Return how many cores a share of CPU time is worth, rounded up; at most `cores`.

    Args:
        limit: Quota and period in microseconds, as cgroups write them; no number, or one under 0,
            is no limit.
        cores: That there are.
    """
    quota, _, period = limit.strip().partition(" ")
    if not quota.isdecimal() or not period.isdecimal() or not int(period):
        return cores
    return max(1, min(cores, -(-int(quota) // int(period))))


def visible_devices(variable: str | None, present: int) -> list[str]:
    """
    Return the GPUs that a process may use, as CUDA_VISIBLE_DEVICES names them.

    Source: CUDA C++ Programming Guide, "CUDA Environment Variables": the list ends at the first
    entry that names no GPU.

    Args:
        variable: CUDA_VISIBLE_DEVICES; None where it is not set.
        present: How many GPUs there are.
    """
    if variable is None:
        return [str(number) for number in range(present)]
    devices: list[str] = []
    for entry in variable.split(","):
        name = entry.strip()
        is_index = name.isdecimal() and int(name) < present
        if not is_index and not name.startswith(("GPU-", "MIG-")):
            break
        if name in devices:  # CUDA then shows none at all
            return []
        devices.append(name)
    return devices


def deaths_in_a_row(before: int, served_s: float | None) -> int:
    """
    Count a death.

    Args:
        before: Deaths in a row until now.
        served_s: How long the worker had served; None if it never did.
    """
    return 1 if served_s is not None and served_s >= STEADY_S else before + 1


def restart_delay_s(deaths: int, chance: float) -> float:
    """
    Return how long to wait before a worker is replaced, in seconds.

    Exponential, with a cap, and half of it by chance, so that workers that died together do not
    come back together. Source: AWS Architecture Blog, "Exponential Backoff And Jitter" ("equal
    jitter").

    Args:
        deaths: In a row, this one included.
        chance: 0 to 1.
    """
    longest_s = min(MAX_DELAY_S, FIRST_DELAY_S * 2.0 ** min(deaths - 1, 32))
    return longest_s * (1 + chance) / 2


def starts_too_long(waited_s: float, limit_s: float) -> bool:
    """
    Say whether a worker that does not serve yet never will.

    Nothing else tells one that hangs from one that loads: its channel's thread answers while a file
    system, or a library, does not return.

    Args:
        waited_s: Since its process began.
        limit_s: Longest that its start may take.
    """
    return waited_s >= limit_s


@dataclass(frozen=True, slots=True)
class WorkerState:
    """
    What is known of one worker.

    Args:
        was_ready: Whether it, or one that it replaces, was ever ready.
        is_started: Whether it serves.
        is_ready: Whether it says that it is ready.
        notes: What it says besides.
    """

    was_ready: bool = False
    is_started: bool = False
    is_ready: bool = False
    notes: tuple[str, ...] = ()


def readiness(workers: Sequence[WorkerState]) -> tuple[bool, list[str]]:
    """
    Say whether requests are welcome, and what is not as it should be.

    Ready once each worker has been ready; from then on while at least one is. The others' share of
    connections goes to those that listen.
    """
    ready = sum(worker.is_ready for worker in workers)
    notes = []
    if ready < len(workers):
        notes.append(f"{ready} of {len(workers)} workers are ready")
    for worker in workers:
        notes += [note for note in worker.notes if note not in notes]
    return ready > 0 and all(worker.was_ready for worker in workers), notes
