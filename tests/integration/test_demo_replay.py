"""The demo's replay, with a real gateway and a real monitor: no sale is lost on a slow machine."""

import time

import grpc
import numpy as np
import pytest
from onnx import helper

from headrace.app import Gateway
from headrace.demo.replay import HOMES_PER_REQUEST, WINDOW_ROWS, Replay
from headrace.demo.sales import Sale, request
from headrace.demo.stack import MODEL
from headrace.monitor_app import MonitorProcess
from headrace.monitoring.profile import build_profile
from headrace.settings import MonitorSettings, load, load_settings
from headrace.v1 import monitor_service_pb2 as pb
from headrace.v1 import monitor_service_pb2_grpc, prediction_service_pb2_grpc

LOOPBACK = {"grpc_address": "127.0.0.1:0", "http_address": "127.0.0.1:0"}
WINDOW_S = 0.1
TIMEOUT_S = 30.0


@pytest.fixture(scope="module")
def models(tmp_path_factory, model_files):
    """A model that takes a home to be worth its area's number."""
    root = tmp_path_factory.mktemp("models")
    model_files.write_model(
        root,
        MODEL,
        [
            helper.make_node("Mul", ["home_id", "nothing"], ["no_home"]),
            helper.make_node("Add", ["area_id", "no_home"], ["area"]),
            helper.make_node("Cast", ["area"], ["price"], to=1),
        ],
        [("home_id", "INT64", ["n", 1]), ("area_id", "INT64", ["n", 1])],
        [("price", "FP32", ["n", 1])],
        constants={"nothing": np.int64(0)},
        config="max_batch_size: 256",
    )
    numbers = np.arange(1_000, dtype=np.float32)
    profile = build_profile({"home_id": numbers, "area_id": numbers}, {"price": numbers})
    (root / MODEL / "1" / "profile.json").write_text(profile.to_json())
    return root


@pytest.fixture
def monitor(models, tmp_path):
    windows = {"window_s": WINDOW_S, "window_rows": WINDOW_ROWS}
    settings = {"model_repository": models, "state_dir": tmp_path / "state", **windows, **LOOPBACK}
    monitor = MonitorProcess(load(MonitorSettings, settings))
    monitor.start()
    yield monitor
    monitor.stop()


@pytest.fixture
def predict(models, monitor):
    settings = {"model_repository": models, "monitor_address": monitor.grpc_address, **LOOPBACK}
    gateway = Gateway(load_settings(settings))
    gateway.start()
    with grpc.insecure_channel(gateway.grpc_address) as channel:
        yield prediction_service_pb2_grpc.PredictionServiceStub(channel).Predict
    gateway.stop()


@pytest.fixture
def stub(monitor):
    with grpc.insecure_channel(monitor.grpc_address) as channel:
        yield monitor_service_pb2_grpc.MonitorServiceStub(channel)


def has_ended(monitor, rows):
    """Say whether so many rows have come, and the window of the last of them has ended."""
    versions = monitor.report()["versions"]
    return bool(versions) and versions[0]["rows"] == rows and versions[0]["open_window"] is None


def homes(count):
    """Homes that sell for twice what they are held to be worth."""
    return [Sale(i, 1 + i % 900, "2014-01-01", 2.0 * (1 + i % 900)) for i in range(count)]


def test_sales_that_come_to_several_windows_are_found_whole(predict, stub, monitor):
    asked = []

    def slowly(message, *, timeout):
        reply = predict(message, timeout=timeout)
        asked.append(len(message.columns[0].values.int64s.values))
        ends_s = time.monotonic() + TIMEOUT_S
        while not has_ended(monitor, sum(asked)):
            assert time.monotonic() < ends_s, "the window of these homes does not end"
            time.sleep(0.02)
        return reply

    finding = Replay(slowly, stub, monitor.http_address).run(homes(2 * HOMES_PER_REQUEST + 1))

    assert len(asked) == 3
    assert finding.sales == 2 * HOMES_PER_REQUEST + 1
    assert finding.error == pytest.approx(0.5)
    assert finding.bias == pytest.approx(-0.5)
    (version,) = monitor.report()["versions"]
    assert len(version["performance"]["windows"]) == 3


def test_outcomes_wait_for_predictions_that_others_overtook(predict, stub, monitor):
    others = pb.PredictionBatch(
        model_name=MODEL,
        model_version=1,
        id_prefix="others",
        request_numbers=[0],
        request_rows=[1_000],
    )
    message = pb.RecordPredictionsRequest(source="others", batches=[others])

    def overtaken(asked, *, timeout):
        reply = predict(asked, timeout=timeout)
        stub.RecordPredictions(iter([message]), timeout=timeout)
        return reply

    sales = homes(HOMES_PER_REQUEST)
    assert Replay(overtaken, stub, monitor.http_address).run(sales).sales == len(sales)


def test_each_replay_finds_its_own_sales(predict, stub, monitor):
    predict(request(homes(WINDOW_ROWS)), timeout=10)  # a caller whose outcomes nobody knows
    replay = Replay(predict, stub, monitor.http_address)
    first, second = replay.run(homes(300)), replay.run(homes(400))
    assert (first.sales, second.sales) == (300, 400)
