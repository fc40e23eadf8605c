"""What a version must prove before it serves: its files are those listed, its answers are right.

Nothing here loads a model: the golden inputs go through one that the caller has loaded.
"""

import hashlib
import json
import lzma
import os
import re
import stat
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from headrace.errors import ModelLoadError, ServingError
from headrace.tensors import TensorSpec

MANIFEST_FILENAME = "manifest.json"
GOLDEN_FILENAME = "golden.npz"

GOLDEN_RTOL = 1e-4
GOLDEN_ATOL = 1e-5
"""How far an FP32 or FP64 output may be off: |difference| ≤ atol + rtol * |golden|. Wide enough for
another CPU's order of summation, narrow enough to see a wrong model."""
GOLDEN_FP16_RTOL = 1e-2
GOLDEN_FP16_ATOL = 1e-3

MAX_FILES = 10_000
MAX_MANIFEST_SIZE = 4 << 20  # bytes
MAX_GOLDEN_SIZE = 256 << 20  # bytes, unpacked

# What numpy, zipfile and zlib raise on bytes that are not what they say. MemoryError: a header may
# declare any shape.
_UNREADABLE = (
    OSError,
    ValueError,
    EOFError,
    KeyError,
    RuntimeError,
    MemoryError,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    struct.error,
    tokenize.TokenError,
)


class LoadedModel(Protocol):
    """The part of `backends.base.Backend` that answers."""

    @property
    def inputs(self) -> Sequence[TensorSpec]: ...

    @property
    def outputs(self) -> Sequence[TensorSpec]: ...

    def infer(self, inputs: Mapping[str, NDArray[np.generic]]) -> Sequence[NDArray[np.generic]]: ...


def check_manifest(folder: Path) -> None:
    """
    Check that a version's files are plain files, and those that its manifest lists.

    A symbolic link, device or pipe is refused anywhere in the folder. A `manifest.json`, where
    there is one, is `{"files": {"<path in the folder>": "<sha256, hex>"}}` with every file but
    itself: each must be listed and have that digest. Without one, nothing is hashed.

    Raises:
        ModelLoadError: with the file's path relative to `folder`.
    """
    if folder.is_symlink():
        raise ModelLoadError("the version's folder is a symbolic link")
    present = set(_walk(folder))
    if MANIFEST_FILENAME not in present:
        return
    digests = _read_manifest(folder / MANIFEST_FILENAME)
    present.discard(MANIFEST_FILENAME)
    for name in sorted(present - digests.keys()):
        raise ModelLoadError(f"{name}: not listed in {MANIFEST_FILENAME}")
    for name, digest in sorted(digests.items()):
        if name not in present:
            raise ModelLoadError(f"{name}: listed in {MANIFEST_FILENAME} and missing")
        try:
            with (folder / name).open("rb") as file:
                actual = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise ModelLoadError(f"{name}: {error.strerror}") from None
        if actual != digest:
            raise ModelLoadError(
                f"{name}: sha256 is {actual[:12]}…, but {digest[:12]}… in {MANIFEST_FILENAME}"
            )


def check_golden(folder: Path, model: LoadedModel, *, is_coarse: bool = False) -> bool:
    """
    Run a version's golden inputs and compare its answers.

    `golden.npz` holds an array `in:<name>` for each input and `out:<name>` for one output or more,
    of the ONNX model itself. BYTES are numpy `S` or `U` (UTF-8) arrays. FP32 and FP64 must be close
    within `GOLDEN_RTOL` and `GOLDEN_ATOL` (FP16: its own two), NaN where NaN is; all else is equal.

    Args:
        folder: The version's folder.
        model: The version, loaded.
        is_coarse: Whether FP32 is computed with the digits of FP16, and compared as that.

    Returns:
        Whether there was a `golden.npz`.

    Raises:
        ModelLoadError: the file is not as described, or the model answers something else.
    """
    path = folder / GOLDEN_FILENAME
    if not path.exists():
        return False
    arrays = _read_golden(path)
    feed = {spec.name: _prepared(arrays, f"in:{spec.name}", spec) for spec in model.inputs}
    wanted = {
        i: _prepared(arrays, f"out:{spec.name}", spec)
        for i, spec in enumerate(model.outputs)
        if f"out:{spec.name}" in arrays
    }
    known = {f"in:{spec.name}" for spec in model.inputs}
    known |= {f"out:{spec.name}" for spec in model.outputs}
    for name in sorted(arrays.keys() - known):
        raise _wrong(f"the model has nothing for the array '{name}'")
    if not wanted:
        raise _wrong("there is no array 'out:<name>'")
    try:
        results = model.infer(feed)
    except ServingError as error:
        raise _wrong(f"the golden inputs fail: {error}") from error
    for i, golden in wanted.items():
        _compare(model.outputs[i], results[i], golden, is_coarse=is_coarse)
    return True


def _walk(folder: Path) -> Iterator[str]:
    count = 0
    pending = [(folder, "")]
    while pending:
        current, prefix = pending.pop()
        try:
            with os.scandir(current) as entries:
                for entry in entries:
                    count += 1
                    if count > MAX_FILES:
                        raise ModelLoadError(f"the version has more than {MAX_FILES} files")
                    name = prefix + entry.name
                    mode = entry.stat(follow_symlinks=False).st_mode
                    if stat.S_ISDIR(mode):
                        pending.append((Path(entry.path), name + "/"))
                    elif stat.S_ISREG(mode):
                        yield name
                    else:
                        what = "a symbolic link" if stat.S_ISLNK(mode) else "not a regular file"
                        raise ModelLoadError(f"{name}: {what}")
        except OSError as error:
            where = prefix.rstrip("/") or "the version's folder"
            raise ModelLoadError(f"{where}: {error.strerror}") from None


def _read_manifest(path: Path) -> dict[str, str]:
    expected = f'{MANIFEST_FILENAME}: expected {{"files": {{"<path>": "<sha256, hex>"}}}}'
    try:
        with path.open("rb") as file:
            data = file.read(MAX_MANIFEST_SIZE + 1)
    except OSError as error:
        raise ModelLoadError(f"{MANIFEST_FILENAME}: {error.strerror}") from None
    if len(data) > MAX_MANIFEST_SIZE:
        raise ModelLoadError(f"{MANIFEST_FILENAME}: longer than {MAX_MANIFEST_SIZE} bytes")
    try:
        manifest = json.loads(data)
    except (ValueError, RecursionError):
        raise ModelLoadError(f"{expected}, and this is not JSON") from None
    files = manifest.get("files") if isinstance(manifest, dict) else None
    if not isinstance(files, dict):
        raise ModelLoadError(expected)
    for name, digest in files.items():
        # Only a name that the walk itself can produce is ever opened; this says it sooner.
        if str(PurePosixPath(name)) != name or name.startswith("/") or ".." in name.split("/"):
            raise ModelLoadError(f"{MANIFEST_FILENAME}: {name!r} is not a path in the folder")
        if not isinstance(digest, str) or not re.fullmatch(r"[0-9a-f]{64}", digest):
            raise ModelLoadError(f"{MANIFEST_FILENAME}: {name!r} has no sha256 of 64 hex digits")
    return files


def _wrong(fact: str) -> ModelLoadError:
    return ModelLoadError(f"{GOLDEN_FILENAME}: {fact}")


def _read_golden(path: Path) -> dict[str, NDArray[np.generic]]:
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(member.file_size for member in archive.infolist())
            if size > MAX_GOLDEN_SIZE:
                raise _wrong(f"unpacks to {size} bytes; at most {MAX_GOLDEN_SIZE}")
        with np.load(path, allow_pickle=False) as loaded:
            return {name: np.asarray(loaded[name]) for name in loaded.files}
    except _UNREADABLE as error:
        raise _wrong("not an .npz archive of plain arrays") from error


def _prepared(
    arrays: Mapping[str, NDArray[np.generic]], name: str, spec: TensorSpec
) -> NDArray[np.generic]:
    if name not in arrays:
        raise _wrong(f"there is no array '{name}'")
    array = arrays[name]
    if len(array.shape) != len(spec.shape) or any(
        want not in (-1, got) for want, got in zip(spec.shape, array.shape, strict=True)
    ):
        raise _wrong(f"'{name}' has the shape {list(array.shape)}; expected {list(spec.shape)}")
    if spec.datatype == "BYTES" and array.dtype.kind in "SU":
        return _as_bytes(array)
    if array.dtype != spec.dtype:
        raise _wrong(f"'{name}' is {array.dtype}; expected {spec.datatype}")
    return array


def _as_bytes(array: NDArray[np.generic]) -> NDArray[np.generic]:
    elements = np.empty(array.size, np.object_)
    elements[:] = [
        value.encode() if isinstance(value, str) else bytes(value)
        for value in array.ravel().tolist()
    ]
    return elements.reshape(array.shape)


def _compare(
    spec: TensorSpec, got: NDArray[np.generic], golden: NDArray[np.generic], *, is_coarse: bool
) -> None:
    if got.shape != golden.shape:
        raise _wrong(
            f"output '{spec.name}' has the shape {list(got.shape)}; golden is {list(golden.shape)}"
        )
    if spec.datatype == "BYTES":
        differs = _as_bytes(got) != golden
    elif golden.dtype.kind == "f":
        is_half = spec.datatype == "FP16" or (is_coarse and spec.datatype == "FP32")
        rtol = GOLDEN_FP16_RTOL if is_half else GOLDEN_RTOL
        atol = GOLDEN_FP16_ATOL if is_half else GOLDEN_ATOL
        wide_got, wide_golden = got.astype(np.float64), golden.astype(np.float64)
        differs = ~np.isclose(wide_got, wide_golden, rtol=rtol, atol=atol, equal_nan=True)
    else:
        differs = got != golden
    if differs.any():
        at = tuple(int(i) for i in np.argwhere(differs)[0])
        raise _wrong(
            f"output '{spec.name}' differs in {int(differs.sum())} of {differs.size} values; "
            f"at {list(at)} it is {got[at]}, golden is {golden[at]}"
        )
