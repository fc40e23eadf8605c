"""What training promises: an honest test, and a version that answers as the trained model did."""

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pandas as pd
import pytest
import train
from google.protobuf import text_format
from home_sales import FEATURES, HOME_ATTRIBUTES
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from tritonclient.grpc import model_config_pb2

from headrace.errors import ModelLoadError, StartupError
from headrace.monitoring.profile import ReferenceProfile
from headrace.repository.config import parse_config
from headrace.repository.validate import check_manifest

CONFIG = Path(train.__file__).with_name("config.pbtxt")
FLOATS = st.floats(width=32, allow_nan=True, allow_infinity=False)


@pytest.fixture(scope="session")
def session(exported):
    return onnxruntime.InferenceSession(exported, providers=["CPUExecutionProvider"])


class TestSplit:
    def test_no_sale_of_the_cutoff_or_later_is_trained_on(self, frame):
        cutoff = pd.Timestamp("2012-07-02", tz="UTC")
        past, future = train.split(frame, cutoff)
        assert past["sale_date"].max() < cutoff == future["sale_date"].min()
        assert len(past) + len(future) == len(frame)
        assert past.index.intersection(future.index).empty

    @pytest.mark.parametrize("day", ["2009-12-31", "2017-01-01"])
    def test_a_cutoff_without_sales_on_both_sides_is_refused(self, frame, day):
        with pytest.raises(StartupError, match="2010-01-02 to 2016"):
            train.split(frame, pd.Timestamp(day, tz="UTC"))

    def test_settings_are_chosen_without_the_test(self, frame, cutoff):
        past, _ = train.split(frame, cutoff)
        weak = {"max_iter": 2, "learning_rate": 0.1, "max_leaf_nodes": 3}
        strong = {"max_iter": 20, "learning_rate": 0.3, "max_leaf_nodes": 15}
        chosen, error = train.choose_settings(past, cutoff, [weak, strong])
        assert chosen == strong
        earlier, later = train.split(past, cutoff - pd.Timedelta(days=train.VALIDATION_DAYS))
        prices = train.predict(train.fit(earlier, strong), train.matrix(later))
        expected = np.median(np.abs(prices / later["price_usd"] - 1))
        assert error == pytest.approx(expected)


class TestExport:
    @given(arrays.arrays(np.float32, (8, len(FEATURES)), elements=FLOATS))
    @settings(deadline=None, max_examples=200)
    def test_onnx_answers_as_the_library_on_any_numbers(self, model, session, features):
        assert train.check_parity(model, session, features) <= train.PARITY_RTOL

    def test_onnx_answers_as_the_library_with_any_value_missing(self, model, session, frame):
        features = train.matrix(frame)[::20]
        is_missing = np.random.default_rng(0).random(features.shape) < 0.3
        complete = train.predict(model, features)
        features[is_missing] = np.nan
        assert train.check_parity(model, session, features) <= train.PARITY_RTOL
        assert not np.allclose(train.predict(model, features), complete)

    def test_an_export_that_differs_is_refused(self, frame, session, cutoff):
        past, _ = train.split(frame, cutoff)
        other = train.fit(past, {"max_iter": 5})
        with pytest.raises(ModelLoadError, match="off by"):
            train.check_parity(other, session, train.matrix(frame)[:100])

    def test_training_again_gives_the_same_file(self, frame, cutoff, exported, small):
        past, _ = train.split(frame, cutoff)
        assert train.export_onnx(train.fit(past, small)) == exported


class TestVersion:
    def test_the_manifest_lists_every_file_with_its_digest(self, trained):
        folder, _ = trained
        check_manifest(folder)
        listed = json.loads((folder / "manifest.json").read_text())["files"]
        assert set(listed) == {"model.onnx", "golden.npz", "card.md", "profile.json"}

    def test_golden_answers_are_those_of_the_model_in_the_folder(self, trained):
        folder, _ = trained
        session = onnxruntime.InferenceSession(folder / "model.onnx")
        with np.load(folder / "golden.npz", allow_pickle=False) as golden:
            features, price = golden["in:features"], golden["out:price"]
        np.testing.assert_allclose(
            session.run(["price"], {"features": features})[0], price, rtol=1e-6
        )
        assert price.shape == (len(features), 1)
        # Each column is missing once, so that the branch of a missing value is checked too.
        assert np.isnan(features[train.GOLDEN_ROWS :]).sum(axis=0).min() >= 1

    def test_the_profile_has_the_columns_that_the_monitor_will_see(self, trained):
        folder, report = trained
        profile = ReferenceProfile.from_json((folder / "profile.json").read_text())
        assert tuple(profile.features) == train.FEATURES
        assert profile.prediction == "price"
        assert profile.features["waterfront"].rows < report.training_sales
        assert 0.05 < profile.error < 0.2

    def test_the_config_agrees_with_the_model(self, trained):
        folder, _ = trained
        message = text_format.Parse(CONFIG.read_text(), model_config_pb2.ModelConfig())
        graph = onnx.load(folder / "model.onnx").graph
        for declared, actual in ((message.input, graph.input), (message.output, graph.output)):
            assert [tensor.name for tensor in declared] == [tensor.name for tensor in actual]
            (tensor,), (value,) = declared, actual
            rows, *dims = value.type.tensor_type.shape.dim
            assert not rows.HasField("dim_value")
            assert list(tensor.dims) == [dim.dim_value for dim in dims]
            assert tensor.data_type == model_config_pb2.TYPE_FP32
            assert value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT

    def test_the_config_asks_for_the_feature_service_and_knows_no_idle_setting(self):
        config = parse_config(CONFIG.read_text(), "home_valuation")
        assert config.feature_service == "home_valuation"
        assert config.missing_features == "nan"
        assert config.max_batch_size == 256
        assert config.without_effect == ()

    def test_a_version_is_replaced_as_a_whole(self, tmp_path):
        folder = tmp_path / "1"
        train.write_version(folder, {"model.onnx": b"old", "extra": b"1"})
        train.write_version(folder, {"model.onnx": b"new"})
        check_manifest(folder)
        assert {path.name for path in folder.iterdir()} == {"model.onnx", "manifest.json"}
        assert (folder / "model.onnx").read_bytes() == b"new"
        assert list(tmp_path.iterdir()) == [folder]

    def test_a_failed_write_leaves_the_old_version_and_nothing_else(self, tmp_path):
        folder = tmp_path / "1"
        train.write_version(folder, {"model.onnx": b"old"})
        with pytest.raises(FileNotFoundError):
            train.write_version(folder, {"model.onnx": b"new", "no/such/folder": b""})
        check_manifest(folder)
        assert (folder / "model.onnx").read_bytes() == b"old"
        assert list(tmp_path.iterdir()) == [folder]


class TestReport:
    def test_the_model_beats_the_baseline_on_the_first_sales_it_never_saw(self, trained):
        _, report = trained
        first = report.years[0]
        assert first.year == 2012
        assert first.model < 0.13
        assert first.model < 0.8 * first.baseline

    def test_the_test_counts_every_sale_after_the_cutoff_once(self, trained, sales, cutoff):
        _, report = trained
        assert sum(year.sales for year in report.years) == (sales["sale_date"] >= cutoff).sum()
        assert report.training_sales == (sales["sale_date"] < cutoff).sum()

    def test_the_decay_shows_year_by_year(self, trained):
        _, report = trained
        errors = [year.model for year in report.years]
        assert errors == sorted(errors)
        assert errors[-1] > 2 * errors[0]
        assert report.years[-1].bias < -0.2

    def test_a_market_that_stands_still_makes_it_worse_in_the_end(self, trained):
        _, report = trained
        assert report.years[-1].frozen > report.years[-1].model

    def test_the_card_has_the_figures_of_the_report(self, trained):
        folder, report = trained
        card = (folder / "card.md").read_text()
        assert train.year_table(report.years) in card
        assert f"{report.years[0].model:.1%}" in card


class TestCommand:
    def test_a_cutoff_that_leaves_nothing_to_test_fails_with_one_line(self, tmp_path, capsys):
        arguments = ["--cutoff", "2030-01-01", "--model-repository", str(tmp_path)]
        assert train.main(arguments) == 1
        error = capsys.readouterr().err
        assert error.startswith("train: ")
        assert error.count("\n") == 1
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("arguments", [["--version", "0"], ["--cutoff", "soon"]])
    def test_a_wrong_argument_is_refused(self, arguments):
        with pytest.raises(SystemExit) as caught:
            train.main(arguments)
        assert caught.value.code == 2


def test_every_column_is_a_feature_of_one_of_the_two_views():
    assert len(FEATURES) == len(set(FEATURES)) == 16
    assert FEATURES[: len(HOME_ATTRIBUTES)] == HOME_ATTRIBUTES
