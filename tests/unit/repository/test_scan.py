"""What is found in a model repository, and what is said about the rest."""

import os

import pytest

from headrace.errors import ModelLoadError, StartupError
from headrace.repository import scan as scan_module
from headrace.repository.scan import MAX_CONFIG_SIZE, scan


def add(root, *paths):
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(b"")


def only(root):
    (folder,) = scan(root)
    return folder


def test_models_come_by_name_and_versions_by_number(tmp_path):
    add(tmp_path, "b/1/model.onnx", "a/10/model.onnx", "a/9/model.onnx", "a/config.pbtxt")
    a, b = scan(tmp_path)
    assert (a.name, b.name) == ("a", "b")
    assert [version.number for version in a.versions] == [9, 10]
    assert max(a.versions).model_path == tmp_path / "a/10/model.onnx"
    assert (a.has_config, b.has_config) == (True, False)
    assert (a.reason, b.reason) == (None, None)


def test_an_empty_repository_has_no_models(tmp_path):
    assert scan(tmp_path) == ()


def test_children_that_are_no_versions_are_ignored(tmp_path):
    add(
        tmp_path,
        "README.md",
        ".git/1/model.onnx",
        "a/1/model.onnx",
        *(f"a/{name}/model.onnx" for name in ("0", "-1", "01", "1.5", "v2", "²", "9" * 19, "new")),
        "a/train.py",
        "a/card.md",
        "a/2",  # a file
    )
    assert [version.number for version in only(tmp_path).versions] == [1]


def test_a_model_without_versions_is_reported(tmp_path):
    add(tmp_path, "a/config.pbtxt")
    assert only(tmp_path).reason == "there is no version folder, such as 1"


def test_a_version_without_a_model_does_not_hide_the_others(tmp_path):
    add(tmp_path, "a/1/model.onnx", "a/2/card.md")
    first, second = only(tmp_path).versions
    assert (first.reason, second.reason) == (None, None)
    assert (first.has_model, second.has_model) == (True, False)


def test_a_model_that_is_a_folder_is_reported(tmp_path):
    add(tmp_path, "a/1/model.onnx/model.onnx")
    assert only(tmp_path).versions[0].reason == "model.onnx is not a regular file"


@pytest.mark.parametrize(
    ("link", "target"),
    [
        ("a", "../elsewhere"),
        ("a/config.pbtxt", "../../elsewhere/config.pbtxt"),
        ("a/1", "../../elsewhere/1"),
        ("a/1/model.onnx", "../../../elsewhere/1/model.onnx"),
        ("a/1/model.onnx", "/dev/zero"),
        ("a/1/model.onnx", "nowhere"),
    ],
)
def test_a_symbolic_link_is_reported_and_not_followed(tmp_path, link, target):
    root = tmp_path / "models"
    add(tmp_path / "elsewhere", "config.pbtxt", "1/model.onnx")
    if link != "a":
        add(root, "a/2/model.onnx")
    (root / link).parent.mkdir(parents=True, exist_ok=True)
    (root / link).symlink_to(target)
    folder = only(root)
    reasons = [folder.reason, *(version.reason for version in folder.versions)]
    assert [reason for reason in reasons if reason and "is a symbolic link" in reason]


def test_the_repository_itself_may_be_a_link(tmp_path):
    add(tmp_path, "models/a/1/model.onnx")
    (tmp_path / "current").symlink_to("models")
    assert only(tmp_path / "current").reason is None


@pytest.mark.parametrize(
    ("name", "shown"),
    [(b"a\nb", "a\\nb"), (b"a\\b", "a\\\\b"), (b"\xff", "\\udcff"), (b"a\x1b[2J", "a\\x1b[2J")],
)
def test_a_name_that_cannot_be_a_models_is_reported_escaped(tmp_path, name, shown):
    (tmp_path / os.fsdecode(name)).mkdir()
    folder = only(tmp_path)
    assert folder.name == shown
    assert folder.reason == "the folder's name is not a model name"


def test_a_folder_with_too_many_entries_is_reported(tmp_path, monkeypatch):
    add(tmp_path, "a/1/model.onnx", "a/2/model.onnx", "a/3/model.onnx")
    monkeypatch.setattr(scan_module, "MAX_ENTRIES", 2)
    assert only(tmp_path).reason == "the folder cannot be read: more than 2 entries"


def test_a_repository_that_is_missing_stops_the_start(tmp_path):
    with pytest.raises(StartupError, match="nowhere does not exist"):
        scan(tmp_path / "nowhere")


def test_a_repository_that_is_a_file_stops_the_start(tmp_path):
    add(tmp_path, "models")
    with pytest.raises(StartupError, match="models is not a folder"):
        scan(tmp_path / "models")


def test_a_config_is_read_as_utf_8(tmp_path):
    add(tmp_path, "a/config.pbtxt", "a/1/model.onnx")
    (tmp_path / "a/config.pbtxt").write_bytes("name: 'é'".encode())
    assert only(tmp_path).read_config() == "name: 'é'"


def test_no_config_reads_as_empty(tmp_path):
    add(tmp_path, "a/1/model.onnx")
    assert only(tmp_path).read_config() == ""


@pytest.mark.parametrize(
    ("data", "fact"),
    [
        (b"name: '\xff'", "config.pbtxt: not UTF-8 at byte 7"),
        (b"#" * (MAX_CONFIG_SIZE + 1), "config.pbtxt: longer than 1048576 bytes"),
    ],
)
def test_a_config_that_cannot_be_text_is_refused(tmp_path, data, fact):
    add(tmp_path, "a/config.pbtxt", "a/1/model.onnx")
    (tmp_path / "a/config.pbtxt").write_bytes(data)
    with pytest.raises(ModelLoadError) as refused:
        only(tmp_path).read_config()
    assert str(refused.value) == fact
