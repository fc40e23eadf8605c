"""A version's files as they were at one moment: how to tell a change, and how to copy one state.

A fingerprint stands for names, sizes, inodes and times of all files, not for their bytes: it is
taken at every look at the repository. The time of the last status change is among them, which no
tool can set back: a copy that keeps old modification times is seen too.
"""

import hashlib
import shutil
import stat
from pathlib import Path

from headrace.errors import ModelLoadError
from headrace.repository.scan import CONFIG_FILENAME
from headrace.repository.validate import MAX_FILES


class ChangedMeanwhileError(Exception):
    """The files changed while they were copied: the copy is of no one state."""


def fingerprint(version: Path) -> str:
    """
    Describe a version's files and its model's `config.pbtxt`, as hexadecimal text.

    Never fails: what cannot be read is part of the description.
    """
    digest = hashlib.sha256()
    _describe(digest, "config", version.parent / CONFIG_FILENAME)
    count, pending = 0, [(version, "")]
    while pending:
        folder, prefix = pending.pop()
        try:
            names = sorted(path.name for path in folder.iterdir())
        except OSError as error:
            digest.update(f"{prefix}:{error.errno}\n".encode())
            continue
        for name in names[:MAX_FILES]:
            count += 1
            if count > MAX_FILES:
                return digest.hexdigest()
            path = folder / name
            if _describe(digest, prefix + name, path):
                pending.append((path, f"{prefix}{name}/"))
    return digest.hexdigest()


def copy(version: Path, target: Path) -> Path:
    """
    Copy a version and its model's `config.pbtxt` into an empty folder.

    Links and devices are not copied; who checks the copy will miss them, who checks the original
    first will have refused it.

    Args:
        version: The version's folder.
        target: Exists and is empty.

    Returns:
        The copy's version folder; `config.pbtxt` is beside it, if there is one.

    Raises:
        ChangedMeanwhileError: the files changed while they were copied.
        ModelLoadError: they cannot be read, or not be written.
    """
    before = fingerprint(version)
    copied = target / version.name
    try:
        shutil.copytree(version, copied, ignore=_all_but_plain, copy_function=shutil.copyfile)
        config = version.parent / CONFIG_FILENAME
        if _is_plain(config):
            shutil.copyfile(config, target / CONFIG_FILENAME, follow_symlinks=False)
    except (OSError, shutil.Error) as error:
        if fingerprint(version) != before:
            raise ChangedMeanwhileError from None
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "unreadable"
        raise ModelLoadError(f"the version cannot be copied: {reason}") from None
    if fingerprint(version) != before:
        raise ChangedMeanwhileError
    return copied


def _describe(digest: "hashlib._Hash", name: str, path: Path) -> bool:
    """Add one entry; say whether it is a folder."""
    try:
        found = path.lstat()
    except OSError as error:
        digest.update(f"{name}:{error.errno}\n".encode(errors="surrogateescape"))
        return False
    is_folder = stat.S_ISDIR(found.st_mode)
    # A folder's own times change with every entry that comes and goes; its entries tell that.
    times = () if is_folder else (found.st_size, found.st_mtime_ns, found.st_ctime_ns)
    line = f"{name}:{found.st_mode}:{found.st_ino}:{times}\n"
    digest.update(line.encode(errors="surrogateescape"))
    return is_folder


def _all_but_plain(folder: str, names: list[str]) -> list[str]:
    return [name for name in names if not _is_plain(Path(folder, name), or_folder=True)]


def _is_plain(path: Path, *, or_folder: bool = False) -> bool:
    try:
        mode = path.lstat().st_mode
    except OSError:
        return False
    return stat.S_ISREG(mode) or (or_folder and stat.S_ISDIR(mode))
