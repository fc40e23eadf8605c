"""On-demand features by every way that features are served."""

import json
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import pytest
import structlog
import tritonclient.grpc as triton
from feast.protos.feast.serving.GrpcServer_pb2_grpc import GrpcFeatureServerStub
from feast.protos.feast.serving.ServingService_pb2 import GetOnlineFeaturesRequest
from feast.type_map import python_values_to_proto_values
from onnx import helper
from ride_repo import write_ride_repo

import headrace.__main__
from headrace.app import Gateway
from headrace.features.plan import FeatureStatus
from headrace.settings import load_settings
from headrace.v1 import feature_service_pb2 as pb
from headrace.v1 import feature_service_pb2_grpc as pb_grpc


@pytest.fixture(scope="module")
def gateway(tmp_path_factory, valkey, model_files):
    repo, models = tmp_path_factory.mktemp("rides"), tmp_path_factory.mktemp("models")
    write_ride_repo(repo, f"{{type: redis, connection_string: '127.0.0.1:{valkey.port},db=7'}}")
    order = '[\\"metres\\", \\"distance\\"]'
    model_files.write_model(
        models,
        "far",
        [helper.make_node("Identity", ["x"], ["y"])],
        [("x", "FP32", ["n", 2])],
        [("y", "FP32", ["n", 2])],
        config=f"""
            max_batch_size: 16
            parameters {{ key: "feature_service" value {{ string_value: "request_only" }} }}
            parameters {{ key: "feature_order" value {{ string_value: "{order}" }} }}
        """,
    )
    gateway = Gateway(
        load_settings(
            {
                "model_repository": models,
                "feature_repo": repo,
                "grpc_address": "127.0.0.1:0",
                "http_address": "127.0.0.1:0",
                "on_demand_modules": "ride_views",
            }
        )
    )
    gateway.start()
    yield gateway
    assert gateway.stop(), "requests were cut off"


@pytest.fixture
def channel(gateway):
    with grpc.insecure_channel(gateway.grpc_address) as channel:
        yield channel


def metres(channel, *kilometres, timeout=10):
    request = pb.GetOnlineFeaturesRequest(feature_service="request_only")
    values = {"distance": ("doubles", kilometres), "is_night": ("bools", [True] * len(kilometres))}
    values["note"] = ("strings", [""] * len(kilometres))
    for name, (kind, own) in values.items():
        column = request.entities.add(name=name).values
        getattr(column, kind).values.extend(own)
    reply = pb_grpc.FeatureServiceStub(channel).GetOnlineFeatures(request, timeout=timeout)
    return list(reply.features[0].values.doubles.values)


def test_feasts_client_sends_data_as_it_sends_keys(channel):
    request = GetOnlineFeaturesRequest(feature_service="quotes")
    for name, values in {
        "driver_id": [1, 4],
        "distance": [2, 1],  # Python's integers, where the view says Float64
        "is_night": [False, True],
        "note": ["a", "b"],
    }.items():
        request.entities[name].val.extend(python_values_to_proto_values(values))

    reply = GrpcFeatureServerStub(channel).GetOnlineFeatures(request, timeout=10)

    names = list(reply.metadata.feature_names.val)
    assert names[:3] == ["driver_id", "trips", "fare"]
    fare = reply.results[names.index("fare")]
    assert fare.values[0].double_val == 9.0
    assert list(fare.statuses) == [FeatureStatus.PRESENT, FeatureStatus.OUTSIDE_MAX_AGE]


def test_metadata_names_the_data_that_a_request_must_have(channel):
    metadata = pb_grpc.FeatureServiceStub(channel).GetFeatureMetadata(
        pb.GetFeatureMetadataRequest(feature_service="quotes"), timeout=10
    )

    assert [key.name for key in metadata.join_keys] == ["driver_id"]
    assert [(column.name, column.value_type) for column in metadata.data_columns] == [
        *(("distance", "DOUBLE"), ("is_night", "BOOL"), ("note", "STRING"))
    ]


def test_a_request_without_the_data_is_refused(channel):
    request = pb.GetOnlineFeaturesRequest(feature_service="quotes")
    request.entities.add(name="driver_id").values.int64s.values.append(1)

    with pytest.raises(grpc.RpcError) as refused:
        pb_grpc.FeatureServiceStub(channel).GetOnlineFeatures(request, timeout=10)

    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "request column 'distance' (DOUBLE) is missing; given 'driver_id'" in (
        refused.value.details()
    )


def test_one_whose_values_make_the_code_fail_fails_alone(channel):
    def ask(kilometres):
        try:
            return metres(channel, kilometres)
        except grpc.RpcError as error:
            return error.code()

    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(ask, [-1.0 if i % 10 == 0 else float(i) for i in range(200)]))

    assert found == [grpc.StatusCode.INTERNAL if i % 10 == 0 else [1000.0 * i] for i in range(200)]


def infer(client, kilometres):
    given = []
    for name, datatype, values in [
        ("distance", "FP64", np.array(kilometres)),
        ("is_night", "BOOL", np.zeros(len(kilometres), np.bool_)),
        ("note", "BYTES", np.array([b""] * len(kilometres), np.object_)),
    ]:
        tensor = triton.InferInput(name, (len(kilometres), 1), datatype)
        tensor.set_data_from_numpy(values.reshape(-1, 1))
        given.append(tensor)
    return client.infer("far", given).as_numpy("y").tolist()


def test_a_model_takes_what_is_computed_and_what_it_is_computed_from(gateway):
    with triton.InferenceServerClient(gateway.grpc_address) as client:
        assert infer(client, [1.5, 2.0]) == [[1500.0, 1.5], [2000.0, 2.0]]


def test_a_prediction_whose_values_make_the_code_fail_fails_alone(gateway):
    def ask(kilometres):
        try:
            return infer(client, [kilometres])[0][0]
        except triton.InferenceServerException as error:
            return error.status()

    with (
        triton.InferenceServerClient(gateway.grpc_address) as client,
        ThreadPoolExecutor(8) as pool,
    ):
        found = list(pool.map(ask, [-1.0 if i % 10 == 0 else float(i) for i in range(100)]))

    assert found == ["StatusCode.INTERNAL" if i % 10 == 0 else 1000.0 * i for i in range(100)]


def test_the_command_line_takes_the_data_as_it_takes_keys(gateway, monkeypatch, capsys, request):
    # Logs are the whole process's: the gateway's, which runs in it too, would land in what is read.
    monkeypatch.setattr(headrace.__main__, "set_up_logs", lambda _: None)
    structlog.configure(logger_factory=structlog.ReturnLoggerFactory())
    request.addfinalizer(structlog.reset_defaults)
    pairs = ["distance=1.5,2", "is_night=true,false", "note=a,b"]

    code = headrace.__main__.main(
        ["features", "get", "request_only", *pairs, "--address", gateway.grpc_address, "--json"]
    )

    assert code == 0
    assert "1500.0" in json.dumps(json.loads(capsys.readouterr().out))
