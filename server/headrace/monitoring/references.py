"""Where the monitor finds reference profiles: beside the models, in the model repository."""

import os
import re
import stat
from pathlib import Path
from typing import BinaryIO

import structlog

from headrace.errors import ProfileError
from headrace.monitoring.profile import FILENAME, PROFILE_BYTES_MAX, ReferenceProfile

_LOG = structlog.get_logger(__name__)

_NAME = re.compile(r"[^/\\\x00-\x1f]{1,256}")


class ReferenceFiles:
    """
    Reads `<model>/<version>/profile.json`. Links are not followed, wherever in that path.

    Args:
        repository: The model repository; None when there is none.
    """

    def __init__(self, repository: Path | None) -> None:
        self._repository = repository
        self._read: dict[tuple[str, int], tuple[tuple[int, int], ReferenceProfile | None]] = {}

    def find(self, model: str, version: int) -> ReferenceProfile | None:
        """
        Return a version's profile, the same object for as long as the file does not change.

        Returns:
            None when there is none, or it is not one; the log says why.
        """
        if (
            self._repository is None
            or version < 1
            or model in (".", "..")
            or not _NAME.fullmatch(model)
        ):
            return None
        key = (model, version)
        try:
            descriptor = _open(self._repository, model, str(version))
        except OSError:
            self._read.pop(key, None)
            return None
        with os.fdopen(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            stamp = (status.st_mtime_ns, status.st_size)
            before = self._read.get(key)
            if before is not None and before[0] == stamp:
                return before[1]
            profile = None
            try:
                profile = _read(file, status)
            except (ProfileError, OSError, UnicodeDecodeError) as error:
                _LOG.error("profile_unusable", model=model, version=version, reason=str(error))
            self._read[key] = (stamp, profile)
            return profile


def _open(repository: Path, *folders: str) -> int:
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
    at = os.open(repository, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for folder in folders:
            below = os.open(folder, flags | os.O_DIRECTORY, dir_fd=at)
            os.close(at)
            at = below
        return os.open(FILENAME, flags | os.O_NONBLOCK, dir_fd=at)
    finally:
        os.close(at)


def _read(file: BinaryIO, status: os.stat_result) -> ReferenceProfile:
    if not stat.S_ISREG(status.st_mode) or status.st_size > PROFILE_BYTES_MAX:
        raise ProfileError(f"not a file of at most {PROFILE_BYTES_MAX} bytes")
    return ReferenceProfile.from_json(file.read(PROFILE_BYTES_MAX).decode())
