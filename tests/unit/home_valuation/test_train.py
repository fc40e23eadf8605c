"""What training promises: an honest test, and a version that answers as the trained model did."""

import io
import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pandas as pd
import pytest
import train
from google.protobuf import text_format
from headrace.errors import ModelLoadError, StartupError
from headrace.repository.config import parse_config
from headrace.repository.validate import check_manifest
from home_sales import FEATURES, HOME_ATTRIBUTES
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from tritonclient.grpc import model_config_pb2

CONFIG = Path(train.__file__).with_name("config.pbtxt")
FLOATS = st.floats(width=32, allow_nan=True, allow_infinity=False)


@pytest.fixture(scope="session")
def session(exported):
    return onnxruntime.InferenceSession(exported, providers=["CPUExecutionProvider"])


class TestSplit:
    def test_no_sale_of_the_cutoff_or_later_is_trained_on(self, frame, cutoff):
        past, future = train.split(frame, cutoff)
        assert past["sale_date"].max() < cutoff <= future["sale_date"].min()
        assert len(past) + len(future) == len(frame)
        assert past.index.intersection(future.index).empty

    @pytest.mark.parametrize("day", ["2009-12-31", "2017-01-01"])
    def test_a_cutoff_without_sales_on_both_sides_is_refused(self, frame, day):
        with pytest.raises(StartupError, match="2010-01-03 to 2016"):
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

    def test_a_value_on_a_threshold_goes_the_same_way(self, model, session, exported, frame):
        node = next(n for n in onnx.load_from_string(exported).graph.node if "Tree" in n.op_type)
        attributes = {a.name: a for a in node.attribute}
        columns = np.array(attributes["nodes_featureids"].ints)
        is_split = np.array([mode != b"LEAF" for mode in attributes["nodes_modes"].strings])
        thresholds = np.array(attributes["nodes_values"].floats, np.float32)
        rows = np.repeat(train.matrix(frame)[-1:], is_split.sum(), axis=0)
        rows[np.arange(len(rows)), columns[is_split]] = thresholds[is_split]
        steps = [rows.copy() for _ in range(2)]
        for step, toward in zip(steps, (-np.inf, np.inf)):
            moved = np.nextafter(thresholds[is_split], np.float32(toward))
            step[np.arange(len(rows)), columns[is_split]] = moved
        for probe in (rows, *steps):
            seen = np.isin(
                probe[np.arange(len(rows)), columns[is_split]], train.matrix(frame).ravel()
            )
            assert train.check_parity(model, session, probe[seen]) <= train.PARITY_RTOL

    def test_an_export_that_differs_is_refused(self, frame, session, cutoff):
        past, _ = train.split(frame, cutoff)
        other = train.fit(past, {"max_iter": 5})
        with pytest.raises(ModelLoadError, match="off by"):
            train.check_parity(other, session, train.matrix(frame)[:100])

    def test_training_again_gives_the_same_file(self, frame, cutoff, exported):
        past, _ = train.split(frame, cutoff)
        from conftest import SMALL

        assert train.export_onnx(train.fit(past, SMALL)) == exported
