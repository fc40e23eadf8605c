"""The demo's scripts, as modules, and one model trained small for all these tests."""

import sys
from pathlib import Path

import pandas as pd
import pytest

ROOT = Path(__file__).resolve().parents[3]
# They are run as scripts, which have their own folder on the path.
sys.path.insert(0, str(ROOT / "model_repository" / "home_valuation"))

import home_sales  # noqa: E402
import train  # noqa: E402


@pytest.fixture(scope="session")
def small():
    """Settings that fit in half a second, and do nearly as well."""
    return {"max_iter": 60, "learning_rate": 0.2, "max_leaf_nodes": 15, "min_samples_leaf": 20}


@pytest.fixture(scope="session")
def cutoff():
    return pd.Timestamp(home_sales.DEFAULT_CUTOFF, tz="UTC")


@pytest.fixture(scope="session")
def sales():
    return home_sales.read_sales()


@pytest.fixture(scope="session")
def attributes(sales):
    return home_sales.home_attributes(sales)


@pytest.fixture(scope="session")
def market(sales):
    return home_sales.area_market(sales)


@pytest.fixture(scope="session")
def frame(sales, attributes, market):
    return home_sales.features_at_sale(sales, attributes, market)


@pytest.fixture(scope="session")
def model(frame, cutoff, small):
    past, _ = train.split(frame, cutoff)
    return train.fit(past, small)


@pytest.fixture(scope="session")
def exported(model):
    return train.export_onnx(model)


@pytest.fixture(scope="session")
def trained(cutoff, small, tmp_path_factory):
    """A version's folder, and the report of the run that wrote it."""
    folder = tmp_path_factory.mktemp("models") / "home_valuation" / "1"
    return folder, train.train_version(cutoff, folder, [small])
