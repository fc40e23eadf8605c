"""Workers that hang, are late, or die before they have served: nobody waits for them for long."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import grpc
import onnx
import pytest
from onnx import TensorProto, helper
from tritonclient.grpc import service_pb2, service_pb2_grpc
from worker_processes import workers_of

SUPERVISE_WITH_A_FAULT = """
import sys
from headrace.__main__ import main
from headrace.workers import process, supervisor

{fault}
sys.exit(main(sys.argv[1:]))
"""

WORKERS_WITH_A_FAULT = """
worker = '''
import sys, time
from pathlib import Path
from headrace.__main__ import main
from headrace.repository.manager import RepositoryManager
from headrace.rpc import oip

{fault}
sys.exit(main(sys.argv[3:]))  # -c -m headrace …
'''
process.interpreter = lambda: [sys.executable, "-c", worker]
"""

ALONE_WITH_A_FAULT = """
import time
from pathlib import Path
from headrace.repository.manager import RepositoryManager

{fault}
"""

STARTS_WHEN_IT_MAY = """
load_all = RepositoryManager.load_all
def load_all_when_allowed(manager):
    while Path({held!r}).exists():
        time.sleep(0.02)
    load_all(manager)
RepositoryManager.load_all = load_all_when_allowed
"""

LOADS_WHEN_IT_MAY = """
oip.LOAD_TIMEOUT_S = 0.5
load_now = RepositoryManager._load_now
def load_when_allowed(manager, name):
    while Path({held!r}).exists():
        time.sleep(0.02)
    load_now(manager, name)
RepositoryManager._load_now = load_when_allowed
"""

LOADS_FOR_EVER = """
from headrace.loading import VersionLoader
def load(loader, name, version):
    Path({held!r}).touch()
    while True:
        time.sleep(1.0)
VersionLoader.load = load
"""


@pytest.fixture
def supervise(tmp_path):
    processes = []

    def begin(fault, *flags):
        command = [sys.executable, "-c", SUPERVISE_WITH_A_FAULT.format(fault=fault), "serve"]
        command += ["--model-repository", str(tmp_path), "--workers", "2", "--drain-delay-s", "0"]
        command += ["--grpc-address", "127.0.0.1:0", "--http-address", "127.0.0.1:0", *flags]
        processes.append(
            subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ
            )
        )
        return processes[-1]

    yield begin
    for process in processes:
        process.kill()
        process.communicate(timeout=20)


def is_ready(address):
    url = f"http://{address}/readyz"
    with contextlib.suppress(urllib.error.HTTPError), urllib.request.urlopen(url) as reply:
        return reply.read() == b"ready\n"
    return False


def workers_with(fault, held):
    return WORKERS_WITH_A_FAULT.format(fault=fault.format(held=str(held)))


def until(holds, what, limit_s=60.0):
    deadline_s = time.monotonic() + limit_s
    while not holds():
        assert time.monotonic() < deadline_s, what
        time.sleep(0.05)


def ready_workers(address):
    with urllib.request.urlopen(f"http://{address}/metrics") as reply:
        for line in reply.read().decode().splitlines():
            if line.startswith("headrace_workers_ready "):
                return int(float(line.split()[1]))
    return 0


def kill_one(process):
    """Kill one of two workers; return its successor's process id, once there is one."""
    killed, survivor = workers_of(process)
    os.kill(killed, signal.SIGKILL)
    until(lambda: set(workers_of(process)) - {killed, survivor}, "nobody replaced it")
    (successor,) = set(workers_of(process)) - {killed, survivor}
    return successor


@contextlib.contextmanager
def stub_of(address):
    """One with a connection of its own, so that any of the workers may have it."""
    with grpc.insecure_channel(address, [("grpc.use_local_subchannel_pool", 1)]) as channel:
        yield service_pb2_grpc.GRPCInferenceServiceStub(channel)


def load_model(address):
    with stub_of(address) as stub:
        request = service_pb2.RepositoryModelLoadRequest(model_name="copy")
        stub.RepositoryModelLoad(request, timeout=60, wait_for_ready=True)


def change_log_level(address, **settings):
    request = service_pb2.LogSettingsRequest()
    for name, value in settings.items():
        request.settings[name].bool_param = value
    with stub_of(address) as stub:
        stub.LogSettings(request, timeout=60, wait_for_ready=True)


def told(address):
    """The models that serve and whether warnings are logged, by whichever workers are asked."""
    answers = set()
    for _ in range(12):
        with stub_of(address) as stub:
            index = service_pb2.RepositoryIndexRequest(ready=True)
            models = stub.RepositoryIndex(index, timeout=60, wait_for_ready=True).models
            logs = stub.LogSettings(service_pb2.LogSettingsRequest(), timeout=60).settings
            answers.add((*(model.name for model in models), logs["log_warning"].bool_param))
    return answers


@pytest.fixture
def model(tmp_path):
    """One that returns what it is given, in the repository of the servers of this test."""
    (tmp_path / "copy" / "1").mkdir(parents=True)
    (tmp_path / "copy" / "config.pbtxt").write_text('backend: "onnxruntime"\nmax_batch_size: 8\n')
    tensors = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 1]) for name in ("x", "y")
    ]
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "copy", *zip(tensors))
    opset = [helper.make_opsetid("", 17)]
    onnx.save(
        helper.make_model(graph, opset_imports=opset, ir_version=8),
        tmp_path / "copy" / "1" / "model.onnx",
    )


@pytest.mark.usefixtures("model")
def test_changes_wait_for_no_worker_that_starts_and_it_begins_with_them(supervise, tmp_path):
    held = tmp_path / "held"
    process = supervise(
        workers_with(STARTS_WHEN_IT_MAY, held),
        *("--model-control-mode", "explicit", "--allow-log-settings"),
    )
    serving = json.loads(process.stdout.readline())
    address = serving["grpc_address"]
    held.touch()
    successor = kill_one(process)

    load_model(address)  # it would wait for five minutes
    change_log_level(address, log_warning=False)
    assert ready_workers(serving["http_address"]) == 1
    held.unlink()
    until(lambda: ready_workers(serving["http_address"]) == 2, "it never served")

    assert successor in workers_of(process)
    assert told(address) == {("copy", False)}
    change_log_level(address, log_warning=True)
    assert told(address) == {("copy", True)}


def test_a_worker_that_hangs_at_its_start_is_ended_and_replaced(supervise, tmp_path):
    held = tmp_path / "held"
    impatient = f"""
from pathlib import Path
supervisor.starts_too_long = lambda waited_s, _: waited_s > 0.5 and Path({str(held)!r}).exists()
"""
    process = supervise(impatient + workers_with(STARTS_WHEN_IT_MAY, held))
    address = json.loads(process.stdout.readline())["http_address"]
    held.touch()
    successor = kill_one(process)

    until(lambda: successor not in workers_of(process), "it goes on hanging")
    assert is_ready(address) is False  # a note follows: one of two
    held.unlink()
    until(lambda: is_ready(address), "nobody took its place")

    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    assert "--worker-start-timeout-s allows more" in process.stderr.read()


def test_a_worker_that_hangs_at_the_first_start_ends_everything_with_2(supervise, tmp_path):
    held = tmp_path / "held"
    held.touch()
    process = supervise(workers_with(STARTS_WHEN_IT_MAY, held), "--worker-start-timeout-s", "1")

    assert process.wait(60) == 2
    assert process.stdout.read() == ""
    (line,) = [line for line in process.stderr if not line.startswith("{")]
    assert "does not serve after 1 s" in line


@pytest.mark.usefixtures("model")
def test_what_came_too_late_for_its_caller_is_there_after_a_worker_has_died(supervise, tmp_path):
    held = tmp_path / "held"
    process = supervise(
        workers_with(LOADS_WHEN_IT_MAY, held), *("--model-control-mode", "explicit")
    )
    serving = json.loads(process.stdout.readline())
    address = serving["grpc_address"]
    held.touch()
    with pytest.raises(grpc.RpcError) as refused:
        load_model(address)
    assert refused.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert told(address) == {(True,)}
    held.unlink()
    until(lambda: told(address) == {("copy", True)}, "it was given up")

    kill_one(process)
    until(lambda: ready_workers(serving["http_address"]) == 2, "it was not replaced")

    assert told(address) == {("copy", True)}


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.usefixtures("model")
def test_a_load_that_never_ends_keeps_no_server_from_ending_and_leaves_no_copy(
    supervise, tmp_path, monkeypatch, workers
):
    copies, held = tmp_path / "copies", tmp_path / "held"
    copies.mkdir()
    monkeypatch.setenv("TMPDIR", str(copies))
    fault = workers_with(LOADS_FOR_EVER, held)
    if workers == 1:
        fault = ALONE_WITH_A_FAULT.format(fault=LOADS_FOR_EVER.format(held=str(held)))
    process = supervise(*(fault, "--workers", str(workers), "--model-control-mode", "explicit"))
    address = json.loads(process.stdout.readline())["grpc_address"]
    with ThreadPoolExecutor(1) as pool:
        loading = pool.submit(load_model, address)
        until(held.exists, "nothing was loaded")
        assert list(copies.glob("headrace-*"))

        process.send_signal(signal.SIGTERM)

        error = loading.exception(20)
        assert (error.code(), error.details()) == (
            grpc.StatusCode.UNAVAILABLE,
            "this server is stopping",  # and not that it is gone
        )
        assert process.wait(20) == 0  # the drain timeout is 30 s
    assert list(copies.glob("headrace-*")) == []


def test_a_worker_that_answers_nothing_for_long_is_replaced(supervise):
    process = supervise("supervisor.LOOK_PERIOD_S, supervisor.UNANSWERED_MAX = 0.2, 10")
    address = json.loads(process.stdout.readline())["http_address"]
    before = set(workers_of(process))
    hung = min(before)

    os.kill(hung, signal.SIGSTOP)

    deadline_s = time.monotonic() + 60
    while hung in workers_of(process) or len(workers_of(process)) < 2 or not is_ready(address):
        assert time.monotonic() < deadline_s
        time.sleep(0.05)
    assert before - set(workers_of(process)) == {hung}  # the other answers, and stays
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0
    assert "worker_hangs" in process.stderr.read()


def test_a_worker_that_dies_at_the_first_start_ends_everything_with_1(supervise):
    dies = "process.interpreter = lambda: [sys.executable, '-c', 'import os; os.abort()']"
    process = supervise(dies)

    assert process.wait(60) == 1
    assert process.stdout.read() == ""
    (line,) = [line for line in process.stderr if "worker_died_at_start" in line]
    assert json.loads(line)["reason"] == "SIGABRT"
