"""Follows the feature registry: what is applied while the server runs is served.

A registry in a file is looked at every few seconds and read once it has stood still; any other is
read as often as Feast's `cache_ttl_seconds` says, and once more at the start. Whatever fails, the
last good state goes on.
"""

import math
import threading
import time
from collections.abc import Callable
from pathlib import Path

import structlog

from headrace.errors import StartupError
from headrace.features.repo import FeatureRepo, reopen

_LOG = structlog.get_logger(__name__)

OTHER_PERIOD_MIN_S = 5.0
"""Between two reads of a registry that is no file, whatever it says of itself."""

_Signature = tuple[int, int, int] | None


class RegistryWatch:
    """
    One thread that reads the registry again when it has changed.

    `start`, then `stop`.

    Args:
        repo: As it was opened.
        swap: Is given each new state, on the watch's thread; must not block for long.
        period_s: How often to look at a registry's file.

    Attributes:
        is_readable: Whether the last look succeeded.
        reads: How often a new state was taken over.
        failures: How often reading failed.
    """

    def __init__(
        self, repo: FeatureRepo, swap: Callable[[FeatureRepo], None], period_s: float
    ) -> None:
        self.is_readable = True
        self.reads = self.failures = 0
        self._repo = repo
        self._swap = swap
        self._period_s = period_s
        self._file = repo.registry_file
        # Whatever was written since the repository was opened, or just then, is seen by reading it
        # once more.
        self._read_signature: _Signature = None
        self._last_signature = _signature(self._file)
        self._next_read_s = 0.0
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="registry-watch", daemon=True)

    def start(self) -> None:
        """Begin to look."""
        self._thread.start()

    def stop(self, timeout_s: float) -> None:
        """Look no more."""
        self._stopping.set()
        if self._thread.ident is not None:
            self._thread.join(timeout_s)

    def look(self) -> None:
        """Look once; never fails."""
        if not self._is_due():
            return
        try:
            repo = reopen(self._repo)
        except StartupError as error:
            self._failed(str(error))
            return
        if self._file is not None and _signature(self._file) != self._last_signature:
            return  # it was written while it was read: next time
        if repo.version != self._repo.version:
            _LOG.info("registry_changed", version=repo.version, services=list(repo.services()))
            self._swap(repo)
            self._repo = repo  # not before: what was not taken over is tried again
            self.reads += 1
        self._read_signature = self._last_signature
        if not self.is_readable:
            self.is_readable = True
            _LOG.info("registry_readable_again")

    def _is_due(self) -> bool:
        if self._file is None:
            if time.monotonic() < self._next_read_s:
                return False
            self._next_read_s = time.monotonic() + self._other_period_s()
            return True
        before, self._last_signature = self._last_signature, _signature(self._file)
        if self._last_signature is None:
            self._failed("the registry is not there")
            return False
        # Feast writes it in place: half a registry may well be one.
        is_still = before == self._last_signature
        return is_still and (self._last_signature != self._read_signature or not self.is_readable)

    def _failed(self, reason: str) -> None:
        self.failures += 1
        self._next_read_s = min(self._next_read_s, time.monotonic() + OTHER_PERIOD_MIN_S)
        if self.is_readable:
            self.is_readable = False
            _LOG.error("registry_unreadable", reason=reason, effect="the last good state is served")

    def _other_period_s(self) -> float:
        # Feast's 0 says that what was read is good for ever.
        return max(OTHER_PERIOD_MIN_S, self._repo.registry_ttl_s or math.inf)

    def _run(self) -> None:
        while not self._stopping.wait(self._period_s):
            try:
                self.look()
            except Exception as error:  # noqa: BLE001 the thread must go on
                self._failed(type(error).__name__)
                _LOG.exception("registry_look_failed")


def _signature(path: Path | None) -> _Signature:
    if path is None:
        return None
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino
