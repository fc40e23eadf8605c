"""What lies in a model repository: models, versions, and what is wrong with them.

Source: Triton, "Model Repository" (`<model>/config.pbtxt`, `<model>/<version>/model.onnx`; a
version's folder name is a positive number, other children are ignored).
"""

import os
import re
import stat
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from headrace.errors import ModelLoadError, StartupError

CONFIG_FILENAME = "config.pbtxt"
MODEL_FILENAME = "model.onnx"
MAX_CONFIG_SIZE = 1 << 20  # bytes
MAX_ENTRIES = 10_000
"""Most entries read of one folder."""

# Without leading zeros, so that a number names one folder; 18 digits fit an INT64.
_VERSION = re.compile(r"[1-9][0-9]{0,17}")


@dataclass(frozen=True, slots=True, order=True)
class VersionFolder:
    """
    One version of a model; the higher number is the greater.

    Args:
        number: The folder's name as a number, above 0.
        path: The folder.
        reason: Why it cannot be loaded; None when nothing is wrong so far.
        has_model: Whether there is a `model.onnx`; a model that runs elsewhere has none.
    """

    number: int
    path: Path
    reason: str | None = None
    has_model: bool = True

    @property
    def model_path(self) -> Path:
        return self.path / MODEL_FILENAME


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """
    One model of the repository.

    Args:
        name: The folder's name, escaped when it is not printable.
        path: The folder.
        has_config: Whether there is a `config.pbtxt`; without one the model speaks for itself.
        versions: By number, ascending; unusable ones included.
        reason: Why no version of it can be loaded; None when nothing is wrong so far.
    """

    name: str
    path: Path
    has_config: bool = False
    versions: tuple[VersionFolder, ...] = ()
    reason: str | None = None

    def read_config(self) -> str:
        """
        Read `config.pbtxt`; empty text when there is none.

        Raises:
            ModelLoadError: too long, not UTF-8, or not readable.
        """
        return read_config(self.path) if self.has_config else ""


def read_config(model: Path) -> str:
    """
    Read the `config.pbtxt` of a model's folder; empty text when there is none.

    Raises:
        ModelLoadError: too long, not UTF-8, or not readable.
    """
    try:
        with (model / CONFIG_FILENAME).open("rb") as file:
            data = file.read(MAX_CONFIG_SIZE + 1)
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise ModelLoadError(f"{CONFIG_FILENAME}: {error.strerror}") from None
    if len(data) > MAX_CONFIG_SIZE:
        raise ModelLoadError(f"{CONFIG_FILENAME}: longer than {MAX_CONFIG_SIZE} bytes")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ModelLoadError(f"{CONFIG_FILENAME}: not UTF-8 at byte {error.start}") from None


def scan(root: Path) -> tuple[ModelFolder, ...]:
    """
    List the models of a repository, by name. Reads names and file types only.

    A model or version that cannot be used is in the result with its `reason`: the server starts
    without it and says why. Symbolic links below `root` are such a reason and are never followed.
    Files beside the model folders, hidden folders, and children of a model that are not versions
    are ignored.

    Raises:
        StartupError: `root` is not a folder that can be read.
    """
    try:
        entries = _entries(root)
    except FileNotFoundError:
        raise StartupError(f"model repository {root} does not exist") from None
    except NotADirectoryError:
        raise StartupError(f"model repository {root} is not a folder") from None
    except (OSError, _TooManyError) as error:
        raise StartupError(f"model repository {root} cannot be read: {_reason(error)}") from None
    return tuple(
        _model(entry)
        for entry in entries
        if not entry.name.startswith(".") and (entry.is_symlink() or entry.is_dir())
    )


class _TooManyError(Exception):
    """A folder with more than `MAX_ENTRIES` entries."""

    def __init__(self) -> None:
        super().__init__(f"more than {MAX_ENTRIES} entries")


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as found:
        entries = list(islice(found, MAX_ENTRIES + 1))
    if len(entries) > MAX_ENTRIES:
        raise _TooManyError
    return sorted(entries, key=lambda entry: entry.name)


def _reason(error: Exception) -> str:
    return (isinstance(error, OSError) and error.strerror) or str(error)


def _model(entry: os.DirEntry[str]) -> ModelFolder:
    path = Path(entry.path)
    if not entry.name.isprintable() or "\\" in entry.name:
        name = ascii(entry.name)[1:-1]
        return ModelFolder(name, path, reason="the folder's name is not a model name")
    if entry.is_symlink():
        return ModelFolder(entry.name, path, reason="the folder is a symbolic link")
    try:
        children = _entries(path)
    except (OSError, _TooManyError) as error:
        return ModelFolder(entry.name, path, reason=f"the folder cannot be read: {_reason(error)}")
    versions = tuple(
        sorted(
            _version(child)
            for child in children
            if _VERSION.fullmatch(child.name) and (child.is_symlink() or child.is_dir())
        )
    )
    config_problem = _file_problem(path / CONFIG_FILENAME)
    has_config = config_problem != _ABSENT
    reason = None
    if config_problem is not None and has_config:
        reason = f"{CONFIG_FILENAME} {config_problem}"
    elif not versions:
        reason = "there is no version folder, such as 1"
    return ModelFolder(entry.name, path, has_config, versions, reason)


def _version(entry: os.DirEntry[str]) -> VersionFolder:
    number, path = int(entry.name), Path(entry.path)
    if entry.is_symlink():
        return VersionFolder(number, path, "the folder is a symbolic link")
    problem = _file_problem(path / MODEL_FILENAME)
    if problem == _ABSENT:
        return VersionFolder(number, path, has_model=False)
    return VersionFolder(number, path, problem and f"{MODEL_FILENAME} {problem}")


_ABSENT = "is missing"


def _file_problem(path: Path) -> str | None:
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return _ABSENT
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    if stat.S_ISLNK(mode):
        return "is a symbolic link"
    return None if stat.S_ISREG(mode) else "is not a regular file"
