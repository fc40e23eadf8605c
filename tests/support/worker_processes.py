"""The worker processes of a supervisor, as the kernel knows them."""

import contextlib
from pathlib import Path


def workers_of(process):
    """Return the ids of a process' children that have not ended, in order."""
    pids = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, parent = _state_and_parent(stat)
            if parent == process.pid and state != "Z":
                pids.append(int(stat.parent.name))
    return sorted(pids)


def is_there(pid):
    """Say whether a process has not ended."""
    with contextlib.suppress(OSError):
        return _state_and_parent(Path(f"/proc/{pid}/stat"))[0] != "Z"
    return False


def _state_and_parent(stat):
    # The name before them may hold anything, brackets too.
    state, parent, *_ = stat.read_text().rpartition(")")[2].split()
    return state, int(parent)
