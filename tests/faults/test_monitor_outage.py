"""The monitor dies, hangs and comes back under a gateway with work to do."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import grpc
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from tritonclient.grpc import service_pb2, service_pb2_grpc

from headrace.monitoring.records import BatchRecord, Block, RecordSchema
from headrace.monitoring.stream import PredictionStream

pytestmark = pytest.mark.alone

LOOPBACK = ["--grpc-address", "127.0.0.1:0", "--http-address", "127.0.0.1:0"]
QUEUE_BYTES = 1 << 20


@contextmanager
def process(*arguments):
    running = subprocess.Popen(
        [sys.executable, "-m", "headrace", *map(str, arguments), "--log-level", "error"],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield running, json.loads(running.stdout.readline())
    finally:
        running.kill()
        running.communicate()


@contextmanager
def monitor(tmp_path, address="127.0.0.1:0"):
    flags = ["--state-dir", tmp_path / "state", "--grpc-address", address]
    with process("monitor", *flags, "--http-address", "127.0.0.1:0") as found:
        yield found


@pytest.fixture
def models(tmp_path):
    graph = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["y"])],
        "echo",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 8])],
    )
    folder = tmp_path / "models" / "echo" / "1"
    folder.mkdir(parents=True)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, folder / "model.onnx")
    (tmp_path / "models" / "echo" / "config.pbtxt").write_text("max_batch_size: 64")
    return tmp_path / "models"


class Load:
    """Callers who keep eight requests under way and note how long each took."""

    def __init__(self, address):
        self.latencies_s, self.failures = [], []
        self._stopping = threading.Event()
        self._threads = [threading.Thread(target=self._call, args=(address,)) for _ in range(8)]

    def _call(self, address):
        message = service_pb2.ModelInferRequest(model_name="echo")
        message.inputs.add(name="x", datatype="FP32", shape=[8, 8])
        message.raw_input_contents.append(np.ones((8, 8), np.float32).tobytes())
        options = [("grpc.enable_http_proxy", 0), ("grpc.use_local_subchannel_pool", 1)]
        with grpc.insecure_channel(address, options=options) as channel:
            infer = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer
            while not self._stopping.is_set():
                started_s = time.perf_counter()
                try:
                    infer(message, timeout=10)
                except grpc.RpcError as error:
                    self.failures.append(error)
                self.latencies_s.append(time.perf_counter() - started_s)

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self._stopping.set()
        for thread in self._threads:
            thread.join()

    def p99_s(self, seconds):
        """Return the 99th percentile of the requests of the next seconds."""
        first = len(self.latencies_s)
        time.sleep(seconds)
        return float(np.percentile(self.latencies_s[first:], 99))


def resident_bytes(running):
    pages = Path(f"/proc/{running.pid}/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def metric(serving, name):
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"http://{serving['http_address']}/metrics", timeout=10) as page:
        lines = page.read().decode().splitlines()
    return next(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))


def soon(condition, limit_s=30):
    deadline_s = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline_s, "it never came"
        time.sleep(0.1)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("seconds", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_a_monitor_that_dies_and_one_that_hangs_disturb_no_request(
    tmp_path, models, seconds, record_property
):
    with monitor(tmp_path) as (first, watching):
        address = watching["grpc_address"]
        flags = ["--monitor-address", address, "--monitor-queue-bytes", QUEUE_BYTES]
        with process(
            *("serve", "--model-repository", models, "--drain-delay-s", 0), *LOOPBACK, *flags
        ) as (gateway, serving):
            connected = "headrace_stream_connected"
            dropped = 'headrace_stream_rows_total{result="dropped"}'
            with Load(serving["grpc_address"]) as load:
                soon(lambda: metric(serving, connected) == 1)
                load.p99_s(1)  # warm
                calm_s = load.p99_s(seconds)
                before = resident_bytes(gateway)

                first.send_signal(signal.SIGSTOP)
                hung_s = load.p99_s(seconds)
                first.kill()
                first.wait()
                dead_s = load.p99_s(seconds)

                assert metric(serving, connected) == 0
                assert metric(serving, dropped) > 0
                grown = resident_bytes(gateway) - before
                with monitor(tmp_path, address) as (_, back):
                    soon(lambda: metric(serving, connected) == 1)
                    rows = 'headrace_monitor_rows_total{model="echo"'
                    soon(lambda: metric(back, "headrace_monitor_rows_lost_total") > 0)
                    soon(lambda: metric(back, rows) > 0)
                    again_s = load.p99_s(seconds)

    assert load.failures == []
    # Eight threads of Python on the server's own cores: their noise is far above any effect.
    assert max(hung_s, dead_s, again_s) < 3 * calm_s + 0.01
    assert grown < 16 * QUEUE_BYTES
    record_property(
        "measured",
        f"p99 calm {calm_s * 1e3:.1f} ms, hung {hung_s * 1e3:.1f}, dead {dead_s * 1e3:.1f}, "
        f"back {again_s * 1e3:.1f}; grown {grown / 2**20:.1f} MiB",
    )


def rows_counted(serving):
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"http://{serving['http_address']}/report.json", timeout=10) as page:
        report = json.load(page)
    return sum(of["open_window"]["rows"] for of in report["versions"]), report["rows_lost"]


@pytest.fixture
def feeding():
    """A stream that is fed a few hundred rows a second, all the while."""
    streams = []

    def feed(address):
        stream = PredictionStream(address, max_queue_bytes=8 << 20)
        schema = RecordSchema("echo", 1, "a" * 16, (Block("x", ("x",), "FP32"),), ())
        stopping = threading.Event()

        def run():
            number = 0
            while not stopping.wait(0.01):
                values = np.full((10, 1), 0.5, np.float32)
                stream.put(
                    BatchRecord(
                        schema, number, [10], 10, {"x": values}, None, [], time.time(), 1_000
                    )
                )
                stream.put_rows = number * 10 + 10
                number += 1

        thread = threading.Thread(target=run)
        thread.start()
        stream.start()
        streams.append((stream, stopping, thread))
        return stream, stopping, thread

    yield feed
    for stream, stopping, thread in streams:
        stopping.set()
        thread.join()
        stream.stop(5)


@pytest.mark.timeout(120)
def test_a_monitor_that_was_stopped_for_a_while_counts_every_row_once(tmp_path, feeding):
    with monitor(tmp_path) as (running, serving):
        stream, stopping, thread = feeding(serving["grpc_address"])
        soon(lambda: stream.rows_sent > 0)
        for _ in range(2):
            running.send_signal(signal.SIGSTOP)
            soon(lambda: not stream.is_connected)  # a shipment was given up half way, perhaps
            running.send_signal(signal.SIGCONT)
            soon(lambda: stream.is_connected)
        stopping.set()
        thread.join()
        soon(lambda: stream.rows_sent == stream.put_rows)

        assert (stream.rows_dropped, stream.rows_refused) == (0, 0)
        soon(lambda: rows_counted(serving) == (stream.put_rows, 0))


@pytest.mark.timeout(120)
def test_a_monitor_that_is_killed_loses_a_second_at_most_and_says_so(tmp_path, feeding):
    with monitor(tmp_path) as (running, serving):
        stream, stopping, thread = feeding(serving["grpc_address"])
        soon(lambda: stream.rows_sent > 1_000)
        running.kill()
        running.wait()
    sent = stream.rows_sent
    with monitor(tmp_path, serving["grpc_address"]) as (_, again):
        soon(lambda: stream.rows_sent > sent)
        stopping.set()
        thread.join()
        soon(lambda: stream.rows_sent == stream.put_rows)
        soon(lambda: sum(rows_counted(again)) == stream.put_rows)

        # Ten rows every ten milliseconds; state is written once a second.
        assert rows_counted(again)[1] <= 2_500
