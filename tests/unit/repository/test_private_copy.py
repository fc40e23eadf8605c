"""A private copy goes with its load, or with the process that comes after one that was killed."""

import errno
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from headrace.repository import private_copy
from headrace.repository.private_copy import PREFIX, PrivateCopy, remove_left

MAKES_ONE = """
import sys
from headrace.repository.private_copy import PrivateCopy
copy = PrivateCopy()
(copy.path / "model.onnx").write_bytes(b"large")
print(copy.path, flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def scratch(monkeypatch, tmp_path):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return tmp_path


@pytest.fixture
def other():
    """Another process that has a copy."""
    process = subprocess.Popen(
        [sys.executable, "-c", MAKES_ONE],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    process.copy = Path(process.stdout.readline().strip())
    yield process
    process.kill()
    process.communicate()


def test_a_copy_is_there_for_as_long_as_its_block(scratch):
    with PrivateCopy() as folder:
        (folder / "model.onnx").write_bytes(b"large")
        assert folder.parent == scratch
    assert list(scratch.iterdir()) == []


def test_what_a_killed_process_left_is_removed_and_what_others_have_stays(other):
    with PrivateCopy() as ours:
        remove_left()
        assert ours.exists()
        assert (other.copy / "model.onnx").exists()

        other.kill()
        other.wait()
        remove_left()

        assert ours.exists()
        assert not other.copy.exists()


def test_nothing_is_removed_that_is_no_copy(scratch):
    elsewhere, file = scratch / "elsewhere", scratch / f"{PREFIX}file"
    elsewhere.mkdir()
    file.touch()
    (scratch / f"{PREFIX}link").symlink_to(elsewhere)

    remove_left()

    assert elsewhere.exists()
    assert file.exists()


def test_a_copy_whose_files_are_still_used_can_be_removed_by_another_thread(scratch):
    with PrivateCopy() as folder:
        (folder / "1").mkdir()
    copy = PrivateCopy()
    with copy as folder, (folder / "model.onnx").open("wb"):
        copy.remove()
        assert not folder.exists()
    copy.remove()
    assert list(scratch.iterdir()) == []


def test_where_nothing_can_be_locked_copies_are_made_and_none_is_taken_for_left(
    monkeypatch, scratch
):
    def flock(*_):
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(private_copy.fcntl, "flock", flock)
    with PrivateCopy() as folder:
        remove_left()
        assert folder.exists()
    assert list(scratch.iterdir()) == []
