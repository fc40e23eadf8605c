"""A folder of one's own while a version is loaded from it; those of processes that died go too."""

import fcntl
import os
import shutil
import tempfile
import time
from pathlib import Path
from types import TracebackType

import structlog

_LOG = structlog.get_logger(__name__)

PREFIX = "headrace-copy-"
REMOVE_TRIES, REMOVE_PAUSE_S = 20, 0.05


class PrivateCopy:
    """
    An empty folder under `TMPDIR` until the `with` block ends.

    It is locked for as long as this process has it: a process that is killed, or ends at once,
    leaves a folder without a lock, which `remove_left` finds. Source: flock(2), a lock ends with
    the last descriptor of its open file.
    """

    def __init__(self) -> None:
        while True:
            self.path = Path(tempfile.mkdtemp(prefix=PREFIX))
            lock = _lock(self.path)
            if lock is not None:
                self._lock = lock
                return  # otherwise somebody took it for left, before it was locked

    def remove(self) -> None:
        """Remove it although files may still be written to it. Any thread may; may be repeated."""
        for _ in range(REMOVE_TRIES):
            shutil.rmtree(self.path, ignore_errors=True)
            if not self.path.exists():
                return
            time.sleep(REMOVE_PAUSE_S)

    def __enter__(self) -> Path:
        return self.path

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


def remove_left() -> None:
    """Remove what processes of this user left that did not end in peace. It may be models' size."""
    for path in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        lock = _lock(path)
        if lock is None:
            continue
        try:
            shutil.rmtree(path, ignore_errors=True)
        finally:
            os.close(lock)
        _LOG.info("left_copy_removed")


def _lock(path: Path) -> int | None:
    """Lock a folder of ours; None if it is another's, locked, or gone."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        if os.fstat(descriptor).st_uid == os.geteuid():
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(descriptor), path.lstat()):
                return descriptor
    except OSError:
        pass
    os.close(descriptor)
    return None
