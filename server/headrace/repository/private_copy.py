"""A folder of one's own while a version is loaded from it; those of processes that died go too."""

import errno
import fcntl
import os
import shutil
import tempfile
import time
from pathlib import Path

import structlog

_LOG = structlog.get_logger(__name__)

PREFIX = "headrace-copy-"
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL)
"""Of a file system that has none."""

REMOVE_TRIES, REMOVE_PAUSE_S = 20, 0.05


class PrivateCopy:
    """
    An empty folder under `TMPDIR` until the `with` block ends.

    It is locked for as long as this process has it: a process that is killed, or ends at once,
    leaves a folder without a lock, which `remove_left` finds. Source: flock(2), a lock ends with
    the last descriptor of its open file.

    Raises:
        OSError: it cannot be made, or not be looked at.
    """

    def __init__(self) -> None:
        while True:
            self.path = Path(tempfile.mkdtemp(prefix=PREFIX))
            try:
                self._lock: int | None = _lock(self.path)
            except (BlockingIOError, FileNotFoundError):
                continue  # somebody took it for left, before it was locked
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    shutil.rmtree(self.path, ignore_errors=True)
                    raise
                self._lock = None  # nothing is taken for left there
            return

    def remove(self) -> None:
        """Remove it although files may still be written to it. Any thread may; may be repeated."""
        for _ in range(REMOVE_TRIES):
            shutil.rmtree(self.path, ignore_errors=True)
            if not self.path.exists():
                return
            time.sleep(REMOVE_PAUSE_S)

    def __enter__(self) -> Path:
        return self.path

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)


def remove_left() -> None:
    """Remove what processes of this user left that did not end in peace. It may be models' size."""
    for path in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        try:
            lock = _lock(path)
        except OSError:  # another process has it, or it is gone, or nothing that a process left
            continue
        try:
            shutil.rmtree(path, ignore_errors=True)
        finally:
            os.close(lock)
        if path.exists():
            _LOG.warning("left_copy_not_removed", path=str(path))
        else:
            _LOG.info("left_copy_removed")


def _lock(path: Path) -> int:
    """
    Lock a folder of this user.

    Raises:
        BlockingIOError: another process has it.
        FileNotFoundError: it is gone.
        OSError: it is no folder, or not ours, or cannot be locked.
    """
    if path.lstat().st_uid != os.geteuid():  # a file system may say so though we made it
        raise OSError(errno.ENOTSUP, "a folder that is not ours")
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        found = os.fstat(descriptor)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(found, path.lstat()):
            raise FileNotFoundError
    except OSError:
        os.close(descriptor)
        raise
    return descriptor
