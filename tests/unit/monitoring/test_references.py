"""Reference profiles are found beside the models, and nowhere else."""

import os
from pathlib import Path

import numpy as np
import pytest
import structlog

from headrace.monitoring.profile import build_profile
from headrace.monitoring.references import ReferenceFiles

HUGE = b'{"headrace_profile": 1, "features": {}, "error": 1%s,' % (b"0" * 400) + (
    b'"predictions": {"y": {"kind": "numeric", "edges": [0, 1], "counts": [1], "missing": 0}},'
    b'"prediction": "y"}'
)
"""A profile but for an error that no float holds."""

TEXT = build_profile({"x": np.arange(50.0)}, {"y": np.arange(50.0)}).to_json()


@pytest.fixture
def repository(tmp_path):
    root = tmp_path / "models"
    (root / "homes" / "1").mkdir(parents=True)
    (root / "homes" / "1" / "profile.json").write_text(TEXT)
    return root


def test_a_profile_is_read_once_until_it_changes(repository):
    files = ReferenceFiles(repository)
    first = files.find("homes", 1)
    assert first is not None
    assert files.find("homes", 1) is first
    path = repository / "homes" / "1" / "profile.json"
    path.write_text(TEXT.replace("50", "50 "))
    os.utime(path, ns=(1, 1))
    assert files.find("homes", 1) is not first


@pytest.mark.parametrize(
    ("model", "version"),
    [
        ("homes", 2),
        ("other", 1),
        ("", 1),
        (".", 1),
        ("..", 1),
        ("a/b", 1),
        ("homes", -1),
        ("\0", 1),
    ],
)
def test_what_is_not_there_has_no_reference(repository, model, version):
    assert ReferenceFiles(repository).find(model, version) is None


def test_a_link_is_not_followed(repository, tmp_path):
    (tmp_path / "secret.json").write_text(TEXT)
    (repository / "homes" / "2").mkdir()
    (repository / "homes" / "2" / "profile.json").symlink_to(tmp_path / "secret.json")
    assert ReferenceFiles(repository).find("homes", 2) is None


def test_a_folder_that_is_a_link_is_not_followed(repository):
    (repository / "homes" / "2").symlink_to(repository / "homes" / "1")
    (repository / "linked").symlink_to(repository / "homes")
    files = ReferenceFiles(repository)
    assert files.find("homes", 2) is None
    assert files.find("linked", 1) is None


def test_looking_often_leaves_no_file_open(repository):
    files = ReferenceFiles(repository)
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(20):
        files.find("homes", 1)
        files.find("homes", 2)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


@pytest.mark.parametrize("content", [b"{}", b"\xff", HUGE, b"x" * ((4 << 20) + 1)])
def test_a_file_that_is_no_profile_is_said_once(repository, content):
    (repository / "homes" / "1" / "profile.json").write_bytes(content)
    files = ReferenceFiles(repository)
    with structlog.testing.capture_logs() as lines:
        assert files.find("homes", 1) is None
        assert files.find("homes", 1) is None
    assert [line["event"] for line in lines] == ["profile_unusable"]


def test_a_pipe_does_not_hold_up_the_monitor(repository):
    (repository / "homes" / "3").mkdir()
    os.mkfifo(repository / "homes" / "3" / "profile.json")
    assert ReferenceFiles(repository).find("homes", 3) is None


def test_without_a_repository_there_is_no_reference():
    assert ReferenceFiles(None).find("homes", 1) is None
