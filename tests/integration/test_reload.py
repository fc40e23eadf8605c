"""Models come, change and go while clients call."""

import contextlib
import json
import shutil
import threading
import time
from hashlib import sha256
from pathlib import Path

import grpc
import numpy as np
import onnx
import pytest
import structlog
import tritonclient.grpc as triton
from onnx import TensorProto, helper, numpy_helper

from headrace.app import Gateway
from headrace.errors import Draining
from headrace.settings import load_settings

SETTLE_S = 0.3


def version(root, number, *, name="m", factor=None, width=1, broken=False):
    """Write a version that multiplies by its number; return its folder."""
    folder = root / name / str(number)
    folder.mkdir(parents=True)
    sides = [
        helper.make_tensor_value_info(side, TensorProto.FLOAT, ["n", width]) for side in ("x", "y")
    ]
    factors = np.full(width, number if factor is None else factor, np.float32)
    graph = helper.make_graph(
        [helper.make_node("Mul", ["x", "f"], ["y"])],
        "m",
        sides[:1],
        sides[1:],
        [numpy_helper.from_array(factors, "f")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, folder / "model.onnx")
    if broken:
        (folder / "model.onnx").write_bytes((folder / "model.onnx").read_bytes()[:-9])
    return folder


def add_manifest(folder):
    files = {
        str(path.relative_to(folder)): sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }
    (folder / "manifest.json").write_text(json.dumps({"files": files}))


def until(condition, timeout_s=20.0):
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "it did not happen"
        time.sleep(0.005)


class World:
    """A gateway on a repository of its own, and a client that asks it."""

    def __init__(self, root, **settings):
        self.root = root
        self.gateway = Gateway(
            load_settings(
                {
                    "model_repository": root,
                    "grpc_address": "127.0.0.1:0",
                    "http_address": "127.0.0.1:0",
                    "settle_s": SETTLE_S,
                    "repository_poll_s": 60,
                    **settings,
                }
            )
        )
        self.gateway.start()
        self.client = triton.InferenceServerClient(self.gateway.grpc_address)

    def close(self):
        self.client.close()
        assert self.gateway.stop()

    def ask(self, value=1.0, model="m", version="", width=1):
        """Return (version, y / x)."""
        given = triton.InferInput("x", [1, width], "FP32")
        given.set_data_from_numpy(np.full((1, width), value, np.float32))
        result = self.client.infer(model, [given], model_version=version, client_timeout=10)
        return int(result.get_response().model_version), float(result.as_numpy("y")[0, 0] / value)

    def serving(self, model="m"):
        entry = self.gateway.catalog.entries.get(model)
        return [] if entry is None else sorted(entry.versions)

    def index(self, *, ready=False):
        with grpc.insecure_channel(self.gateway.grpc_address):
            reply = self.client.get_model_repository_index()
        return {
            (model.name, model.version): (model.state, model.reason)
            for model in reply.models
            if not ready or model.state == "READY"
        }


@pytest.fixture
def root(tmp_path):
    root = tmp_path / "models"
    root.mkdir()
    return root


@pytest.fixture
def world(root):
    version(root, 1)
    world = World(root)
    yield world
    world.close()


def test_a_dropped_version_takes_over(world):
    assert world.ask() == (1, 1)

    version(world.root, 2)

    until(lambda: world.serving() == [2])
    assert world.ask() == (2, 2)
    with pytest.raises(triton.InferenceServerException) as refused:
        world.ask(version="1")
    assert refused.value.status() == "StatusCode.NOT_FOUND"


def test_a_dropped_model_serves_and_a_removed_one_does_not(world):
    version(world.root, 3, name="new")
    until(lambda: world.serving("new") == [3])
    assert world.ask(model="new") == (3, 3)

    shutil.rmtree(world.root / "new")

    until(lambda: not world.serving("new"))
    with pytest.raises(triton.InferenceServerException) as refused:
        world.ask(model="new")
    assert refused.value.status() == "StatusCode.NOT_FOUND"
    assert world.client.is_server_ready()
    assert not world.client.is_model_ready("new")
    assert world.ask() == (1, 1)


def test_a_version_that_matches_its_manifest_needs_no_settling(root):
    version(root, 1)
    world = World(root, settle_s=600)
    try:
        staged = version(root.parent / "staged", 2, name="m")
        add_manifest(staged)
        staged.rename(root / "m" / "2")

        until(lambda: world.serving() == [2])
    finally:
        world.close()


def test_a_copy_that_takes_its_time_is_waited_for(world):
    staged = version(world.root.parent / "staged", 2, width=4096)
    data = (staged / "model.onnx").read_bytes()
    (world.root / "m" / "2").mkdir()
    with (world.root / "m" / "2" / "model.onnx").open("wb") as file:
        for start in range(0, len(data), len(data) // 8):
            file.write(data[start : start + len(data) // 8])
            file.flush()
            assert world.serving() == [1]
            time.sleep(SETTLE_S / 3)  # slower than this, and it would look finished

    until(lambda: world.serving() == [2])
    assert world.ask(width=4096) == (2, 2)
    assert world.gateway.metrics._model_loads == {("m", "ready"): 2}


def test_a_version_replaced_in_place_is_loaded_anew(world):
    staged = version(world.root.parent / "staged", 1, factor=7)
    (staged / "model.onnx").replace(world.root / "m" / "1" / "model.onnx")

    until(lambda: world.ask() == (1, 7))
    assert world.serving() == [1]


@pytest.mark.parametrize("number", [1, 2])
def test_a_broken_candidate_changes_nothing_and_says_why(world, number):
    with structlog.testing.capture_logs() as log:
        if number == 1:
            staged = version(world.root.parent / "staged", 1, broken=True)
            (staged / "model.onnx").replace(world.root / "m" / "1" / "model.onnx")
        else:
            version(world.root, 2, broken=True)
        until(lambda: any(reason for _, reason in world.index().values()))

    assert world.ask() == (1, 1)
    assert world.client.is_server_ready()
    state, reason = world.index()["m", str(number)]
    assert state == ("READY" if number == 1 else "UNAVAILABLE")
    assert "ONNX checker" in reason
    assert str(world.root) not in reason
    assert world.gateway.metrics._model_loads["m", "failed"] == 1
    assert [line["event"] for line in log].count("model_load_failed") == 1


def test_a_broken_candidate_is_tried_again_when_its_files_change(world):
    version(world.root, 2, broken=True)
    until(lambda: world.index()["m", "1"] and ("m", "2") in world.index())
    staged = version(world.root.parent / "staged", 2)

    (staged / "model.onnx").replace(world.root / "m" / "2" / "model.onnx")

    until(lambda: world.serving() == [2])
    assert world.index() == {("m", "2"): ("READY", "")}


def test_removing_the_newest_brings_the_older_one_back_without_a_gap(world):
    version(world.root, 2)
    until(lambda: world.serving() == [2])
    answers = []
    leaving = threading.Event()

    def call():
        while not leaving.is_set():
            answers.append(world.ask())

    caller = threading.Thread(target=call)
    caller.start()
    shutil.rmtree(world.root / "m" / "2")
    until(lambda: world.serving() == [1] and answers and answers[-1] == (1, 1))
    leaving.set()
    caller.join(10)

    assert set(answers) == {(2, 2), (1, 1)}


def test_a_changed_configuration_is_taken_over(world):
    (world.root / "m" / "config.pbtxt").write_text("max_batch_size: 3 version_policy { all { } }")
    until(lambda: world.client.get_model_config("m").config.max_batch_size == 3)

    version(world.root, 5)
    until(lambda: world.serving() == [1, 5])

    assert world.ask(version="1") == (1, 1)
    assert world.ask() == (5, 5)


def test_an_unreadable_configuration_leaves_what_serves_alone(world):
    (world.root / "m" / "config.pbtxt").write_text("max_batch_size: many")

    until(lambda: ("m", "") in world.index())

    assert world.index()["m", ""][0] == "UNAVAILABLE"
    assert world.ask() == (1, 1)


def test_a_link_is_refused(world):
    elsewhere = version(world.root.parent / "elsewhere", 2)
    (world.root / "m" / "2").mkdir()
    (world.root / "m" / "2" / "model.onnx").symlink_to(elsewhere / "model.onnx")

    until(lambda: ("m", "2") in world.index())

    assert "symbolic link" in world.index()["m", "2"][1]
    assert world.ask() == (1, 1)


def test_a_repository_that_is_away_for_a_moment_takes_nothing_out_of_service(world):
    with structlog.testing.capture_logs() as log:
        world.root.rename(world.root.parent / "away")
        world.gateway.repository._wake.set()
        until(lambda: any(line["event"] == "repository_unreadable" for line in log))
    assert world.ask() == (1, 1)

    (world.root.parent / "away").rename(world.root)
    world.gateway.repository._wake.set()
    version(world.root, 2)
    world.gateway.repository._wake.set()

    until(lambda: world.serving() == [2])


def test_without_control_nothing_changes(root):
    version(root, 1)
    world = World(root, model_control_mode="none")
    try:
        version(root, 2)
        world.gateway.repository._wake.set()

        with pytest.raises(triton.InferenceServerException) as refused:
            world.client.load_model("m")
        assert refused.value.status() == "StatusCode.UNAVAILABLE"
        assert world.ask() == (1, 1)
    finally:
        world.close()


def test_explicit_control_loads_and_unloads_on_request(root):
    version(root, 1)
    version(root, 3, name="other")
    world = World(root, model_control_mode="explicit")
    try:
        assert world.serving() == world.serving("other") == []
        world.client.load_model("m")
        assert world.ask() == (1, 1)

        version(root, 2)
        world.client.load_model("m")
        assert world.ask() == (2, 2)

        version(root, 4, broken=True)
        with pytest.raises(triton.InferenceServerException, match="ONNX checker"):
            world.client.load_model("m")
        assert world.ask() == (2, 2)

        world.client.unload_model("m")
        assert world.serving() == world.serving("other") == []
        with pytest.raises(triton.InferenceServerException, match="no such model"):
            world.client.load_model("nobody")
    finally:
        world.close()


def test_a_load_that_is_asked_for_while_the_server_stops_is_refused_at_once(root):
    version(root, 1)
    world = World(root, model_control_mode="explicit")
    world.close()

    with pytest.raises(Draining, match="stopping"):
        world.gateway.repository.load("m", 60)


def test_an_explicit_load_says_what_it_can_when_the_repository_is_away(root):
    version(root, 1)
    world = World(root, model_control_mode="explicit")
    try:
        world.client.load_model("m")
        root.rename(root.parent / "away")
        for change in (world.client.load_model, world.client.unload_model):
            with pytest.raises(triton.InferenceServerException) as refused:
                change("m")
            assert refused.value.status() == "StatusCode.FAILED_PRECONDITION"
            assert refused.value.message() == "the model repository cannot be read"
        assert world.ask() == (1, 1)
        (root.parent / "away").rename(root)
    finally:
        world.close()


@contextlib.contextmanager
def callers(world, count=8):
    """Let clients ask all the time; yield (version, y / x) of each answer, and the failures."""
    answers, failures = [], []
    leaving = threading.Event()

    def call():
        with triton.InferenceServerClient(world.gateway.grpc_address) as client:
            given = triton.InferInput("x", [1, 1], "FP32")
            given.set_data_from_numpy(np.ones((1, 1), np.float32))
            while not leaving.is_set():
                try:
                    result = client.infer("m", [given], client_timeout=10)
                except triton.InferenceServerException as error:
                    failures.append(error)
                    return
                number = int(result.get_response().model_version)
                answers.append((number, float(result.as_numpy("y")[0, 0])))

    threads = [threading.Thread(target=call) for _ in range(count)]
    for thread in threads:
        thread.start()
    try:
        yield answers, failures
    finally:
        leaving.set()
        for thread in threads:
            thread.join(10)


def test_requests_never_notice_a_reload(world):
    """A version as fast as they load while eight callers ask; each answer fits its version."""
    with callers(world) as (answers, failures):
        for number in range(2, 8):
            drop_with_manifest(world, number)
            until(lambda number=number: world.serving() == [number])
            until(lambda number=number: any(answer[0] == number for answer in answers[-200:]))

    assert failures == []
    assert all(number == factor for number, factor in answers)
    assert {number for number, _ in answers} == set(range(1, 8))


def test_a_stop_in_the_middle_of_a_load_loses_nothing_and_swaps_nothing(root, monkeypatch):
    version(root, 1)
    world = World(root)
    loading, go_on = threading.Event(), threading.Event()
    real = world.gateway.repository._load

    def slow(name, folder):
        loading.set()
        assert go_on.wait(20)
        return real(name, folder)

    monkeypatch.setattr(world.gateway.repository, "_load", slow)
    version(root, 2)
    assert loading.wait(10)
    assert world.ask() == (1, 1)
    before = world.gateway.catalog
    stopper = threading.Thread(target=world.close)
    stopper.start()
    until(lambda: not before.served()[0]._threads[0].is_alive())  # the requests come first
    go_on.set()
    stopper.join(20)

    assert not stopper.is_alive()
    assert world.gateway.catalog.find("m", "") is before.find("m", "")


def drop_with_manifest(world, number):
    staged = version(world.root.parent / f"staged{number}", number)
    add_manifest(staged)
    staged.rename(world.root / "m" / str(number))
    return number


def drop_slowly(world, number):
    staged = version(world.root.parent / f"staged{number}", number)
    data = (staged / "model.onnx").read_bytes()
    (world.root / "m" / str(number)).mkdir()
    with (world.root / "m" / str(number) / "model.onnx").open("wb") as file:
        for start in range(0, len(data), 40):
            file.write(data[start : start + 40])
            file.flush()
            time.sleep(SETTLE_S / 6)
    return number


def replace_in_place(world, number):
    newest = max(int(folder.name) for folder in (world.root / "m").iterdir())
    staged = version(world.root.parent / f"staged{number}", newest)
    (staged / "model.onnx").replace(world.root / "m" / str(newest) / "model.onnx")
    return newest


def drop_broken(world, number):
    version(world.root, number, broken=True)
    until(lambda: world.index().get(("m", str(number)), ("",))[0] == "UNAVAILABLE")
    shutil.rmtree(world.root / "m" / str(number))
    return world.serving()[-1]


def remove_newest(world, number):
    drop_with_manifest(world, number)
    until(lambda: world.serving() == [number])
    shutil.rmtree(world.root / "m" / str(number))
    return max(int(folder.name) for folder in (world.root / "m").iterdir())


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_minute_of_reloads_of_every_kind_under_load_fails_no_request(world):
    """A change every 2 s: moved in, copied slowly, replaced in place, broken, removed."""
    changes = [drop_with_manifest, drop_slowly, replace_in_place, drop_broken, remove_newest]
    with callers(world) as (answers, failures):
        for i in range(30):
            start_s = time.monotonic()
            expected = changes[i % len(changes)](world, i + 2)
            until(lambda expected=expected: world.serving() == [expected])
            time.sleep(max(0.0, 2 - (time.monotonic() - start_s)))

    assert failures == []
    assert len(answers) > 10_000
    assert all(number == factor for number, factor in answers)
    assert len({number for number, _ in answers}) > 15


def resident_mib():
    status = Path("/proc/self/status").read_text().splitlines()
    line = next(line for line in status if line.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_hundred_reloads_leave_no_memory_behind(root):
    width = 20_000
    version(root, 1, width=width)
    (root / "m" / "config.pbtxt").write_text("max_batch_size: 8")
    world = World(root)
    try:
        for number in range(2, 123):
            staged = version(root.parent / f"staged{number}", number, width=width)
            add_manifest(staged)
            staged.rename(root / "m" / str(number))
            until(lambda number=number: world.serving() == [number])
            assert world.ask(width=width) == (number, number)
            shutil.rmtree(root / "m" / str(number - 1))
            if number == 22:
                before_mib = resident_mib()
        assert (resident_mib() - before_mib) / 100 < 0.5
    finally:
        world.close()
