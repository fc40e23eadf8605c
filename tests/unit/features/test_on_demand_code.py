"""Which modules may define on-demand features."""

import sys

import pytest
import ride_views

from headrace.errors import FeaturePlanError, StartupError
from headrace.features.on_demand_code import load_on_demand_code


@pytest.fixture(autouse=True)
def path(monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    known = set(sys.modules)
    yield
    for name in set(sys.modules) - known:
        del sys.modules[name]


def test_without_modules_nothing_is_imported(tmp_path):
    before = list(sys.path)

    assert load_on_demand_code([], tmp_path) == {}
    assert sys.path == before


def test_a_modules_views_are_found_by_name(tmp_path):
    code = load_on_demand_code(["ride_views"], tmp_path)

    assert sorted(code) == ["halved", "known", "metres", "one_by_one", "quote"]


def test_modules_of_the_feature_repository_are_found_and_hide_no_others(tmp_path):
    (tmp_path / "own_views_of_a_test.py").write_text("from ride_views import halved\n")
    (tmp_path / "ride_views.py").write_text("raise SystemError('the wrong one')\n")

    assert list(load_on_demand_code(["own_views_of_a_test"], tmp_path)) == ["halved"]


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        ("../escape", r"'\.\./escape' is no module's name"),
        ("os.path;", "is no module's name"),
        ("no_such_module_anywhere", "cannot be imported: ModuleNotFoundError"),
        ("json", "'json' defines no on-demand feature view"),
        ("broken_views", "cannot be imported: ZeroDivisionError: division by zero"),
        ("rival_views", "'halved' is defined twice"),
    ],
)
def test_a_module_that_cannot_be_used_is_named(tmp_path, module, reason):
    (tmp_path / "broken_views.py").write_text("1 / 0\n")
    (tmp_path / "rival_views.py").write_text(
        "import copy, ride_views\nh = copy.copy(ride_views.halved)\n"
    )

    with pytest.raises(StartupError, match=reason):
        load_on_demand_code(["ride_views", module], tmp_path)


def test_a_result_of_the_wrong_length_is_refused(monkeypatch, tmp_path):
    transformation = ride_views.metres.feature_transformation
    monkeypatch.setattr(transformation, "udf", lambda _: {"metres": [1.0]})
    code = load_on_demand_code(["ride_views"], tmp_path)["metres"]

    with pytest.raises(ValueError, match="1 values of 'metres' for 2 rows"):
        code.run({"distance": [1.0, 2.0]}, 2)


def test_a_mode_that_cannot_be_run_is_refused(tmp_path):
    code = load_on_demand_code(["ride_views"], tmp_path)["metres"]

    with pytest.raises(FeaturePlanError, match="mode 'substrait'"):
        code.check("substrait", "")
