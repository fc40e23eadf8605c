"""Which version answers, and what is said when none does."""

import pytest

from headrace.catalog import Catalog
from headrace.errors import (
    InvalidRequest,
    ModelNotFound,
    ModelUnavailable,
    ModelVersionNotFound,
)
from headrace.repository.state import ModelEntry

CATALOG = Catalog(
    [
        ModelEntry("m", None, {2: "two", 10: "ten"}, {11: "corrupt"}),
        ModelEntry("broken", None, {}, {0: "unparsable"}),
    ]
)


def test_without_a_version_the_highest_number_answers():
    assert CATALOG.find("m", "") == "ten"


@pytest.mark.parametrize(("version", "served"), [("2", "two"), ("10", "ten"), ("0002", "two")])
def test_a_version_is_a_number(version, served):
    assert CATALOG.find("m", version) == served


@pytest.mark.parametrize(
    ("name", "version", "error"),
    [
        ("nobody", "", ModelNotFound),
        ("m", "3", ModelVersionNotFound),
        ("m", "11", ModelUnavailable),
        ("broken", "", ModelUnavailable),
        ("m", "0", InvalidRequest),
        ("m", "-1", InvalidRequest),
        ("m", "two", InvalidRequest),
        ("m", "\u0662", InvalidRequest),  # a digit, but not ours
        ("m", "9" * 5_000, InvalidRequest),
    ],
)
def test_a_version_that_does_not_serve_says_why(name, version, error):
    with pytest.raises(error) as refused:
        CATALOG.find(name, version)

    assert "corrupt" not in str(refused.value)
    assert len(str(refused.value)) < 300


def test_ready_is_what_can_be_found():
    assert CATALOG.is_ready("m")
    assert CATALOG.is_ready("m", "2")
    assert not CATALOG.is_ready("m", "11")
    assert not CATALOG.is_ready("broken")
    assert not CATALOG.is_ready("nobody")


def test_a_version_is_the_sole_one_only_where_no_other_serves():
    broken = ModelEntry("broken", None, {}, {0: "unparsable"})

    assert Catalog([ModelEntry("m", None, {2: "two"}, {3: "corrupt"}), broken]).sole == "two"
    assert CATALOG.sole is None
    assert Catalog([broken]).sole is None


def test_what_serves_is_found_under_its_exact_names_alone():
    assert CATALOG.serving("m", "10") == CATALOG.serving("m", "") == "ten"
    assert CATALOG.serving("m", "0002") is CATALOG.serving("nobody", "") is None
