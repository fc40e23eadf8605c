"""Entity ids go in; the model sees the features of the online store."""

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton

from headrace.v1 import prediction_service_pb2 as pb
from headrace.v1 import prediction_service_pb2_grpc as pb_grpc

INVALID = grpc.StatusCode.INVALID_ARGUMENT
NAN = np.nan
# Driver 3 has a null rating, 4 is three days old where a day is allowed, 5 was never written.
DRIVERS = [1, 2, 3, 4, 5]


@pytest.fixture
def predict(gateway):
    with grpc.insecure_channel(gateway.grpc_address) as channel:
        yield pb_grpc.PredictionServiceStub(channel).Predict


def infer(client, model, drivers, dtype=np.int64, datatype="INT64", shape=None, more=()):
    ids = np.array(drivers, dtype).reshape(shape or (-1, 1))
    given = triton.InferInput("driver_id", ids.shape, datatype)
    given.set_data_from_numpy(ids)
    return client.infer(model, [given, *more])


def distance(values):
    array = np.array(values, np.float32).reshape(-1, 1)
    given = triton.InferInput("distance", array.shape, "FP32")
    given.set_data_from_numpy(array)
    return given


def request(model="driver_score", ids=(1,), **fields):
    message = pb.PredictRequest(model_name=model, **fields)
    message.columns.add(name="driver_id").values.int64s.values.extend(ids)
    return message


def test_the_feature_join_is_ordinary_open_inference_protocol(client):
    result = infer(client, "driver_score", DRIVERS)

    expected = [[4.5, 10], [2.25, 20], [NAN, 30], [NAN, NAN], [NAN, NAN]]
    np.testing.assert_array_equal(result.as_numpy("y"), np.array(expected, np.float32))
    parameters = result.get_response().parameters
    assert parameters["missing_features"].int64_param == 5
    assert parameters["stale_features"].int64_param == 2


def test_metadata_and_configuration_ask_for_entities_and_request_time_inputs(client):
    metadata = client.get_model_metadata("driver_trip")
    config = client.get_model_config("driver_trip").config

    assert [(t.name, t.datatype, list(t.shape)) for t in metadata.inputs] == [
        ("driver_id", "INT64", [-1, 1]),
        ("distance", "FP32", [-1, 1]),
    ]
    assert [(i.name, list(i.dims)) for i in config.input] == [("driver_id", [1]), ("distance", [1])]


def test_a_request_time_input_takes_its_place_among_the_features(client):
    result = infer(client, "driver_trip", [2, 1], more=[distance([7.0, 8.0])])

    np.testing.assert_array_equal(result.as_numpy("y"), [[2.25, 20, 7], [4.5, 10, 8]])


def test_the_default_policy_fills_in_the_fields_own_defaults(client):
    result = infer(client, "driver_default", DRIVERS)

    expected = [[4.5, 10], [2.25, 20], [3.5, 30], [3.5, 0], [3.5, 0]]
    np.testing.assert_array_equal(result.as_numpy("y"), expected)


def test_the_reject_policy_names_features_and_rows(client):
    with pytest.raises(triton.InferenceServerException) as refused:
        infer(client, "driver_strict", [1, 3, 2])

    assert refused.value.status() == "StatusCode.FAILED_PRECONDITION"
    assert "['rating'] in rows [1]" in refused.value.message()


def test_a_rejected_request_does_not_disturb_its_batch(gateway):
    with grpc.insecure_channel(gateway.grpc_address) as channel:
        ask = pb_grpc.PredictionServiceStub(channel).Predict
        pending = [ask.future(request("driver_strict", [1 + i % 3]), timeout=10) for i in range(60)]
        codes = [call.code() for call in pending]
        values = [c.result().outputs[0].values.floats.values[1] for c in pending if c.code() is OK]

    assert codes == [OK, OK, grpc.StatusCode.FAILED_PRECONDITION] * 20
    assert values == [10, 20] * 20


OK = grpc.StatusCode.OK


def test_int32_keys_are_widened(client):
    result = infer(client, "driver_score", [2], np.int32, "INT32")

    np.testing.assert_array_equal(result.as_numpy("y"), [[2.25, 20]])


def test_keys_may_come_without_their_second_dimension(client):
    result = infer(client, "driver_score", [2, 1], shape=(-1,))

    np.testing.assert_array_equal(result.as_numpy("y"), [[2.25, 20], [4.5, 10]])


@pytest.mark.parametrize(
    ("drivers", "dtype", "datatype", "words"),
    [
        pytest.param([1.0], np.float32, "FP32", "'driver_id' data-type is 'FP32'", id="wrong type"),
        pytest.param([b"1"], np.object_, "BYTES", "'driver_id' data-type is 'BYTES'", id="text"),
        pytest.param([1] * 13, np.int64, "INT64", "13 entities; at most 12", id="too many"),
    ],
)
def test_wrong_entities_are_refused(client, drivers, dtype, datatype, words):
    with pytest.raises(triton.InferenceServerException) as refused:
        infer(client, "driver_score", drivers, dtype, datatype)

    assert refused.value.status() == "StatusCode.INVALID_ARGUMENT"
    assert words in refused.value.message()


def test_predict_answers_in_columns(predict):
    reply = predict(request(ids=[2, 1]), timeout=5)

    assert reply.model_name == "driver_score"
    assert reply.model_version == 1
    assert reply.prediction_id
    assert [output.name for output in reply.outputs] == ["y"]
    assert list(reply.outputs[0].shape) == [2, 2]
    assert list(reply.outputs[0].values.floats.values) == [2.25, 20, 4.5, 10]
    assert not reply.features


def test_predict_tells_where_the_time_went(predict):
    timings = predict(request(), timeout=5).timings

    parts = [getattr(timings, name).ToTimedelta() for name in ("queue", "features", "infer")]
    assert all(part.total_seconds() > 0 for part in parts)
    assert timings.total.ToTimedelta() >= parts[0]


def test_predict_shows_what_the_model_saw(predict):
    reply = predict(request(ids=DRIVERS, include_features=True), timeout=5)

    rating, trips = reply.features
    present, null, not_found, outside = (
        pb.FEATURE_STATUS_PRESENT,
        pb.FEATURE_STATUS_NULL_VALUE,
        pb.FEATURE_STATUS_NOT_FOUND,
        pb.FEATURE_STATUS_OUTSIDE_MAX_AGE,
    )
    assert (rating.name, trips.name) == ("rating", "trips")
    assert list(rating.statuses) == [present, present, null, outside, not_found]
    assert list(trips.statuses) == [present, present, present, outside, not_found]
    assert list(trips.values.floats.values)[:4] == [10, 20, 30, 40]
    assert 0 <= trips.ages_s[0] < 600
    assert trips.ages_s[3] == pytest.approx(3 * 86_400, abs=600)
    assert np.isnan(trips.ages_s[4])
    assert (reply.missing_feature_count, reply.stale_feature_count) == (5, 2)


def test_predict_runs_models_without_features_too(predict):
    message = pb.PredictRequest(model_name="gather", output_names=["y"])
    message.columns.add(name="x").values.int64s.values.extend([2, 0])

    reply = predict(message, timeout=5)

    assert list(reply.outputs[0].values.floats.values) == [20, 0]


def bad(**changes):
    message = request()
    for name, value in changes.items():
        setattr(message, name, value)
    return message


def column(name, kind, values, model="driver_score"):
    message = pb.PredictRequest(model_name=model)
    getattr(message.columns.add(name=name).values, kind).values.extend(values)
    return message


def two_columns(second):
    message = request()
    message.columns.append(second.columns[0])
    return message


@pytest.mark.parametrize(
    ("message", "code", "words"),
    [
        pytest.param(
            pb.PredictRequest(model_name="driver_score"),
            INVALID,
            "missing required input(s) ['driver_id']",
            id="missing",
        ),
        pytest.param(
            column("driver_id", "strings", ["1"]), INVALID, "'driver_id' has strings", id="text"
        ),
        pytest.param(
            column("driver_id", "floats", [1.0]), INVALID, "'driver_id' has floats", id="wrong type"
        ),
        pytest.param(column("driver_id", "int64s", []), INVALID, "'driver_id'", id="no rows"),
        pytest.param(
            column("driver_id", "int64s", range(13)), INVALID, "13 entities", id="too many"
        ),
        pytest.param(
            two_columns(column("colour", "strings", ["red"])),
            INVALID,
            "unexpected inference input 'colour'",
            id="extra",
        ),
        pytest.param(two_columns(request()), INVALID, "'driver_id' already exists", id="repeated"),
        pytest.param(
            column("x", "floats", [1.0], "scores"), INVALID, "more than one value", id="a tensor"
        ),
        pytest.param(
            bad(model_name="nobody"), grpc.StatusCode.NOT_FOUND, "'nobody'", id="unknown model"
        ),
        pytest.param(
            bad(model_version=7), grpc.StatusCode.NOT_FOUND, "version 7", id="unknown version"
        ),
        pytest.param(bad(model_version=-7), INVALID, "'-7'", id="negative version"),
    ],
)
def test_bad_columns_are_refused_by_name(predict, message, code, words):
    with pytest.raises(grpc.RpcError) as refused:
        predict(message, timeout=5)

    assert refused.value.code() is code
    assert words in refused.value.details()


def test_int32_columns_are_accepted_for_int64_keys(predict):
    reply = predict(column("driver_id", "int32s", [2]), timeout=5)

    assert list(reply.outputs[0].values.floats.values) == [2.25, 20]
