"""`headrace models` as an operator meets it."""

import json
import shutil
import subprocess
import sys


def run(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "headrace", "models", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


def by_model(done):
    return {(line["model"], line["version"]): line for line in json.loads(done.stdout)}


def test_list_shows_what_serves_and_why_the_rest_does_not(gateway):
    done = run("list", "--address", gateway.grpc_address, "--json")

    assert done.returncode == 0, done.stderr
    found = by_model(done)
    assert found["scores", "1"] == {
        "model": "scores",
        "version": "1",
        "state": "READY",
        "reason": "",
    }
    assert found["corrupt", "1"]["state"] == "UNAVAILABLE"
    assert "ONNX checker" in found["corrupt", "1"]["reason"]
    assert "config.pbtxt" in found["unparsable", ""]["reason"]


def test_list_is_a_table_for_people(gateway):
    done = run("list", "--address", gateway.grpc_address)

    assert "scores" in done.stdout
    assert "READY" in done.stdout


def test_list_says_when_nobody_answers():
    done = run("list", "--address", "127.0.0.1:1")

    assert done.returncode == 2
    assert "is `headrace serve` running there?" in done.stderr


def test_verify_finds_what_would_not_serve(model_repository, feature_repo):
    done = run("verify", model_repository, "--feature-repo", feature_repo, "--json")

    assert done.returncode == 1, done.stderr
    found = by_model(done)
    assert found["driver_trip", "1"]["state"] == "READY"
    assert {key for key, line in found.items() if line["state"] != "READY"} == {
        ("corrupt", "1"),
        ("empty", ""),
        ("unparsable", "1"),
    }
    assert str(model_repository) not in done.stdout


def test_verify_passes_a_sound_repository(model_repository, tmp_path):
    shutil.copytree(model_repository / "scores", tmp_path / "scores")

    done = run("verify", tmp_path, "--json")

    assert done.returncode == 0, done.stderr
    assert by_model(done)["scores", "1"]["state"] == "READY"


def test_verify_says_which_folder_it_cannot_read(tmp_path):
    done = run("verify", tmp_path / "none")

    assert done.returncode == 2
    assert "does not exist" in done.stderr
