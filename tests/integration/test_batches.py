"""How requests and batches differ in size, and what becomes of it, through whole gateways."""

import queue
import threading
import time

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
from tritonclient.grpc import service_pb2, service_pb2_grpc

from headrace.app import Gateway
from headrace.settings import load_settings
from headrace.v1 import prediction_service_pb2 as pb
from headrace.v1 import prediction_service_pb2_grpc as pb_grpc

WAIT_S = 20
INVALID = grpc.StatusCode.INVALID_ARGUMENT


def parameter(key, value):
    text = value.replace('"', '\\"')
    return f'parameters {{ key: "{key}" value {{ string_value: "{text}" }} }}\n'


IN_PARTS = "max_batch_size: 4\n" + parameter("max_request_rows", "40")
JOINED_IN_PARTS = IN_PARTS + parameter("feature_service", "driver_features")


def write_models(root, model_files):
    node = model_files.helper.make_node
    axis = {"axis": np.array([1], np.int64)}

    def write(name, nodes, datatype, width, out_datatype, out_width, config, constants=()):
        model_files.write_model(
            root,
            name,
            nodes,
            [("x", datatype, ["n", width])],
            [("y", out_datatype, ["n", out_width])],
            config=config,
            constants=constants,
        )

    total = [node("ReduceSum", ["x", "axis"], ["y"], keepdims=1)]
    same = [node("Identity", ["x"], ["y"])]
    write("sums", total, "FP32", 2, "FP32", 1, IN_PARTS, axis)
    write("words", same, "BYTES", 2, "BYTES", 2, IN_PARTS)
    write(
        "gather",  # fails on an index of 3 or more
        [node("Gather", ["table", "x"], ["y"])],
        *("INT64", 1, "FP32", 1, IN_PARTS),
        {"table": np.array([0.0, 10.0, 20.0], np.float32)},
    )
    model_files.write_model(
        root,
        "static",  # exported with one batch size: anything else is an error of ONNX Runtime's
        total,
        [("x", "FP32", [4, 2])],
        [("y", "FP32", [4, 1])],
        config="max_batch_size: 4\n"
        + parameter("allowed_batch_sizes", "[4]")
        + parameter("max_request_rows", "40"),
        constants=axis,
    )
    in_order = "max_batch_size: 1 instance_group { count: 2 } dynamic_batching {"
    write("in_order", same, "FP32", 1, "FP32", 1, in_order + " preserve_ordering: true }")
    write("as_it_comes", same, "FP32", 1, "FP32", 1, in_order + " }")
    few_sizes = "max_batch_size: 8\n" + parameter("allowed_batch_sizes", "[2, 8]")
    write("few_sizes", total, "FP32", 2, "FP32", 1, few_sizes, axis)
    model_files.write_model(
        root,
        "tokens",
        [
            node("Add", ["ids", "ids"], ["twice"]),
            node("ReduceSum", ["ids", "axis"], ["total"], keepdims=1),
        ],
        [("ids", "INT64", ["n", "m"])],
        [("twice", "INT64", ["n", "m"]), ("total", "INT64", ["n", 1])],
        config="max_batch_size: 8\n"
        + parameter("max_request_rows", "40")
        + parameter(
            "shape_buckets",
            '{"sizes": {"tokens": [4, 16]}, "inputs": {"ids": ["tokens"]},'
            ' "outputs": {"twice": ["tokens"]}}',
        ),
        constants=axis,
    )
    write("drivers", same, "FP32", 2, "FP32", 2, JOINED_IN_PARTS)
    strict = JOINED_IN_PARTS + parameter("missing_features", "reject")
    write("strict_drivers", same, "FP32", 2, "FP32", 2, strict)


@pytest.fixture(scope="module", params=["completion-queue", "threads"])
def gateway(request, tmp_path_factory, model_files, feature_repo):
    root = tmp_path_factory.mktemp("models")
    write_models(root, model_files)
    gateway = Gateway(
        load_settings(
            {
                "model_repository": root,
                "feature_repo": feature_repo,
                "grpc_address": "127.0.0.1:0",
                "http_address": "127.0.0.1:0",
                "ingress": request.param,
            }
        )
    )
    gateway.start()
    yield gateway
    assert gateway.stop()


@pytest.fixture
def client(gateway):
    with triton.InferenceServerClient(gateway.grpc_address) as client:
        yield client


@pytest.fixture
def channel(gateway):
    with grpc.insecure_channel(gateway.grpc_address) as channel:
        yield channel


@pytest.fixture
def held(gateway):
    """Hold a model's batches: call with its name; what ran is in the list it returns."""
    gate, backends = threading.Event(), []

    def hold(name):
        backend = gateway.catalog.find(name, "")._backend
        real, ran = backend.infer, []

        def infer(inputs):
            ran.append(len(next(iter(inputs.values()))))
            assert gate.wait(WAIT_S)
            return real(inputs)

        backends.append((backend, real))
        backend.infer = infer
        return ran

    hold.go_on = gate.set
    yield hold
    gate.set()
    for backend, real in backends:
        backend.infer = real


def until(condition, timeout_s=WAIT_S):
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "it did not happen"
        time.sleep(0.005)


def tensor(values, datatype="FP32", name="x"):
    given = triton.InferInput(name, values.shape, datatype)
    given.set_data_from_numpy(values)
    return given


def infer_request(model, values, datatype="FP32"):
    message = service_pb2.ModelInferRequest(model_name=model)
    message.inputs.add(name="x", datatype=datatype, shape=values.shape)
    message.raw_input_contents.append(values.tobytes())
    return message


def drivers_request(ids, model="drivers", **more):
    message = pb.PredictRequest(model_name=model, **more)
    message.columns.add(name="driver_id").values.int64s.values.extend(ids)
    return message


NUMBERS = np.arange(46, dtype=np.float32).reshape(23, 2)


def test_a_request_larger_than_a_batch_is_answered_whole(client, gateway, held):
    numbers = gateway.metrics.model("sums", "1")
    before = numbers.requests, numbers.batches
    ran = held("sums")
    held.go_on()

    result = client.infer("sums", [tensor(NUMBERS)], request_id="mine")

    np.testing.assert_array_equal(result.as_numpy("y"), NUMBERS.sum(1, keepdims=True))
    assert result.get_response().id == "mine"
    assert ran == [4, 4, 4, 4, 4, 3]
    until(lambda: (numbers.requests, numbers.batches) == (before[0] + 1, before[1] + 6))


def test_it_is_answered_whole_when_the_server_knows_its_like(client):
    for i in range(5):  # the third one is not parsed any more
        result = client.infer("sums", [tensor(NUMBERS + i)])
        np.testing.assert_array_equal(result.as_numpy("y"), (NUMBERS + i).sum(1, keepdims=True))


def test_texts_are_cut_between_rows(client):
    words = np.array([[b"a" * i, b"\x00b" * i] for i in range(11)], np.object_)

    result = client.infer("words", [tensor(words, "BYTES")])

    assert result.as_numpy("y").tolist() == words.tolist()


def test_more_rows_than_a_request_may_have_are_refused(client):
    with pytest.raises(triton.InferenceServerException, match="must be <= 40") as refused:
        client.infer("sums", [tensor(np.zeros((41, 2), np.float32))])

    assert refused.value.status() == "StatusCode.INVALID_ARGUMENT"


def test_one_row_that_the_model_cannot_run_fails_the_whole_request_and_no_other(client, channel):
    good = np.array([[i % 3] for i in range(23)], np.int64)
    bad = good.copy()
    bad[17] = 3
    ask = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer

    calls = [
        ask.future(infer_request("gather", bad if i == 1 else good, "INT64"), timeout=WAIT_S)
        for i in range(4)
    ]

    assert calls[1].code() not in (None, grpc.StatusCode.OK)
    for i in (0, 2, 3):
        answer = np.frombuffer(calls[i].result().raw_output_contents[0], np.float32)
        assert answer.tolist() == (10.0 * good[:, 0]).tolist()


def test_a_caller_who_leaves_takes_his_parts_with_him(gateway, channel, held):
    ran = held("sums")
    model = gateway.catalog.find("sums", "")
    ask = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer
    call = ask.future(infer_request("sums", NUMBERS), timeout=WAIT_S)
    until(lambda: ran and model.waiting == 5)

    call.cancel()

    until(lambda: model.waiting == 0)
    held.go_on()
    until(lambda: gateway.grpc.ingress.open_calls == 0)
    assert ran == [4]


@pytest.mark.parametrize("rows", [1, 3, 4, 23])
def test_a_model_of_one_batch_size_answers_any_number_of_rows(client, rows):
    result = client.infer("static", [tensor(NUMBERS[:rows])])

    np.testing.assert_array_equal(result.as_numpy("y"), NUMBERS[:rows].sum(1, keepdims=True))


def test_a_model_of_one_batch_size_is_described_as_any_other(client):
    metadata = client.get_model_metadata("static")

    assert [list(t.shape) for t in (*metadata.inputs, *metadata.outputs)] == [[-1, 2], [-1, 1]]


def test_batches_are_filled_up_to_an_allowed_size_and_it_is_counted(client, gateway):
    numbers = gateway.metrics.model("few_sizes", "1")
    before = numbers.padding.rows_added

    for rows in (1, 3, 2):
        result = client.infer("few_sizes", [tensor(NUMBERS[:rows])])
        np.testing.assert_array_equal(result.as_numpy("y"), NUMBERS[:rows].sum(1, keepdims=True))

    assert numbers.padding.rows_added == before + 1 + 5
    families = {family.name: family for family in gateway.metrics.collect()}
    samples = families["headrace_padding_rows"].samples
    assert {"model": "few_sizes", "version": "1"} in [sample.labels for sample in samples]


@pytest.mark.parametrize("model", ["in_order", "as_it_comes"])
def test_replies_keep_the_order_of_requests_where_the_model_says_so(client, gateway, model):
    backend = gateway.catalog.find(model, "")._backend
    real, others_ran = backend.infer, threading.Semaphore(0)

    def infer(inputs):
        if inputs["x"][0, 0] == 0:  # on one instance, while the other runs the rest
            for _ in range(3):
                assert others_ran.acquire(timeout=WAIT_S)
        else:
            others_ran.release()
        return real(inputs)

    heard = queue.SimpleQueue()
    backend.infer = infer
    try:
        client.start_stream(lambda result, error: heard.put((result, error)))
        for i in range(4):
            x = tensor(np.array([[i]], np.float32))
            client.async_stream_infer(model, [x], request_id=f"r{i}")
        answers = [heard.get(timeout=WAIT_S) for _ in range(4)]
        client.stop_stream()
    finally:
        backend.infer = real

    came = [result.as_numpy("y").item() for result, _ in answers]
    assert sorted(came) == [0, 1, 2, 3]
    assert (came == [0, 1, 2, 3]) == (model == "in_order")


def test_replies_that_are_held_are_counted(client, gateway, channel):
    model, numbers = gateway.catalog.find("in_order", ""), gateway.metrics.model("in_order", "1")
    real, begun, go_on = model._backend.infer, threading.Event(), threading.Event()

    def infer(inputs):
        if inputs["x"][0, 0] == 0:
            begun.set()
            assert go_on.wait(WAIT_S)
        return real(inputs)

    model._backend.infer = infer
    ask = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer
    calls = []
    try:
        for i in range(4):
            calls.append(ask.future(infer_request("in_order", np.array([[i]], np.float32))))
            assert begun.wait(WAIT_S)
            until(lambda i=i: numbers.order.held == i)
        assert not any(call.done() for call in calls)
    finally:
        go_on.set()
        model._backend.infer = real
    assert [call.result().raw_output_contents[0] for call in calls] == [
        np.float32(i).tobytes() for i in range(4)
    ]
    assert numbers.order.held == 0


def test_requests_of_different_lengths_share_a_batch(client, gateway, channel, held):
    ran = held("tokens")
    model = gateway.catalog.find("tokens", "")
    ask = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer
    texts = [np.arange(length, dtype=np.int64).reshape(1, -1) + 1 for length in (2, 7, 5, 16, 9)]
    calls = []
    for ids in texts:
        message = service_pb2.ModelInferRequest(model_name="tokens")
        message.inputs.add(name="ids", datatype="INT64", shape=ids.shape)
        message.raw_input_contents.append(ids.tobytes())
        calls.append(ask.future(message, timeout=WAIT_S))
        until(lambda: ran and model.waiting == len(calls) - 1)

    held.go_on()

    for ids, call in zip(texts, calls, strict=True):
        answer = call.result()
        assert [list(output.shape) for output in answer.outputs] == [list(ids.shape), [1, 1]]
        twice, total = (np.frombuffer(raw, np.int64) for raw in answer.raw_output_contents)
        assert twice.tolist() == (2 * ids[0]).tolist()
        assert total.tolist() == [ids.sum()]
    assert ran == [1, 4]


def test_a_longer_request_than_there_are_buckets_for_is_refused(client):
    for _ in range(4):  # and is so when the server knows its like
        with pytest.raises(triton.InferenceServerException, match="at most 16") as refused:
            client.infer("tokens", [tensor(np.zeros((1, 17), np.int64), "INT64", "ids")])
        assert refused.value.status() == "StatusCode.INVALID_ARGUMENT"


def test_a_request_may_be_padded_and_in_parts(client):
    ids = np.arange(19 * 5).reshape(19, 5)

    result = client.infer("tokens", [tensor(ids, "INT64", "ids")])

    np.testing.assert_array_equal(result.as_numpy("twice"), 2 * ids)
    np.testing.assert_array_equal(result.as_numpy("total"), ids.sum(1, keepdims=True))


def test_entities_of_a_large_request_keep_their_features_and_their_order(channel):
    predict = pb_grpc.PredictionServiceStub(channel).Predict
    ids = [1 + i % 4 for i in range(14)]

    reply = predict(drivers_request(ids, include_features=True), timeout=WAIT_S)

    rating = [4.5, 2.25, np.nan, np.nan]
    trips = [10, 20, 30, np.nan]
    (output,) = reply.outputs
    assert list(output.shape) == [14, 2]
    expected = [[rating[i - 1], trips[i - 1]] for i in ids]
    np.testing.assert_array_equal(
        np.array(output.values.floats.values, np.float32).reshape(14, 2), expected
    )
    assert (reply.missing_feature_count, reply.stale_feature_count) == (9, 6)
    features = {feature.name: feature for feature in reply.features}
    assert list(features["trips"].values.floats.values[:3]) == [10, 20, 30]
    day_s = 24 * 3600
    ages_s = np.array(features["trips"].ages_s)
    assert ((ages_s > 2 * day_s) == [i == 4 for i in ids]).all()
    assert (ages_s >= 0).all()


def test_missing_features_are_named_by_their_rows_in_the_whole_request(channel):
    predict = pb_grpc.PredictionServiceStub(channel).Predict

    with pytest.raises(grpc.RpcError) as refused:
        predict(drivers_request([1] * 9 + [3] + [2] * 5, "strict_drivers"), timeout=WAIT_S)

    assert refused.value.code() == grpc.StatusCode.FAILED_PRECONDITION
    assert "['rating'] in rows [9]" in refused.value.details()


def test_a_large_message_of_a_stream_is_answered_by_one(client, channel):
    heard = queue.SimpleQueue()
    client.start_stream(lambda result, error: heard.put((result, error)))
    client.async_stream_infer("sums", [tensor(NUMBERS)], request_id="large")
    client.async_stream_infer("sums", [tensor(NUMBERS[:1])], request_id="small")
    answers = [heard.get(timeout=WAIT_S) for _ in range(2)]
    client.stop_stream()

    assert all(error is None for _, error in answers)
    by_id = {result.get_response().id: result.as_numpy("y") for result, _ in answers}
    np.testing.assert_array_equal(by_id["large"], NUMBERS.sum(1, keepdims=True))
    np.testing.assert_array_equal(by_id["small"], [[1]])

    stream = pb_grpc.PredictionServiceStub(channel).StreamPredict
    asked = pb.StreamPredictRequest(id="p", request=drivers_request([1, 2] * 5))
    (reply,) = stream(iter([asked]), timeout=WAIT_S)
    assert reply.id == "p"
    assert list(reply.response.outputs[0].shape) == [10, 2]
