"""What is measured in reads of features: fifty floats in five views, and who serves them."""

import json
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pandas as pd
from feast import Entity, FeatureService, FeatureStore, FeatureView, Field, FileSource, ValueType
from feast.protos.feast.serving.ServingService_pb2 import GetOnlineFeaturesRequest
from feast.types import Float32, Int64

from headrace.v1 import prediction_service_pb2 as pb
from headrace.v1.feature_service_pb2 import GetOnlineFeaturesRequest as GetOnlineFeatures

VIEWS, WIDTH = 5, 10
ENTITIES = 5_000
SERVICE = "fifty"
HERE = Path(__file__).parent
FEAST = str(Path(sys.executable).with_name("feast"))


def write_repo(folder: Path, redis_port: int) -> None:
    """Apply the views and write every entity through Feast."""
    folder.mkdir()
    (folder / "feature_store.yaml").write_text(
        "project: bench\nprovider: local\nregistry: registry.db\n"
        f"online_store: {{type: redis, connection_string: '127.0.0.1:{redis_port}'}}\n"
        "entity_key_serialization_version: 3\n"
    )
    item = Entity(name="item", join_keys=["item_id"], value_type=ValueType.INT64)
    source = FileSource(name="unread", path="unread.parquet", timestamp_field="event_timestamp")
    rng = np.random.default_rng(17)
    now = datetime.now(UTC)
    views, tables = [], {}
    for number in range(VIEWS):
        fields = [f"f{number}_{i}" for i in range(WIDTH)]
        schema = [Field(name="item_id", dtype=Int64)]
        schema += [Field(name=field, dtype=Float32) for field in fields]
        name = f"view{number}"
        views.append(
            FeatureView(name=name, entities=[item], ttl=timedelta(0), schema=schema, source=source)
        )
        values = rng.standard_normal((ENTITIES, WIDTH)).astype(np.float32)
        table = pd.DataFrame(values, columns=fields)
        tables[name] = table.assign(item_id=np.arange(ENTITIES), event_timestamp=now)
    store = FeatureStore(repo_path=str(folder))
    store.apply([item, *views, FeatureService(name=SERVICE, features=views)])
    for name, table in tables.items():
        store.write_to_online_store(name, df=table)


def references() -> list[str]:
    """Return the fifty features: `feast listen` looks a service up anew in each request."""
    return [f"view{number}:f{number}_{i}" for number in range(VIEWS) for i in range(WIDTH)]


def feast_requests(rows: int, *, by_service: bool = False) -> list[bytes]:
    """Return requests in Feast's messages, for `rows` entities each."""
    template = GetOnlineFeaturesRequest()
    if by_service:
        template.feature_service = SERVICE
    else:
        template.features.val.extend(references())
    requests = []
    for chosen in ids(rows):
        request = GetOnlineFeaturesRequest()
        request.CopyFrom(template)
        for value in chosen:
            request.entities["item_id"].val.add(int64_val=value)
        requests.append(bytes(request.SerializeToString()))
    return requests


def packed_requests(rows: int) -> list[bytes]:
    """Return the same in Headrace's messages, by the service's name."""
    requests = []
    for chosen in ids(rows):
        column = pb.Column(int64s=pb.Int64Column(values=chosen))
        request = GetOnlineFeatures(
            feature_service=SERVICE, entities=[pb.InputColumn(name="item_id", values=column)]
        )
        requests.append(bytes(request.SerializeToString()))
    return requests


def json_requests(rows: int) -> list[bytes]:
    """Return the same for `feast serve`."""
    return [
        json.dumps({"features": references(), "entities": {"item_id": chosen}}).encode()
        for chosen in ids(rows)
    ]


def feast_listen(repo: Path, port: int) -> list[str]:
    """Return the command of Feast's gRPC server."""
    return [FEAST, "-c", str(repo), "listen", "--address", f"127.0.0.1:{port}"]


def feast_serve(repo: Path, port: int) -> list[str]:
    """Return the command of Feast's HTTP server."""
    return [
        *(FEAST, "-c", str(repo), "serve", "--host", "127.0.0.1", "--port", str(port)),
        *("--no-access-log", "--workers", "1"),
    ]


def feast_sdk(repo: Path) -> list[str]:
    """Return the command of Feast's SDK in a loop."""
    return [sys.executable, str(HERE / "feast_sdk.py"), str(repo)]


def ids(rows: int) -> list[list[int]]:
    """Return the entities of 256 requests, the same for whoever asks."""
    chosen: list[list[int]] = (
        np.random.default_rng(rows).integers(0, ENTITIES, (256, rows)).tolist()
    )
    return chosen
