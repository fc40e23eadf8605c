"""Changes are seen however they are made, and a copy is of one state."""

import os
import shutil

import pytest

from headrace.repository import snapshot
from headrace.repository.snapshot import ChangedMeanwhileError, copy, fingerprint


@pytest.fixture
def version(tmp_path):
    folder = tmp_path / "m" / "1"
    (folder / "weights").mkdir(parents=True)
    (folder / "model.onnx").write_bytes(b"model")
    (folder / "weights" / "a.bin").write_bytes(b"weights")
    (tmp_path / "m" / "config.pbtxt").write_text("max_batch_size: 8")
    return folder


def replace_keeping_times(path, data):
    before = path.stat()
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


CHANGES = {
    "content": lambda version: (version / "model.onnx").write_bytes(b"other model"),
    "same size, times set back": lambda version: replace_keeping_times(
        version / "model.onnx", b"other"
    ),
    "a file below": lambda version: (version / "weights" / "a.bin").write_bytes(b"other weights"),
    "a file more": lambda version: (version / "golden.npz").write_bytes(b""),
    "a file less": lambda version: (version / "weights" / "a.bin").unlink(),
    "a folder more": lambda version: (version / "empty").mkdir(),
    "a file that is a link now": lambda version: (
        (version / "model.onnx").unlink(),
        (version / "model.onnx").symlink_to("weights/a.bin"),
    ),
    "the configuration": lambda version: (version.parent / "config.pbtxt").write_text(""),
    "no configuration": lambda version: (version.parent / "config.pbtxt").unlink(),
    "everything": lambda version: shutil.rmtree(version),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_every_change_is_seen(version, change):
    before = fingerprint(version)
    assert fingerprint(version) == before

    change(version)

    assert fingerprint(version) != before


def test_a_copy_has_every_file_and_the_configuration_beside_it(version, tmp_path):
    (tmp_path / "target").mkdir()

    copied = copy(version, tmp_path / "target")

    assert copied.name == "1"
    assert (copied / "model.onnx").read_bytes() == b"model"
    assert (copied / "weights" / "a.bin").read_bytes() == b"weights"
    assert (copied.parent / "config.pbtxt").read_text() == "max_batch_size: 8"


def test_a_link_is_not_followed_out_of_the_folder(version, tmp_path):
    (tmp_path / "secret").write_text("secret")
    (version / "link").symlink_to(tmp_path / "secret")
    (tmp_path / "target").mkdir()

    copied = copy(version, tmp_path / "target")

    assert sorted(path.name for path in copied.iterdir()) == ["model.onnx", "weights"]


def test_files_that_change_while_they_are_copied_are_no_copy(version, tmp_path, monkeypatch):
    (tmp_path / "target").mkdir()
    real = shutil.copyfile

    def slow(source, target, **options):
        real(source, target, **options)
        (version / "model.onnx").write_bytes(b"changed meanwhile")

    monkeypatch.setattr(snapshot.shutil, "copyfile", slow)

    with pytest.raises(ChangedMeanwhileError):
        copy(version, tmp_path / "target")


def test_files_that_vanish_while_they_are_copied_are_no_copy(version, tmp_path, monkeypatch):
    (tmp_path / "target").mkdir()

    def vanish(source, target, **options):
        shutil.rmtree(version)
        raise FileNotFoundError(2, "gone", str(source))

    monkeypatch.setattr(snapshot.shutil, "copyfile", vanish)

    with pytest.raises(ChangedMeanwhileError):
        copy(version, tmp_path / "target")
