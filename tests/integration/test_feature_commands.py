"""`headrace features`: what people see, what machines get, and the exit codes."""

import json
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pandas as pd
import pytest
import structlog
from feast import Entity, FeatureService, FeatureStore, FeatureView, Field, FileSource, ValueType
from feast.types import Float32, String
from redis import Redis
from redis_processes import alone

from headrace.__main__ import main
from headrace.app import Gateway
from headrace.settings import load_settings


@pytest.fixture
def run(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    # Logs are the whole process's: the gateway's, which runs in it too, would land in what is read.
    monkeypatch.setattr("headrace.__main__.set_up_logs", lambda level: None)
    structlog.configure(logger_factory=structlog.ReturnLoggerFactory())

    def run(*arguments):
        code = main(["features", *arguments])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    yield run
    structlog.reset_defaults()


@pytest.fixture
def get(run, gateway):
    return lambda *arguments: run("get", *arguments, "--address", gateway.grpc_address)


def test_the_features_of_an_entity_are_a_table(get):
    code, out, _ = get("driver_features", "driver_id=1,3,4,5")

    assert code == 0
    for words in (
        "driver_id 1",
        "4.5",
        "PRESENT",
        "NULL_VALUE",
        "OUTSIDE_MAX_AGE",
        "3 d",
        "NOT_FOUND",
    ):
        assert words in out


def test_machines_get_every_value_with_status_age_and_view(get):
    code, out, _ = get("driver_features", "driver_id=2,5", "--json")

    first, second = json.loads(out)
    assert code == 0
    assert first["entity"] == {"driver_id": 2}
    rating = first["features"]["rating"]
    assert (rating["value"], rating["status"], rating["view"]) == (2.25, "PRESENT", "stats")
    assert rating["age_s"] > 0
    missing = second["features"]["rating"]
    assert (missing["value"], missing["status"], missing["age_s"]) == (None, "NOT_FOUND", None)


def test_references_will_do_for_a_service(get):
    code, out, _ = get("stats:trips,stats:rating", "driver_id=2", "--full-feature-names", "--json")

    assert code == 0
    assert list(json.loads(out)[0]["features"]) == ["stats__trips", "stats__rating"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("other", "driver_id=1"), "there is driver_features"),
        (("stats:other", "driver_id=1"), "no feature 'other'"),
        (("driver_features",), "also needs driver_id"),
        (("driver_features", "driver_id=x"), "'x' is no INT64"),
        (("driver_features", "rider=1"), "it takes driver_id (INT64)"),
    ],
)
def test_what_cannot_be_asked_is_said_before_asking(get, arguments, words):
    code, _, err = get(*arguments)

    assert code == 2
    assert words in err


def test_nobody_there_is_said_with_the_address(run):
    code, _, err = run("get", "driver_features", "driver_id=1", "--address", "127.0.0.1:1")

    assert code == 2
    assert "127.0.0.1:1: UNAVAILABLE" in err


def test_a_full_disk_is_one_line(gateway):
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [
                *(sys.executable, "-m", "headrace", "features", "list"),
                *("--address", gateway.grpc_address),
            ],
            check=False,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
        )

    assert done.returncode == 1
    assert done.stderr == "headrace features: cannot write: No space left on device\n"


@pytest.mark.parametrize(
    ("flag", "value", "words"),
    [
        ("--address", "", "expected host:port, got ''"),
        ("--address", "somewhere", "expected host:port, got 'somewhere'"),
        ("--timeout-s", "abc", "expected seconds, over 0 to 3600, got 'abc'"),
        ("--timeout-s", "0", "expected seconds, over 0 to 3600, got '0'"),
    ],
)
def test_flags_that_make_no_sense_are_refused(run, capsys, flag, value, words):
    with pytest.raises(SystemExit) as refused:
        run("list", flag, value)

    assert refused.value.code == 2
    assert f"argument {flag}: {words}" in capsys.readouterr().err


def test_the_environment_says_what_flags_do_not(run, gateway, feature_repo, monkeypatch):
    monkeypatch.setenv("HEADRACE_ADDRESS", "127.0.0.1:1")
    monkeypatch.setenv("HEADRACE_FEATURE_REPO", str(feature_repo))

    assert "--address 127.0.0.1:1: UNAVAILABLE" in run("list")[2]
    assert run("list", "--address", gateway.grpc_address)[0] == 0
    assert run("check")[0] == 0
    monkeypatch.setenv("HEADRACE_TIMEOUT_S", "abc")
    assert "--timeout-s (or HEADRACE_TIMEOUT_S)" in run("list")[2]


def test_a_feature_repository_that_is_not_named_is_asked_for(run, tmp_path):
    for arguments in (["check"], ["skew", "--log", str(tmp_path)]):
        code, _, err = run(*arguments)

        assert code == 2
        assert "--feature-repo (or HEADRACE_FEATURE_REPO)" in err


def test_the_services_are_listed(run, gateway):
    code, out, _ = run("list", "--address", gateway.grpc_address, "--json")

    assert code == 0
    assert json.loads(out) == [{"name": "driver_features", "reason": ""}]


def test_a_store_is_looked_at_with_ages_encodings_and_what_is_too_old(run, feature_repo, valkey):
    with Redis(port=valkey.port) as redis:
        written = redis.dbsize()  # four drivers, and what tests of writes have left
    code, out, _ = run("check", "--feature-repo", str(feature_repo), "--json")

    report = json.loads(out)
    assert code == 0
    assert report["services"] == {"driver_features": ""}
    (group,) = report["groups"]
    assert (group["join_keys"], group["hashes"], group["fields"]) == ("driver_id", written, 3)
    assert group["encodings"] == {"listpack": written}
    (view,) = report["views"]
    assert (view["view"], view["hashes"], view["outside_ttl"]) == ("stats", written, 1)
    assert 0 <= view["newest_age_s"] < 3_600 < view["oldest_age_s"]
    assert f"older than its TTL for 1 of {written}" in report["findings"][0]["text"]


def test_old_layouts_and_projects_that_end_alike_are_found(run, feature_repo, valkey):
    old = bytes.fromhex("02000000 09000000 6472697665725f6964 04000000 08000000 e903000000000000")
    other = bytes.fromhex("01000000 02000000 01000000 61 04000000 08000000 e903000000000000")
    with Redis(port=valkey.port) as redis:
        redis.hset(old + b"integration", mapping={"f": 1})
        redis.hset(other + b"disintegration", mapping={"f": 1})
        try:
            code, out, _ = run("check", "--feature-repo", str(feature_repo))
        finally:
            redis.delete(old + b"integration", other + b"disintegration")

    flat = " ".join(out.split())
    assert code == 1
    assert "error: 1 keys were written by Feast 0.38 to 0.43" in flat
    assert "project 'disintegration' ends like 'integration'" in flat


def test_a_store_that_does_not_answer_is_said(run, feature_repo, tmp_path):
    repo = tmp_path / "repo"
    repo.mkdir()
    text = (feature_repo / "feature_store.yaml").read_text()
    before = text.partition("connection_string: ")[2].partition("\n")[0]
    (repo / "feature_store.yaml").write_text(text.replace(before, "127.0.0.1:1"))
    (repo / "registry.db").write_bytes((feature_repo / "registry.db").read_bytes())

    code, _, err = run("check", "--feature-repo", str(repo))

    assert code == 2
    assert "the online store does not answer" in err


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """
    A gateway of another repository: text keys, a service that cannot be served, a store to kill.

    Yields:
        Its address, and what kills its store.
    """
    root, models = tmp_path_factory.mktemp("other"), tmp_path_factory.mktemp("no models")
    with alone("valkey", root) as server:
        (root / "feature_store.yaml").write_text(
            "project: other\nprovider: local\nregistry: registry.db\n"
            f"online_store:\n  type: redis\n  connection_string: 127.0.0.1:{server.port}\n"
            "entity_key_serialization_version: 3\n"
        )
        city = Entity(name="city", join_keys=["city"], value_type=ValueType.STRING)
        source = FileSource(name="unread", path="unread.parquet", timestamp_field="event_timestamp")
        schema = [Field(name="city", dtype=String), Field(name="rain", dtype=Float32)]
        view, off = (
            FeatureView(name=name, entities=[city], schema=schema, source=source, enabled=is_on)
            for name, is_on in (("weather", True), ("off", False))
        )
        store = FeatureStore(repo_path=str(root))
        services = [FeatureService(name=of.name, features=[of]) for of in (view, off)]
        store.apply([city, view, off, *services])
        names = ["Åbo", "Bern", "a,b"]
        frame = pd.DataFrame({"city": names, "rain": 1.5, "event_timestamp": datetime.now(UTC)})
        store.write_to_online_store("weather", df=frame)
        gateway = Gateway(
            load_settings(
                {
                    "model_repository": models,
                    "feature_repo": root,
                    "grpc_address": "127.0.0.1:0",
                    "http_address": "127.0.0.1:0",
                    "feature_timeout_s": 0.5,
                }
            )
        )
        gateway.start()
        yield gateway.grpc_address, server.kill
        assert gateway.stop()


def test_a_service_that_cannot_be_served_is_listed_with_the_reason(run, other):
    code, out, _ = run("list", "--address", other[0])

    assert code == 0
    (line,) = [line for line in out.splitlines() if "│ off" in line]
    assert "UNAVAILABLE" in line
    assert "feature view 'off' is disabled" in line


def test_text_keys_are_typed_as_they_are(run, other):
    code, out, _ = run(
        "get", "weather", 'city=["Åbo","a,b","Basel"]', "--json", "--address", other[0]
    )

    found = [(of["entity"]["city"], of["features"]["rain"]["value"]) for of in json.loads(out)]
    assert code == 0
    assert found == [("Åbo", 1.5), ("a,b", 1.5), ("Basel", None)]


def test_a_long_table_is_cut_and_says_so(run, other):
    cities = ",".join(f"c{i}" for i in range(25))

    code, out, _ = run("get", "weather", f"city={cities}", "--address", other[0])

    assert code == 0
    assert "city c19" in out
    assert "city c20" not in out
    assert "… and 5 more rows; --json shows all" in out


def test_a_store_that_has_failed_is_an_answer_of_its_own(run, other):
    address, kill = other
    kill()

    code, out, err = run("get", "weather", "city=Bern", "--address", address)

    assert (code, out) == (1, "")
    assert err.startswith("headrace features: UNAVAILABLE: ")


def test_a_server_without_features_says_what_it_lacks(run, tmp_path):
    gateway = Gateway(
        load_settings(
            {
                "model_repository": tmp_path,
                "grpc_address": "127.0.0.1:0",
                "http_address": "127.0.0.1:0",
            }
        )
    )
    gateway.start()
    try:
        code, _, err = run("list", "--address", gateway.grpc_address)
    finally:
        assert gateway.stop()

    assert code == 2
    assert "it serves no features; it has no --feature-repo" in err
