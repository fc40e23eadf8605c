"""A gateway and its monitor: what was predicted arrives, is judged, and survives a restart."""

import json
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
from grpc_health.v1 import health_pb2, health_pb2_grpc

from headrace.app import Gateway
from headrace.errors import StartupError
from headrace.monitor_app import MonitorProcess
from headrace.monitoring.profile import build_profile
from headrace.monitoring.state import MonitorState
from headrace.settings import MonitorSettings, load, load_settings
from headrace.v1 import monitor_service_pb2 as pb
from headrace.v1 import monitor_service_pb2_grpc as pb_grpc

LOOPBACK = {"grpc_address": "127.0.0.1:0", "http_address": "127.0.0.1:0"}


def soon(find, limit_s=15):
    """Return what `find` finds, once it finds something."""
    deadline_s = time.monotonic() + limit_s
    while not (found := find()):
        assert time.monotonic() < deadline_s, "it never came"
        time.sleep(0.02)
    return found


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Return a function that starts a monitor or a gateway; all are stopped."""
    running = []

    def start(kind, settings):
        process = kind(settings)
        process.start()
        running.append(process)
        return process

    yield start
    for process in running:
        process.stop()


def monitor_settings(model_repository, state_dir, **more):
    return load(
        MonitorSettings,
        {
            "model_repository": model_repository,
            "state_dir": state_dir,
            "window_s": 0.2,
            "window_rows": 50,
            **LOOPBACK,
            **more,
        },
    )


def serve_settings(model_repository, monitor, **more):
    address = monitor.grpc_address
    return load_settings(
        {"model_repository": model_repository, "monitor_address": address, **LOOPBACK, **more}
    )


@pytest.fixture(scope="module")
def monitor(start, model_repository, tmp_path_factory):
    state_dir = tmp_path_factory.mktemp("state")
    return start(MonitorProcess, monitor_settings(model_repository, state_dir))


@pytest.fixture(scope="module")
def gateway(start, model_repository, feature_repo, monitor):
    return start(Gateway, serve_settings(model_repository, monitor, feature_repo=feature_repo))


@pytest.fixture(scope="module")
def infer(gateway):
    with triton.InferenceServerClient(gateway.grpc_address) as client:
        yield partial(call, client)


@pytest.fixture
def one_model(tmp_path, model_repository):
    """A repository of its own, whose model echoes two numbers."""
    root = tmp_path / "models"
    shutil.copytree(model_repository / "echo_fp32", root / "echo_fp32")
    return root


def call(client, model, **inputs):
    tensors = []
    for name, values in inputs.items():
        tensor = triton.InferInput(name, values.shape, triton.np_to_triton_dtype(values.dtype))
        tensor.set_data_from_numpy(values)
        tensors.append(tensor)
    reply = client.infer(model, tensors)
    return reply, reply.get_response().parameters["prediction_id"].string_param


@pytest.fixture
def stub(monitor):
    options = [("grpc.enable_http_proxy", 0)]
    with grpc.insecure_channel(monitor.grpc_address, options=options) as channel:
        yield pb_grpc.MonitorServiceStub(channel)


def version_of(process, model):
    return next((v for v in process.report()["versions"] if v["model"] == model), None)


def ended(process, model, count=1):
    found = version_of(process, model)
    return found if found and len(found["windows"]) >= count else None


def column(version, name):
    return next(of for of in version["features"] if of["name"] == name)


def test_features_arrive_under_their_names_as_the_model_saw_them(infer, monitor):
    drivers = np.array([1, 2, 3, 4, 5] * 20, np.int64).reshape(-1, 1)
    distances = np.ones((100, 1), np.float32)
    for part in range(0, 100, 10):
        infer(
            "driver_trip",
            driver_id=drivers[part : part + 10],
            distance=distances[part : part + 10],
        )

    version = soon(lambda: ended(monitor, "driver_trip"))

    rating, trips, distance = (
        column(version, n)["current"] for n in ("rating", "trips", "distance")
    )
    assert rating["rows"] == trips["rows"] == distance["rows"] == 100
    assert rating["missing"] == pytest.approx(0.6)  # 3 has none, 4's is too old, 5 is unknown
    assert trips["missing"] == pytest.approx(0.4)
    assert rating["stale"] == trips["stale"] == pytest.approx(0.2)
    assert distance["missing"] == 0


def test_a_default_does_not_hide_that_the_feature_was_missing(infer, monitor):
    infer("driver_default", driver_id=np.array([[1], [5]] * 25, np.int64)[:16])
    for _ in range(4):
        infer("driver_default", driver_id=np.array([[1], [5]] * 8, np.int64))

    version = soon(lambda: ended(monitor, "driver_default"))
    assert column(version, "rating")["current"]["missing"] == pytest.approx(0.5)


def test_what_has_no_fixed_columns_is_answered_and_not_streamed(infer, monitor):
    infer("whole", x=np.ones((2, 3), np.float32))
    infer("echo_fp32", x=np.ones((8, 2), np.float32))
    soon(lambda: version_of(monitor, "echo_fp32"))
    assert version_of(monitor, "whole") is None


@pytest.mark.parametrize("datatype", ["fp64", "int64", "int8", "bool", "bytes", "fp16"])
def test_every_datatype_is_counted(infer, monitor, datatype):
    values = np.array([["1", "0"]] * 8).astype(
        {"bytes": np.object_, "bool": np.object_, "fp16": np.float16}.get(
            datatype, datatype.replace("fp", "float")
        )
    )
    if datatype == "bool":
        values = values == "1"
    infer(f"echo_{datatype}", x=values)
    version = soon(lambda: version_of(monitor, f"echo_{datatype}"))
    assert version["rows"] == 8
    assert version["open_window"]["rows"] == 8


def test_outcomes_find_their_predictions(infer, monitor, stub):
    reply, prediction_id = infer("scores", x=np.ones((4, 4), np.float32))
    soon(lambda: version_of(monitor, "scores"))
    outcomes = [
        pb.Outcome(prediction_id=f"{prediction_id}/{row}", value=2 * value)
        for row, value in enumerate(reply.as_numpy("y")[:, 0])
    ]

    first = stub.ReportOutcomes(pb.ReportOutcomesRequest(outcomes=outcomes), timeout=10)
    again = stub.ReportOutcomes(pb.ReportOutcomesRequest(outcomes=outcomes), timeout=10)
    unknown = [pb.Outcome(prediction_id="nobody"), pb.Outcome(prediction_id=f"{prediction_id}/4")]
    none = stub.ReportOutcomes(pb.ReportOutcomesRequest(outcomes=unknown), timeout=10)

    assert (first.joined_count, again.duplicate_count, none.unknown_count) == (4, 4, 2)
    performance = version_of(monitor, "scores")["performance"]["open_window"]
    assert (performance["kept"], performance["labelled"]) == (4, 4)
    assert performance["error"] == pytest.approx(0.5)


@pytest.fixture
def webhook():
    """A web server that keeps what it is sent: (url, events)."""
    events = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            events.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}/", events
    server.shutdown()
    thread.join()
    server.server_close()


def test_drift_is_reported_once_and_kept_over_a_restart(start, one_model, tmp_path, webhook):
    url, events = webhook
    rng = np.random.default_rng(0)
    training = rng.normal(0, 1, (5_000, 2)).astype(np.float32)
    profile = build_profile({f"x[{i}]": training[:, i] for i in range(2)}, {"y[0]": training[:, 0]})
    (one_model / "echo_fp32" / "1" / "profile.json").write_text(profile.to_json())
    settings = monitor_settings(one_model, tmp_path / "state", window_rows=600, webhook_url=url)
    monitor = start(MonitorProcess, settings)
    gateway = start(Gateway, serve_settings(one_model, monitor))
    with triton.InferenceServerClient(gateway.grpc_address) as client:
        for window in range(2):
            for _ in range(80):
                call(client, "echo_fp32", x=rng.normal(1, 1, (8, 2)).astype(np.float32))
            soon(lambda window=window: ended(monitor, "echo_fp32", window + 1))
    version = version_of(monitor, "echo_fp32")
    alarms = {(a["signal"], a["column"]) for a in version["alarms"]}
    assert alarms == {("drift", "x[0]"), ("drift", "x[1]"), ("prediction_drift", "y[0]")}
    assert len(version["incidents"]) == 3
    soon(lambda: len(events) == 3)
    assert {event["type"] for event in events} == {"io.headrace.drift.detected"}
    assert {event["data"]["column"] for event in events} == {"x[0]", "x[1]", "y[0]"}

    monitor.stop()
    restarted = version_of(start(MonitorProcess, settings), "echo_fp32")
    for key in ("verdict", "alarms", "windows", "incidents"):
        assert restarted[key] == version[key]
    assert len(events) == 3, "told once"


def test_a_notice_waits_out_its_receiver_and_restarts_of_the_monitor(start, tmp_path, webhook):
    url, events = webhook
    with socket.create_server(("127.0.0.1", 0)) as unheard:
        nobody = f"http://127.0.0.1:{unheard.getsockname()[1]}/"
    state = MonitorState(tmp_path / "state")
    state.add_notice(json.dumps({"id": "homes/2/7/opened"}))
    state.close()

    def restarted(webhook_url):
        settings = monitor_settings(tmp_path, tmp_path / "state", webhook_url=webhook_url)
        return start(MonitorProcess, settings)

    for _ in range(2):
        monitor = restarted(nobody)
        time.sleep(0.3)
        monitor.stop()
    monitor = restarted(url)
    soon(lambda: events)
    monitor.stop()
    monitor = restarted(url)
    time.sleep(0.3)
    monitor.stop()
    assert events == [{"id": "homes/2/7/opened"}], "told, and told once"


def test_a_restart_of_the_monitor_loses_nothing(start, one_model, tmp_path):
    settings = partial(monitor_settings, one_model, tmp_path / "state")
    monitor = start(MonitorProcess, settings())
    gateway = start(Gateway, serve_settings(one_model, monitor))
    with triton.InferenceServerClient(gateway.grpc_address) as client:
        for _ in range(10):
            call(client, "echo_fp32", x=np.ones((1, 2), np.float32))
        soon(lambda: version_of(monitor, "echo_fp32"))
        monitor.stop()
        for _ in range(10):
            call(client, "echo_fp32", x=np.ones((1, 2), np.float32))
    restarted = start(MonitorProcess, settings(grpc_address=monitor.grpc_address))

    soon(lambda: version_of(restarted, "echo_fp32")["open_window"]["rows"] == 20)
    assert restarted.report()["rows_lost"] == 0
    soon(lambda: gateway.metrics.stream.rows_sent == 20)


def message(source, rows_sent_before, *, rows=3, rows_dropped=0):
    batch = pb.PredictionBatch(
        model_name=source,
        model_version=1,
        id_prefix=source,
        request_numbers=[rows_sent_before],
        request_rows=[rows],
    )
    return pb.RecordPredictionsRequest(
        source=source,
        rows_sent_before=rows_sent_before,
        rows_dropped=rows_dropped,
        batches=[batch],
    )


def test_a_message_that_is_sent_again_is_counted_once(stub, monitor):
    for _ in range(3):
        stub.RecordPredictions(iter([message("again", 0), message("again", 3)]), timeout=10)
    assert version_of(monitor, "again")["rows"] == 6


def test_rows_that_never_came_are_counted(stub, monitor):
    before = monitor.report()["rows_lost"]
    stub.RecordPredictions(
        iter([message("gaps", 0), message("gaps", 13), message("gaps", 16, rows_dropped=7)]),
        timeout=10,
    )
    soon(lambda: version_of(monitor, "gaps")["rows"] == 9)
    assert monitor.report()["rows_lost"] - before == 10 + 7
    assert version_of(monitor, "gaps")["open_window"]["degraded"]


def test_what_was_sent_to_another_monitor_before_is_not_lost_here(stub, monitor):
    before = monitor.report()["rows_lost"]
    stub.RecordPredictions(iter([message("moved", 1_000, rows_dropped=50)]), timeout=10)
    soon(lambda: version_of(monitor, "moved"))
    assert monitor.report()["rows_lost"] == before


@pytest.mark.parametrize(
    ("request_", "complaint"),
    [
        (pb.RecordPredictionsRequest(), "source"),
        (pb.RecordPredictionsRequest(source="x" * 65), "64 characters"),
        (pb.RecordPredictionsRequest(source="s", rows_sent_before=2**63), "range"),
        (
            pb.RecordPredictionsRequest(source="s", batches=[pb.PredictionBatch(model_name="m")]),
            "rows",
        ),
    ],
)
def test_a_message_that_makes_no_sense_ends_its_stream_and_nothing_else(
    stub, monitor, request_, complaint
):
    with pytest.raises(grpc.RpcError) as refused:
        stub.RecordPredictions(iter([request_]), timeout=10)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert complaint in refused.value.details()
    assert version_of(monitor, "m") is None


@pytest.mark.parametrize(
    ("outcomes", "complaint"),
    [
        ([], "0 outcomes"),
        ([pb.Outcome(prediction_id="x", value=float("nan"))], "not finite"),
        ([pb.Outcome(prediction_id="x")] * 10_001, "10001 outcomes"),
    ],
)
def test_outcomes_that_make_no_sense_are_refused(stub, outcomes, complaint):
    with pytest.raises(grpc.RpcError) as refused:
        stub.ReportOutcomes(pb.ReportOutcomesRequest(outcomes=outcomes), timeout=10)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert complaint in refused.value.details()


def fetch(process, path):
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"http://{process.http_address}{path}", timeout=10) as page:
        return page.headers, page.read().decode()


def test_the_report_is_served_as_page_and_as_json_with_metrics_beside_it(infer, monitor):
    infer("pair", a=np.ones((2, 2), np.float32), b=np.ones((2, 2), np.float32))
    soon(lambda: version_of(monitor, "pair"))
    headers, page = fetch(monitor, "/")
    assert headers["Content-Type"].startswith("text/html")
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    assert "pair version 1" in page
    assert json.loads(fetch(monitor, "/report.json")[1])["headrace_report"] == 1
    assert (
        'headrace_monitor_rows_total{model="pair",version="1"} 2.0' in fetch(monitor, "/metrics")[1]
    )


def test_the_gateway_counts_what_it_streamed(infer, gateway, monitor):
    stream = gateway.metrics.stream
    before = stream.rows_sent
    infer("echo_uint8", x=np.ones((3, 2), np.uint8))
    soon(lambda: stream.rows_sent == before + 3)
    text = fetch(gateway, "/metrics")[1]
    assert f'headrace_stream_rows_total{{result="sent"}} {before + 3}.0' in text
    assert "headrace_stream_connected 1.0" in text


def test_two_monitors_do_not_share_a_state_folder(start, one_model, tmp_path):
    settings = monitor_settings(one_model, tmp_path / "state")
    start(MonitorProcess, settings)
    with pytest.raises(StartupError, match="--state-dir"):
        MonitorProcess(settings)


def test_the_command_serves_until_it_is_told_to_stop(tmp_path):
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "headrace", "monitor", "--state-dir", str(tmp_path)),
            *("--grpc-address", "127.0.0.1:0", "--http-address", "127.0.0.1:0"),
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        serving = json.loads(process.stdout.readline())
        assert serving["event"] == "serving"
        options = [("grpc.enable_http_proxy", 0)]
        with grpc.insecure_channel(serving["grpc_address"], options=options) as channel:
            health = health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(service="headrace.v1.MonitorService"), timeout=10
            )
        assert health.status == health_pb2.HealthCheckResponse.SERVING
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--window-s", "0"], "--window-s (or HEADRACE_MONITOR_WINDOW_S)"),
        (["--webhook-url", "nowhere"], "--webhook-url"),
        (["--state-dir", "/proc/nothing"], "--state-dir"),
    ],
)
def test_a_monitor_that_cannot_start_says_why_in_one_line(flags, complaint):
    addresses = ["--grpc-address", "127.0.0.1:0", "--http-address", "127.0.0.1:0"]
    done = subprocess.run(
        [sys.executable, "-m", "headrace", "monitor", *addresses, *flags],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert complaint in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_shipments_that_send_nothing_shut_out_neither_outcomes_nor_health(
    start, one_model, tmp_path, monkeypatch
):
    monkeypatch.setattr("headrace.rpc.monitor.STREAM_TIME_MAX_S", 1.0)
    monitor = start(MonitorProcess, monitor_settings(one_model, tmp_path / "state"))
    release = threading.Event()

    def nothing():
        release.wait(30)
        yield from ()

    with grpc.insecure_channel(monitor.grpc_address) as channel:
        stub = pb_grpc.MonitorServiceStub(channel)
        idle = [stub.RecordPredictions.future(nothing(), timeout=30) for _ in range(64)]
        watches = [
            health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
            for _ in range(64)
        ]
        outcome = pb.ReportOutcomesRequest()
        outcome.outcomes.add(prediction_id=f"{'a' * 16}{0:010x}/0", value=1.0)
        assert stub.ReportOutcomes(outcome, timeout=5).unknown_count == 1
        check = health_pb2_grpc.HealthStub(channel).Check(
            health_pb2.HealthCheckRequest(), timeout=5
        )
        assert check.status == health_pb2.HealthCheckResponse.SERVING
        # Their time over, their places are free.
        ended = {call.exception(timeout=15).code() for call in idle}
        assert ended <= {grpc.StatusCode.CANCELLED, grpc.StatusCode.RESOURCE_EXHAUSTED}
        rows = stub.RecordPredictions(iter([pb.RecordPredictionsRequest(source="s")]), timeout=5)
        assert rows.row_count == 0
        release.set()
        for watch in watches:
            watch.cancel()
