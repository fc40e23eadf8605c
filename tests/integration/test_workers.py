"""Several worker processes on one port, as an operator and a caller meet them."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from itertools import pairwise
from pathlib import Path

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client.parser import text_string_to_metric_families
from tritonclient.grpc import service_pb2, service_pb2_grpc
from worker_processes import is_there, workers_of

from headrace.telemetry.instruments import GAUGES

START_LIMIT_S = 60


class Supervised:
    """`headrace serve --workers 2`, its log kept as it comes."""

    def __init__(self, repository, *flags):
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "headrace", "serve", "--model-repository", str(repository)),
                *("--workers", "2", "--grpc-address", "127.0.0.1:0"),
                *("--http-address", "127.0.0.1:0", "--drain-delay-s", "0.3", *map(str, flags)),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.log = []
        self._reader = threading.Thread(target=lambda: self.log.extend(self.process.stderr))
        self._reader.start()
        line = self.process.stdout.readline()
        assert line, self.log
        self.serving = json.loads(line)
        self.address = self.serving["grpc_address"]

    def page(self, path):
        url = f"http://{self.serving['http_address']}{path}"
        with contextlib.suppress(urllib.error.HTTPError), urllib.request.urlopen(url) as reply:
            return reply.read().decode()
        return ""

    def numbers(self, path="/metrics"):
        return {
            (sample.name, *sorted(sample.labels.items())): sample.value
            for family in text_string_to_metric_families(self.page(path))
            for sample in family.samples
        }

    def total(self, name, path="/metrics"):
        return sum(value for key, value in self.numbers(path).items() if key[0] == name)

    def answered_by(self):
        """How many requests each worker has answered."""
        counts = {"1": 0.0, "2": 0.0}
        for key, value in self.numbers("/metrics/workers").items():
            if key[0] == "headrace_requests_total":
                counts[dict(key[1:])["worker"]] += value
        return counts

    def end(self):
        pids = workers_of(self.process)
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(20)
        self._reader.join(20)
        self.process.stdout.close()
        self.process.stderr.close()
        until(lambda: not any(is_there(pid) for pid in pids), "workers are left behind")


def until(holds, what, limit_s=30.0):
    deadline_s = time.monotonic() + limit_s
    while not holds():
        assert time.monotonic() < deadline_s, what
        time.sleep(0.02)


def channel(address):
    """One with a connection of its own: channels of one process otherwise share one."""
    options = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_reconnect_backoff_ms", 200)]
    return grpc.insecure_channel(address, options=options)


def row():
    message = service_pb2.ModelInferRequest(model_name="scores")
    message.inputs.add(name="x", datatype="FP32", shape=[1, 4])
    message.raw_input_contents.append(np.ones(4, np.float32).tobytes())
    return message


def stub_of(open_channel):
    return service_pb2_grpc.GRPCInferenceServiceStub(open_channel)


def write_model(root, model_files, name="scores"):
    from onnx import helper

    model_files.write_model(
        root,
        name,
        [helper.make_node("ReduceSum", ["x", "axis"], ["y"], keepdims=1)],
        [("x", "FP32", ["n", 4])],
        [("y", "FP32", ["n", 1])],
        constants={"axis": np.array([1], np.int64)},
        config="max_batch_size: 8",
    )


@pytest.fixture(scope="module")
def repository(tmp_path_factory, model_files):
    root = tmp_path_factory.mktemp("models") / "repository"
    root.mkdir()
    write_model(root, model_files)
    return root


@pytest.fixture(scope="module")
def pair(repository):
    server = Supervised(repository)
    yield server
    server.end()


@pytest.fixture
def start():
    servers = []

    def begin(*arguments):
        servers.append(Supervised(*arguments))
        return servers[-1]

    yield begin
    for server in servers:
        server.end()


class Callers:
    """Threads that call without a pause, each on a connection of its own."""

    def __init__(self, server, count):
        self.server = server
        self.channels = [channel(server.address) for _ in range(count)]
        self.worker = [self._worker_behind(one) for one in self.channels]
        self.answered = [0] * count
        self.failures = [[] for _ in range(count)]
        self._stopping = threading.Event()
        self._threads = [
            threading.Thread(target=self._call, args=(i, one))
            for i, one in enumerate(self.channels)
        ]
        for thread in self._threads:
            thread.start()

    def _worker_behind(self, one):
        before = self.server.answered_by()
        stub_of(one).ModelInfer(row(), timeout=10, wait_for_ready=True)
        limit_s = time.monotonic() + 30
        while time.monotonic() < limit_s:  # a batch is counted after its replies
            after = self.server.answered_by()
            if workers := [number for number in after if after[number] > before[number]]:
                (worker,) = workers
                return worker
        raise AssertionError("nobody counted it")

    def _call(self, i, one):
        stub = stub_of(one)
        while not self._stopping.is_set():
            try:
                stub.ModelInfer(row(), timeout=10)
                self.answered[i] += 1
            except grpc.RpcError as error:
                self.failures[i].append((error.code(), error.details()))
                if "stopping" in error.details() or len(self.failures[i]) > 1_000:
                    return
                time.sleep(0.01)  # a connection is made anew within a second, a call fails in none

    def join(self):
        for thread in self._threads:
            thread.join(30)

    def close(self):
        self._stopping.set()
        self.join()
        for one in self.channels:
            one.close()


@pytest.fixture
def callers():
    """Return a function that starts callers, on connections to both workers."""
    made = []

    def begin(server):
        for count in (8, 24):
            made.append(Callers(server, count))
            if set(made[-1].worker) == {"1", "2"}:
                return made[-1]
            made.pop().close()
        raise AssertionError("24 connections went to one worker of two")

    yield begin
    for one in made:
        one.close()


def test_it_says_once_that_it_serves_when_all_workers_do(pair):
    assert pair.serving["event"] == "serving"
    assert pair.serving["workers"] == 2
    assert pair.page("/readyz") == "ready\n"
    assert pair.numbers()["headrace_workers_ready",] == 2
    started = [json.loads(line) for line in pair.log if '"started"' in line]
    assert sorted(line.get("worker", 0) for line in started) == [0, 1, 2]


def test_connections_reach_every_worker_and_no_two_predictions_share_an_id(pair):
    before, ids = pair.answered_by(), []

    def both_have_answered():
        with channel(pair.address) as one:
            reply = stub_of(one).ModelInfer(row(), timeout=10, wait_for_ready=True)
            ids.append(reply.parameters["prediction_id"].string_param)
        after = pair.answered_by()
        return all(after[worker] > before[worker] for worker in after)

    until(both_have_answered, "one worker got every connection")

    assert all(ids)
    assert len(set(ids)) == len(ids)


def test_one_page_adds_up_the_numbers_of_all_workers(pair):
    each, all_of_them = pair.numbers("/metrics/workers"), pair.numbers()

    sums = {}
    for key, value in each.items():
        labels = tuple(label for label in key[1:] if label[0] != "worker")
        sums.setdefault((key[0], *labels), []).append(value)
    of_workers = {key: value for key, value in all_of_them.items() if key in sums}
    assert len(of_workers) > 50
    assert of_workers == {
        key: sum(values) if GAUGES.get(key[0], "sum") == "sum" else values[0]
        for key, values in sums.items()
    }


def test_every_gauge_of_a_worker_has_a_rule(pair):
    families = text_string_to_metric_families(pair.page("/metrics/workers"))

    gauges = {family.name for family in families if family.type == "gauge"}
    assert gauges
    assert gauges <= GAUGES.keys()


@pytest.mark.alone
def test_a_worker_that_hangs_does_not_hang_the_page(pair):
    answered = pair.total("headrace_requests_total")
    with channel(pair.address) as one:
        stub_of(one).ModelInfer(row(), timeout=20, wait_for_ready=True)
    until(lambda: pair.total("headrace_requests_total") > answered, "it was not counted")
    before = pair.total("headrace_requests_total")
    hung = workers_of(pair.process)[0]
    os.kill(hung, signal.SIGSTOP)
    try:
        began_s = time.monotonic()
        numbers = pair.numbers()
        took_s = time.monotonic() - began_s
    finally:
        os.kill(hung, signal.SIGCONT)

    assert took_s < 3
    assert sum(v for k, v in numbers.items() if k[0] == "headrace_requests_total") == before
    assert before > 0
    assert numbers["headrace_rpc_open_calls",] == 0  # of the other


@pytest.mark.alone
def test_a_killed_worker_takes_only_its_own_calls_along_and_is_replaced(pair, callers):
    load = callers(pair)
    pages, stop = [], threading.Event()

    def watch():
        while not stop.is_set():
            pages.append(pair.numbers())

    watcher = threading.Thread(target=watch)
    watcher.start()
    restarts = pair.numbers("/metrics")
    until(lambda: min(load.answered) > 20, "the callers get no answer")
    victim, survivor = workers_of(pair.process)

    killed_s = time.monotonic()
    os.kill(victim, signal.SIGKILL)
    until(lambda: set(workers_of(pair.process)) - {victim, survivor}, "nobody replaced it", 2)
    respawned_s = time.monotonic() - killed_s
    until(lambda: pair.numbers().get(("headrace_workers_ready",)) == 2, "it does not serve")
    until(lambda: min(load.answered) > 100, "some callers have had no answer since")
    load.close()
    stop.set()
    watcher.join(10)

    (killed,) = [
        dict(key[1:])["worker"]
        for key, value in pair.numbers().items()
        if key[0] == "headrace_worker_restarts_total" and value > restarts[key]
    ]
    assert respawned_s < 2
    for worker, failures in zip(load.worker, load.failures, strict=True):
        assert {code for code, _ in failures} <= {grpc.StatusCode.UNAVAILABLE}
        # The call under way, and those made before the connection was made anew.
        assert worker == killed or failures == []
    counters = [
        {key: value for key, value in page.items() if key[0].endswith(("_total", "_bucket"))}
        for page in pages
        if page
    ]
    assert len(counters) > 5
    for earlier, later in pairwise(counters):
        assert [key for key in earlier if later.get(key, 0) < earlier[key]] == []
    assert "worker_ended" in "".join(pair.log)


def test_a_replacement_that_cannot_start_is_tried_until_it_can(pair, repository):
    told = len([line for line in pair.log if "worker_ended" in line])
    away = repository.with_name("away")
    repository.rename(away)
    try:
        os.kill(workers_of(pair.process)[0], signal.SIGKILL)
        until(lambda: "does not exist" in "".join(pair.log), "it never tried", 60)
        restarts = pair.total("headrace_worker_restarts_total")
        until(
            lambda: pair.total("headrace_worker_restarts_total") >= restarts + 2, "it gave up", 60
        )
        assert pair.page("/readyz").startswith("ready\n1 of 2 workers are ready")
        lines = [line for line in pair.log if "worker_ended" in line]
        assert len(lines) == told + 2  # killed; the repository is away: not once for each attempt
    finally:
        away.rename(repository)
    until(lambda: pair.page("/readyz") == "ready\n", "it does not serve again", 60)


def test_sigterm_stops_all_workers_as_one_and_loses_no_call(start, callers, repository):
    server = start(repository)
    load = callers(server)
    until(lambda: min(load.answered) > 20, "the callers get no answer")
    with channel(server.address) as one:
        watch = health_pb2_grpc.HealthStub(one).Watch(health_pb2.HealthCheckRequest())
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        server.process.send_signal(signal.SIGTERM)
        assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
    assert server.page("/readyz") == ""
    load.join()

    assert server.process.wait(20) == 0
    refused = (grpc.StatusCode.UNAVAILABLE, "this server is stopping")
    assert load.failures == [[refused]] * len(load.failures)


def test_ctrl_c_is_one_signal_for_all_and_a_second_ends_everything_at_once(start, repository):
    server = start(repository, "--drain-delay-s", 600)
    workers = workers_of(server.process)
    os.killpg(server.process.pid, signal.SIGINT)  # a terminal's, to the whole group
    # The supervisor and each worker; a worker that heard it twice would end.
    until(lambda: "".join(server.log).count("draining_started") == 3, "it does not drain")
    assert workers_of(server.process) == workers

    server.process.send_signal(signal.SIGTERM)

    assert server.process.wait(10) == -signal.SIGTERM
    until(lambda: not any(is_there(pid) for pid in workers), "workers are left behind", 5)


def test_workers_whose_supervisor_was_killed_end_by_themselves(start, repository):
    server = start(repository, "--drain-delay-s", 600)
    workers = workers_of(server.process)
    assert len(workers) == 2

    server.process.kill()

    until(lambda: not any(is_there(pid) for pid in workers), "workers are left behind", 15)


def test_nobody_else_gets_the_port_and_nothing_shows_on_the_command_line(pair, repository):
    for pid in workers_of(pair.process):
        assert str(repository) not in Path(f"/proc/{pid}/cmdline").read_text()
    for flags in ((), ("--workers", 2)):
        line = refusal(repository, "--grpc-address", pair.address, *flags)
        assert f"--grpc-address {pair.address}: Address already in use" in line


def refusal(repository, *flags):
    command = [sys.executable, "-m", "headrace", "serve", "--model-repository", repository]
    command += ["--http-address", "127.0.0.1:0", *flags]
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=60, check=False
    )
    lines = [line for line in done.stderr.splitlines() if not line.startswith("{")]
    assert done.returncode == 2, done.stderr
    assert len(lines) == 1, done.stderr
    assert not done.stdout
    return lines[0]


def test_a_taken_http_port_is_refused(repository):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        flags = ("--workers", 2, "--grpc-address", "127.0.0.1:0", "--http-address", address)

        assert f"--http-address {address}: Address already in use" in refusal(repository, *flags)


def test_what_no_worker_can_start_with_is_said_in_one_line(repository, tmp_path):
    line = refusal(
        repository,
        *("--workers", 2, "--grpc-address", "127.0.0.1:0", "--feature-repo", tmp_path / "none"),
    )

    assert "none" in line


def index(server, connections=12):
    """What each of several connections is told of the models that serve."""
    told = []
    for _ in range(connections):
        with channel(server.address) as one:
            request = service_pb2.RepositoryIndexRequest(ready=True)
            reply = stub_of(one).RepositoryIndex(request, timeout=10, wait_for_ready=True)
            told.append({model.name for model in reply.models})
    return told


def load_model(server, name):
    with channel(server.address) as one:
        request = service_pb2.RepositoryModelLoadRequest(model_name=name)
        stub_of(one).RepositoryModelLoad(request, timeout=60, wait_for_ready=True)


def test_a_load_by_one_worker_is_done_by_all_before_it_returns(start, tmp_path, model_files):
    write_model(tmp_path, model_files, "scores")
    write_model(tmp_path, model_files, "other")
    server = start(tmp_path, "--model-control-mode", "explicit")
    assert index(server) == [set()] * 12

    load_model(server, "scores")
    assert index(server) == [{"scores"}] * 12
    load_model(server, "other")
    with channel(server.address) as one:
        request = service_pb2.RepositoryModelUnloadRequest(model_name="scores")
        stub_of(one).RepositoryModelUnload(request, timeout=60)
    assert index(server) == [{"other"}] * 12

    with pytest.raises(grpc.RpcError) as refused:
        load_model(server, "nobody")
    assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert "no such model" in refused.value.details()

    replace_one(server)
    assert index(server) == [{"other"}] * 12


def replace_one(server):
    killed = workers_of(server.process)[0]
    os.kill(killed, signal.SIGKILL)
    until(lambda: killed not in workers_of(server.process), "it did not die")
    until(lambda: server.page("/readyz") == "ready\n", "it was not replaced")


def test_a_version_that_serves_beside_a_broken_one_does_so_in_a_replacement_too(
    start, tmp_path, model_files
):
    write_model(tmp_path, model_files, "scores")
    with (tmp_path / "scores" / "config.pbtxt").open("a") as config:
        config.write("\nversion_policy { all {} }\n")
    (tmp_path / "scores" / "2").mkdir()
    (tmp_path / "scores" / "2" / "model.onnx").write_bytes(b"no model")
    server = start(tmp_path, "--model-control-mode", "explicit")
    with pytest.raises(grpc.RpcError) as refused:
        load_model(server, "scores")
    assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert index(server) == [{"scores"}] * 12

    replace_one(server)

    assert index(server) == [{"scores"}] * 12
