"""`headrace features check` on stores that have everything that goes wrong with stores."""

import json
import socket
import struct
import time
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import pandas as pd
import pytest
import structlog
from feast import Entity, FeatureService, FeatureStore, FeatureView, Field, FileSource, ValueType
from feast.protos.feast.types.EntityKey_pb2 import EntityKey
from feast.protos.feast.types.Value_pb2 import Value
from feast.types import Float32, Int64, String
from redis import Redis
from redis_processes import alone, cluster, sentinel

from headrace.__main__ import main
from headrace.features.layout import key_prefix, value_head
from headrace.features.values import ValueType as V

PROJECT = "looked_at"
STRING = struct.pack("<I", V.STRING)
COLLISION = "f37660", "f43618"
"""Features of a view `v` whose fields have the same 32-bit hash."""

ONE = value_head(V.INT64, 8) + (1).to_bytes(8, "little")


def current(key, value=ONE, project=PROJECT):
    return key_prefix([key]) + value + project.encode()


@pytest.fixture(scope="module")
def registry(tmp_path_factory):
    """An applied repository without an address of its store."""
    root = tmp_path_factory.mktemp("registry")
    configure(root, "redis", "127.0.0.1:1")
    source = FileSource(name="unread", path="unread.parquet", timestamp_field="event_timestamp")
    driver = Entity(name="driver", join_keys=["driver_id"], value_type=ValueType.INT64)
    zone = Entity(name="zone", join_keys=["id*"], value_type=ValueType.STRING)

    def view(name, entities, *keys, **more):
        schema = [*keys, Field(name=f"{name}_value", dtype=Float32)]
        return FeatureView(
            name=name, entities=entities, schema=schema, source=source, ttl=timedelta(0), **more
        )

    own = Field(name="driver_id", dtype=Int64)
    views = [
        view("stats", [driver], own),
        view("kept_offline", [driver], own, online=False),
        view("switched_off", [driver], own, enabled=False),
        view("zones", [zone], Field(name="id*", dtype=String)),
        view("weather", []),
    ]
    served = [of for of in views if of.name != "switched_off"]
    store = FeatureStore(repo_path=str(root))
    store.apply([driver, zone, *views, FeatureService(name="all", features=served)])
    return root


def configure(root, redis_type, connection_string, version=3):
    (root / "feature_store.yaml").write_text(
        f"project: {PROJECT}\nprovider: local\nregistry: registry.db\n"
        f"online_store:\n  type: redis\n  redis_type: {redis_type}\n"
        f'  connection_string: "{connection_string}"\n  sentinel_master: features\n'
        f"entity_key_serialization_version: {version}\n"
    )


@pytest.fixture
def repo_at(registry, tmp_path):
    """Return the repository with a store's address."""

    def repo_at(connection_string, redis_type="redis", version=3):
        root = tmp_path / "repo"
        root.mkdir(exist_ok=True)
        (root / "registry.db").write_bytes((registry / "registry.db").read_bytes())
        configure(root, redis_type, connection_string, version)
        return root

    return repo_at


@pytest.fixture
def check(monkeypatch, capsys):
    monkeypatch.setattr("headrace.__main__.set_up_logs", lambda level: None)
    structlog.configure(logger_factory=structlog.ReturnLoggerFactory())

    def check(repo, *arguments):
        capsys.readouterr()
        code = main(["features", "check", "--feature-repo", str(repo), *arguments])
        printed = capsys.readouterr()
        return SimpleNamespace(
            code=code,
            out=printed.out,
            err=printed.err,
            report=json.loads(printed.out) if "--json" in arguments and code != 2 else None,
        )

    yield check
    structlog.reset_defaults()


def texts(report, severity):
    return [of["text"] for of in report["findings"] if of["severity"] == severity]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with alone("valkey", tmp_path_factory.mktemp("alone"), "--enable-debug-command", "yes") as of:
        yield of


@pytest.fixture
def redis(server):
    with Redis(port=server.port) as redis:
        redis.flushall()
        yield redis


@pytest.fixture
def repo(repo_at, server):
    return repo_at(f"127.0.0.1:{server.port}")


def write(repo, view, **columns):
    frame = pd.DataFrame({**columns, "event_timestamp": [datetime.now(UTC)]})
    FeatureStore(repo_path=str(repo)).write_to_online_store(view, df=frame)


def materialize_weather(repo):
    """Write the one row of a view without entities where materialization does."""
    store = FeatureStore(repo_path=str(repo))
    key = EntityKey(join_keys=["__dummy_id"], entity_values=[Value(string_val="")])
    row = key, {"weather_value": Value(float_val=1.0)}, datetime.now(UTC), None
    view = store.get_feature_view("weather")
    store._get_provider().online_write_batch(store.config, view, [row], lambda _: None)


@pytest.fixture
def filled(repo, redis):
    """All that is to have values has one."""
    write(repo, "stats", driver_id=[1], stats_value=[1.0])
    write(repo, "zones", **{"id*": ["a"]}, zones_value=[1.0])
    materialize_weather(repo)
    return repo


def test_a_store_with_all_that_it_should_have_is_fine(check, filled):
    done = check(filled, "--json")

    assert done.code == 0
    assert done.report["findings"] == []
    assert (done.report["keys_in_store"], done.report["keys"]) == (3, {"current": 3})


def test_off_a_terminal_nothing_is_cut_off(check, filled, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)

    out = check(filled).out

    (line,) = [line for line in out.splitlines() if "older than its TTL" in line]
    assert "newest seen" in line
    assert "…" not in out


@pytest.mark.parametrize("name", ["id", "d", "driver_id"])
def test_keys_of_version_2_are_found_however_short_their_names(check, filled, redis, name):
    redis.hset(STRING + name.encode() + ONE + PROJECT.encode(), "f", 1)

    done = check(filled, "--json")

    assert done.code == 1
    (error,) = texts(done.report, "error")
    assert error.startswith("1 keys were written by entity_key_serialization_version 2")


def test_keys_of_another_type_than_the_entitys_are_found_by_nobody(check, filled, redis):
    redis.hset(current("driver_id", value_head(V.INT32, 4) + b"\1\0\0\0"), "f", 1)

    done = check(filled, "--json")

    assert done.code == 1
    (error,) = texts(done.report, "error")
    assert "1 of 2 keys of driver_id that were looked at are INT32" in error
    assert "where the registry has INT64" in error
    assert next(of for of in done.report["groups"] if of["join_keys"] == "driver_id")["hashes"] == 1


def test_a_view_without_entities_that_was_not_materialized_is_told_of(check, filled):
    write(filled, "weather", weather_value=[2.0])

    done = check(filled, "--json")

    assert done.code == 1
    (error,) = texts(done.report, "error")
    assert error.startswith("1 keys have no join key and are found by no reader")


def test_a_view_without_values_is_told_of_but_not_what_is_never_written(check, repo, redis):
    write(repo, "stats", driver_id=[1], stats_value=[1.0])

    warnings = texts(check(repo, "--json").report, "warning")

    assert warnings == [
        "feature view 'weather' has no values in the store",
        "feature view 'zones' has no values in the store",
    ]


def test_a_small_view_among_many_keys_is_found(check, filled, redis):
    pipeline = redis.pipeline(transaction=False)
    for i in range(20_000):
        pipeline.set(f"session:{i}", 1)
    pipeline.execute()

    done = check(filled, "--json", "--keys", "300")

    assert sum(done.report["keys"].values()) == 300
    assert [view["hashes"] for view in done.report["views"] if view["view"] == "zones"] == [1]
    assert not [text for text in texts(done.report, "warning") if "no values" in text]


def test_how_far_was_looked_is_said_where_it_was_not_the_whole_store(check, repo, redis):
    redis.execute_command("DEBUG", "POPULATE", 30_000)

    warnings = texts(check(repo, "--json", "--keys", "100").report, "warning")

    assert "feature view 'stats' has no values in about 10,000 of 30,000 keys" in " ".join(warnings)


def test_two_features_with_one_field_name_are_an_error(check, repo_at, redis, server):
    root = repo_at(f"127.0.0.1:{server.port}")
    (root / "registry.db").unlink()
    source = FileSource(name="unread", path="unread.parquet", timestamp_field="event_timestamp")
    driver = Entity(name="driver", join_keys=["driver_id"], value_type=ValueType.INT64)
    first, second = COLLISION
    view = FeatureView(
        name="v",
        entities=[driver],
        schema=[Field(name="driver_id", dtype=Int64)]
        + [Field(name=name, dtype=Float32) for name in (first, second)],
        source=source,
    )
    FeatureStore(repo_path=str(root)).apply(
        [driver, view, FeatureService(name="one", features=[view[[first]]])]
    )

    done = check(root, "--json")

    assert done.code == 1
    assert f"features 'v:{first}' and 'v:{second}' have the same field name" in str(
        texts(done.report, "error")
    )


def test_projects_that_end_alike_are_told_of_once(check, filled, redis):
    redis.hset(current("driver_id", project="not_" + PROJECT), "f", 1)

    warnings = texts(check(filled, "--json").report, "warning")

    assert len([text for text in warnings if "ends like" in text]) == 1


def test_what_serve_refuses_is_an_error(check, repo_at, redis, server):
    done = check(repo_at(f"127.0.0.1:{server.port}", version=2), "--json")

    assert done.code == 1
    assert "`headrace serve` does not start: entity_key_serialization_version" in str(
        texts(done.report, "error")
    )


@pytest.mark.parametrize(
    ("connection_string", "redis_type", "words"),
    [
        pytest.param("127.0.0.1:1", "redis", "does not answer: ConnectionError", id="nobody"),
        pytest.param("127.0.0.1:1,127.0.0.1:2", "redis_cluster", "does not answer", id="no nodes"),
        pytest.param("127.0.0.1:1", "redis_sentinel", "does not answer", id="no Sentinel"),
        pytest.param("127.0.0.1:1,colour=red", "redis", "argument 'colour'", id="unknown option"),
        pytest.param("somewhere", "redis", "is not `host:port`", id="no port"),
        pytest.param("127.0.0.1:1,db=x", "redis", "db in connection_string", id="no database"),
    ],
)
def test_a_store_that_cannot_be_asked_is_one_line(
    check, repo_at, connection_string, redis_type, words
):
    done = check(repo_at(connection_string, redis_type))

    assert (done.code, done.out) == (2, "")
    assert words in done.err
    assert len(done.err.splitlines()) == 1


@pytest.mark.parametrize("redis_type", ["redis", "redis_cluster", "redis_sentinel"])
def test_a_store_that_hangs_is_given_up(check, repo_at, tmp_path, redis_type):
    with alone("valkey", tmp_path) as server, server.paused():
        done = check(repo_at(f"127.0.0.1:{server.port}", redis_type), "--timeout-s", "0.3")

    assert done.code == 2
    assert "does not answer" in done.err


@pytest.fixture
def silent():
    """Addresses of servers that take connections and never say a word."""
    with ExitStack() as exits:
        servers = [
            exits.enter_context(socket.create_server(("127.0.0.1", 0), backlog=128))
            for _ in range(3)
        ]
        yield [f"127.0.0.1:{server.getsockname()[1]}" for server in servers]


def test_silent_sentinels_are_given_up_after_a_second(check, repo_at, silent):
    repo = repo_at(",".join(silent), "redis_sentinel")
    started_s = time.monotonic()

    done = check(repo)

    # A second, and what opening a repository takes; redis-py alone would wait for tens of seconds.
    assert time.monotonic() - started_s < 20.0
    assert done.code == 2
    assert "none of 3 Sentinels in connection_string says within 1 s where master" in done.err
    assert len(done.err.splitlines()) == 1


def test_a_silent_sentinel_is_passed_over_and_a_name_that_they_do_not_know_is_told(
    check, repo_at, silent, tmp_path
):
    with sentinel("valkey", tmp_path) as (_, _, watcher):
        repo = repo_at(f"{silent[0]},127.0.0.1:{watcher.port}", "redis_sentinel")
        looked = check(repo, "--json")
        config = repo / "feature_store.yaml"
        config.write_text(config.read_text().replace("features", "models"))
        unknown = check(repo)

    assert (looked.code, looked.report["keys_in_store"]) == (0, 0)
    assert unknown.code == 2
    assert "no Sentinel knows where master 'models' is" in unknown.err


def user(redis, *rules):
    redis.execute_command("ACL", "SETUSER", "looker", "reset", "on", ">secret-1", "~*", *rules)


def test_a_login_that_is_refused_is_no_silence(check, repo_at, server, redis, tmp_path):
    user(redis)
    wrong = f"127.0.0.1:{server.port},username=looker,password=secret-2"

    done = check(repo_at(wrong))

    assert done.code == 2
    assert "refuses the login" in done.err
    assert "secret" not in done.err
    with alone("valkey", tmp_path) as locked:
        locked.call("CONFIG", "SET", "requirepass", "x")
        done = check(repo_at(f"127.0.0.1:{locked.port}"))
    assert done.code == 2
    assert "refuses the login" in done.err


@pytest.mark.parametrize("allowed", [(), ("+scan",)])
def test_a_user_who_may_not_look_is_told_what_it_takes(check, repo_at, server, filled, allowed):
    with Redis(port=server.port) as redis:
        user(redis, "+hello", "+client", *allowed)
    login = f"127.0.0.1:{server.port},username=looker,password=secret-1"

    done = check(repo_at(login))

    assert done.code == 2
    assert "SCAN and HMGET are needed" in done.err
    assert "has no permissions" in done.err or "NOPERM" in done.err


def test_a_user_who_may_only_read_learns_what_reading_tells(check, repo_at, server, filled):
    with Redis(port=server.port) as redis:
        user(redis, "+hello", "+client", "+scan", "+hmget")
    login = f"127.0.0.1:{server.port},username=looker,password=secret-1"

    done = check(repo_at(login), "--json")

    assert done.code == 0
    assert {view["view"] for view in done.report["views"] if view["hashes"]} == {
        "stats",
        "zones",
        "weather",
    }
    (warning,) = texts(done.report, "warning")
    assert "may not call DBSIZE, HLEN, OBJECT, TTL" in warning
    assert done.report["groups"][0]["encodings"] == {"unknown": 1}


def test_a_clusters_nodes_are_all_looked_at(check, repo_at, tmp_path):
    with cluster("valkey", tmp_path) as nodes:
        repo = repo_at(f"127.0.0.1:{nodes[0].port}", "redis_cluster")
        for i in range(30):
            write(repo, "stats", driver_id=[i], stats_value=[1.0])

        done = check(repo, "--json")

    assert done.code == 0
    assert (done.report["keys_in_store"], done.report["keys"]) == (30, {"current": 30})
    assert done.report["groups"][0]["hashes"] == 30


@pytest.mark.parametrize("keys", ["0", "-5", "many"])
def test_a_number_of_keys_that_is_none_is_refused(check, repo_at, capsys, keys):
    with pytest.raises(SystemExit) as refused:
        check(repo_at("127.0.0.1:1"), "--keys", keys)

    assert refused.value.code == 2
    assert "argument --keys: expected 1 to 1000000" in capsys.readouterr().err
