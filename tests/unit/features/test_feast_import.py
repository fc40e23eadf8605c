"""Feast is imported without its own type checks, and whatever else is checked stays checked."""

import subprocess
import sys

import pytest
import typeguard

from headrace.features import feast_import
from headrace.features.feast_import import import_feast


@pytest.fixture
def run(tmp_path):
    """Runs a script in an interpreter that has imported nothing yet; returns what it prints."""

    def run(script, *arguments):
        file = tmp_path / "script.py"  # typeguard wants to read it
        file.write_text(script)
        command = [sys.executable, "-W", "ignore", str(file), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout.split()

    return run


CHECKS = """
import sys
import typeguard
before = typeguard.typechecked
if sys.argv[1] == "plainly":
    import feast
from headrace.features.feast_import import import_feast
import_feast()
import feast
from feast.types import Float32

def is_checked(call):
    try:
        call()
    except typeguard.TypeCheckError:
        return True
    return False

@typeguard.typechecked
def ours(value: int) -> None: ...

print(typeguard.typechecked is before)
print(is_checked(lambda: ours("text")))
print(is_checked(lambda: feast.Field(name=5, dtype=Float32)))
"""


def test_feasts_checks_are_left_out_and_typeguard_is_as_it_was(run):
    assert run(CHECKS, "by us") == ["True", "True", "False"]


def test_a_feast_that_somebody_has_imported_stays_as_it_is(run):
    assert run(CHECKS, "plainly") == ["True", "True", "True"]


REPOSITORY = """
import sys, time
from datetime import datetime, timedelta, UTC
from pathlib import Path
from headrace.features.feast_import import import_feast
import_feast()
import numpy as np, pandas as pd
from feast import Entity, FeatureService, FeatureStore, FeatureView, Field, FileSource, ValueType
from feast.types import Float32, Int64
from headrace.features.repo import open_feature_repo

path = Path(sys.argv[1])
(path / "feature_store.yaml").write_text(
    "project: demo\\nprovider: local\\nregistry: registry.db\\n"
    "online_store: {type: sqlite, path: online.db}\\nentity_key_serialization_version: 3\\n"
)
driver = Entity(name="driver", join_keys=["driver_id"], value_type=ValueType.INT64)
stats = FeatureView(
    name="stats",
    entities=[driver],
    ttl=timedelta(0),
    schema=[Field(name="driver_id", dtype=Int64), Field(name="rating", dtype=Float32)],
    source=FileSource(name="unread", path="unread.parquet", timestamp_field="event_timestamp"),
)
theirs = FeatureStore(repo_path=str(path))
theirs.apply([driver, stats, FeatureService(name="rated", features=[stats])])
rows = {"driver_id": [1], "rating": [4.5], "event_timestamp": [datetime.now(UTC)]}
theirs.write_to_online_store("stats", df=pd.DataFrame(rows))
repo = open_feature_repo(path)
store = repo.online_store()
plan = repo.compile("rated")
found = store.read(plan, {"driver_id": np.array([1])}, now_s=time.time(), timeout_s=60)
store.close()
print(found.values[0].tolist())
print(theirs.get_online_features(["stats:rating"], [{"driver_id": 1}]).to_dict()["rating"])
"""


def test_such_a_feast_defines_writes_and_reads_features(run, tmp_path):
    assert run(REPOSITORY, str(tmp_path))[-2:] == ["[4.5]", "[4.5]"]


def typed(decorate):
    def function(value: int) -> int:
        return value

    return decorate(function)


@pytest.mark.parametrize("how", ["plain", "with options"])
def test_what_another_package_decorates_meanwhile_is_checked(how):
    with feast_import._unchecked("feast"):
        decorate = typeguard.typechecked
        if how == "with options":
            decorate = decorate(collection_check_strategy=None)
        own = typed(decorate)
    later = typed(decorate)  # it may have kept the decorator

    for function in (own, later):
        assert function(1) == 1
        with pytest.raises(typeguard.TypeCheckError):
            function("text")


def test_an_import_that_fails_leaves_typeguard_as_it_was():
    before = typeguard.typechecked
    with pytest.raises(ImportError, match="no such"), feast_import._unchecked("feast"):
        raise ImportError("no such module")
    assert typeguard.typechecked is before


def test_without_typeguard_nothing_is_changed(monkeypatch):
    monkeypatch.setitem(sys.modules, "typeguard", None)
    with feast_import._unchecked("feast"):
        ran = True
    assert ran


def test_an_import_that_failed_is_tried_again(monkeypatch):
    tried = []

    def fail(name):
        tried.append(name)
        raise ImportError(name)

    monkeypatch.delitem(sys.modules, "feast", raising=False)
    monkeypatch.setattr(feast_import.importlib, "import_module", fail)
    for _ in range(2):
        with pytest.raises(ImportError, match="feast"):
            import_feast()
    assert tried == ["feast", "feast"]
