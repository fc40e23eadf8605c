"""Streams through a whole gateway: Triton's own client, raw ones, slow readers, many at once."""

import queue
import threading
import time

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
from google.rpc import error_details_pb2
from tritonclient.grpc import service_pb2, service_pb2_grpc

from headrace.rpc.exchange import MESSAGES_MAX
from headrace.v1 import prediction_service_pb2 as pb
from headrace.v1 import prediction_service_pb2_grpc as pb_grpc

STREAM = "/inference.GRPCInferenceService/ModelStreamInfer"
WAIT_S = 20


@pytest.fixture
def channel(gateway):
    with grpc.insecure_channel(gateway.grpc_address) as channel:
        yield channel


@pytest.fixture
def stub(channel):
    return service_pb2_grpc.GRPCInferenceServiceStub(channel)


@pytest.fixture
def predictions(channel):
    return pb_grpc.PredictionServiceStub(channel)


def until(condition, timeout_s=10.0):
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "it did not happen"
        time.sleep(0.002)


def nothing_is_left(gateway):
    ingress = gateway.grpc.ingress
    until(lambda: ingress.open_calls == 0 and ingress.open_streams == 0)


def tensor(number, name="x"):
    given = triton.InferInput(name, [1, 4], "FP32")
    given.set_data_from_numpy(np.full((1, 4), number, np.float32))
    return given


def infer_request(number, model="scores", request_id=""):
    message = service_pb2.ModelInferRequest(model_name=model, id=request_id)
    message.inputs.add(name="x", datatype="FP32", shape=[1, 4])
    message.raw_input_contents.append(np.full((1, 4), number, np.float32).tobytes())
    return message


def value(response):
    assert not response.error_message
    return np.frombuffer(response.infer_response.raw_output_contents[0], np.float32).tolist()


def predict_request(request_id, driver_id, model="driver_score", **more):
    request = pb.PredictRequest(model_name=model, **more)
    request.columns.add(name="driver_id").values.int64s.values.append(driver_id)
    return pb.StreamPredictRequest(id=request_id, request=request)


class TritonTalk:
    """Triton's client with a stream, and what it calls back with."""

    def __init__(self, client):
        self.heard = queue.SimpleQueue()
        self.client = client
        client.start_stream(lambda result, error: self.heard.put((result, error)))

    def hear(self):
        return self.heard.get(timeout=WAIT_S)


@pytest.fixture
def talk(client):
    talk = TritonTalk(client)
    yield talk
    client.stop_stream(cancel_requests=True)


def test_tritons_client_gets_an_answer_to_each_message(talk, gateway):
    for i in range(50):
        talk.client.async_stream_infer("scores", [tensor(i)], request_id=f"r{i}")
    answers = [talk.hear() for _ in range(50)]
    talk.client.stop_stream()

    assert all(error is None for _, error in answers)
    assert {result.get_response().id: result.as_numpy("y").item() for result, _ in answers} == {
        f"r{i}": 4.0 * i for i in range(50)
    }
    nothing_is_left(gateway)


def test_an_answer_says_which_version_gave_it_and_that_it_is_the_last_one(talk):
    talk.client.async_stream_infer("scores", [tensor(1)], enable_empty_final_response=True)

    result, error = talk.hear()

    assert error is None
    response = result.get_response()
    assert (response.model_name, response.model_version) == ("scores", "1")
    assert response.parameters["triton_final_response"].bool_param
    assert response.parameters["prediction_id"].string_param


def test_an_error_is_for_one_message_and_the_stream_goes_on(talk):
    talk.client.async_stream_infer("scores", [tensor(1, "wrong")], request_id="bad one")
    result, error = talk.hear()
    assert result is None
    assert "[request id: bad one]" in error.message()
    assert "wrong" in error.message()

    talk.client.async_stream_infer("nobody", [tensor(1)])
    _, error = talk.hear()
    assert "nobody" in error.message()

    talk.client.async_stream_infer("scores", [tensor(2)])
    result, error = talk.hear()
    assert error is None
    assert result.as_numpy("y").item() == 8


def test_an_error_has_the_id_and_the_model_of_its_request(stub):
    asked = infer_request(1, model="nobody", request_id="mine")
    asked.model_version = "3"

    (answer,) = stub.ModelStreamInfer(iter([asked]), timeout=WAIT_S)

    assert "nobody" in answer.error_message
    failed = answer.infer_response
    assert (failed.id, failed.model_name, failed.model_version) == ("mine", "nobody", "3")
    assert not failed.raw_output_contents


def test_bytes_that_are_no_message_are_answered_with_an_error(channel, stub):
    good = infer_request(1).SerializeToString()
    raw = channel.stream_stream(STREAM)

    answers = [
        service_pb2.ModelStreamInferResponse.FromString(answer)
        for answer in raw(iter([b"\x0a\xff", b"", good]), timeout=WAIT_S)
    ]

    assert "not a ModelInferRequest" in answers[0].error_message
    assert answers[1].error_message
    assert value(answers[2]) == [4]


def test_the_answer_is_what_the_unary_call_says(stub):
    asked = infer_request(7, request_id="same")

    (answer,) = stub.ModelStreamInfer(iter([asked]), timeout=WAIT_S)

    unary, streamed = stub.ModelInfer(asked, timeout=WAIT_S), answer.infer_response
    for response in (unary, streamed):
        del response.parameters["prediction_id"]
    del streamed.parameters["triton_final_response"]
    assert streamed == unary


def test_named_messages_are_answered_as_they_finish(stub):
    # `patient` waits half a second for company that does not come.
    asked = [infer_request(1, "patient", "slow"), infer_request(2, "scores", "fast")]

    answers = list(stub.ModelStreamInfer(iter(asked), timeout=WAIT_S))

    assert [answer.infer_response.id for answer in answers] == ["fast", "slow"]
    assert [value(answer) for answer in answers] == [[8], [4]]


def test_messages_without_an_id_are_answered_in_the_order_of_asking(stub):
    asked = [
        infer_request(1, "patient"),
        infer_request(2, "scores"),
        infer_request(3, "nobody"),
        infer_request(4, "scores", "named"),
        infer_request(5, "scores"),
    ]

    answers = list(stub.ModelStreamInfer(iter(asked), timeout=WAIT_S))

    assert answers[0].infer_response.id == "named"
    assert [value(answers[i]) for i in (1, 2, 4)] == [[4], [8], [20]]
    assert "nobody" in answers[3].error_message


def test_streams_and_unary_calls_share_a_batch(gateway, stub):
    # A batch of `patient` leaves when it has four rows.
    numbers = gateway.metrics.model("patient", "1")
    batches, rows = numbers.batches, numbers.batch_rows.total
    streams = [
        stub.ModelStreamInfer(iter([infer_request(i, "patient")]), timeout=WAIT_S) for i in (1, 2)
    ]
    unary = [stub.ModelInfer.future(infer_request(i, "patient"), timeout=WAIT_S) for i in (3, 4)]

    assert [value(next(stream)) for stream in streams] == [[4], [8]]
    assert [future.result().model_name for future in unary] == ["patient"] * 2
    until(lambda: (numbers.batches - batches, numbers.batch_rows.total - rows) == (1, 4))


def test_a_stream_that_is_cancelled_costs_nothing(gateway, stub):
    numbers = gateway.metrics.model("patient", "1")
    requests = numbers.requests
    waiting = gateway.catalog.find("patient", "")
    forever = queue.SimpleQueue()
    for i in range(3):  # a fourth would make a batch
        forever.put(infer_request(i, "patient"))
    stream = stub.ModelStreamInfer(iter(forever.get, None), timeout=WAIT_S)
    until(lambda: waiting.waiting == 3)

    stream.cancel()
    forever.put(None)

    nothing_is_left(gateway)
    until(lambda: waiting.waiting == 0)
    assert numbers.requests == requests


@pytest.fixture
def dear(gateway):
    """The model that waits for company, believed to take a quarter of a second."""
    cost = gateway.catalog.find("patient", "")._batcher._cost
    cost.__init__()
    cost.observe(1, 0.25)
    yield "patient"
    cost.__init__()


@pytest.mark.alone
def test_the_streams_deadline_is_that_of_each_message(stub, dear):
    # It would wait half a second for company, and be too late: it goes after a fifth.
    (answer,) = stub.ModelStreamInfer(iter([infer_request(1, dear)]), timeout=0.45)

    assert value(answer) == [4]


def test_a_message_may_have_less_time_than_its_stream(stub):
    hurried = infer_request(1, "patient", "hurried")
    hurried.parameters["timeout"].int64_param = 1
    asked = [hurried, infer_request(2, "scores", "other")]

    answers = {
        answer.infer_response.id: answer
        for answer in stub.ModelStreamInfer(iter(asked), timeout=WAIT_S)
    }

    # It is given up in its turn, or refused when it comes if the model is known to take longer.
    assert "deadline" in answers["hurried"].error_message
    assert not answers["hurried"].infer_response.outputs
    assert value(answers["other"]) == [8]


def test_two_hundred_streams_each_get_their_own_answers(gateway, stub):
    asked = {
        i: [infer_request(1_000 * i + j, request_id=f"{i}/{j}") for j in range(5)]
        for i in range(200)
    }
    streams = {i: stub.ModelStreamInfer(iter(asked[i]), timeout=WAIT_S) for i in asked}

    for i, stream in streams.items():
        assert {answer.infer_response.id: value(answer) for answer in stream} == {
            f"{i}/{j}": [4.0 * (1_000 * i + j)] for j in range(5)
        }
    nothing_is_left(gateway)


def test_predictions_come_with_the_id_that_the_caller_chose(predictions):
    asked = [predict_request(f"p{i}", i, include_features=True) for i in (1, 2)]
    asked.append(predict_request("", 1))

    answers = {
        answer.id: answer.response
        for answer in predictions.StreamPredict(iter(asked), timeout=WAIT_S)
    }

    assert answers["p1"].outputs[0].values.floats.values[:] == [4.5, 10.0]
    assert answers["p2"].outputs[0].values.floats.values[:] == [2.25, 20.0]
    assert [feature.name for feature in answers["p1"].features] == ["rating", "trips"]
    assert answers[""].outputs[0].values.floats.values[:] == [4.5, 10.0]
    assert not answers[""].features


def test_an_id_may_repeat(predictions):
    asked = [predict_request("same", 1)] * 3

    answers = list(predictions.StreamPredict(iter(asked), timeout=WAIT_S))

    assert [answer.id for answer in answers] == ["same"] * 3
    assert len({answer.response.prediction_id for answer in answers}) == 3


def test_a_prediction_that_fails_says_why_in_code_and_reason_and_the_stream_goes_on(predictions):
    asked = [
        predict_request("unknown", 1, model="nobody"),
        predict_request("strict", 3, model="driver_strict"),
        predict_request("good", 1),
    ]

    answers = {
        answer.id: answer for answer in predictions.StreamPredict(iter(asked), timeout=WAIT_S)
    }

    assert answers["good"].WhichOneof("answer") == "response"
    codes = {name: answer.error.code for name, answer in answers.items()}
    assert codes == {
        "unknown": grpc.StatusCode.NOT_FOUND.value[0],
        "strict": grpc.StatusCode.FAILED_PRECONDITION.value[0],
        "good": 0,
    }
    assert "nobody" in answers["unknown"].error.message
    info = error_details_pb2.ErrorInfo()
    assert answers["strict"].error.details[0].Unpack(info)
    assert (info.reason, info.domain) == ("MISSING_FEATURES", "headrace.v1")


def test_a_prediction_request_is_read_in_whatever_order_it_is_written(channel):
    raw = channel.stream_stream("/headrace.v1.PredictionService/StreamPredict")
    plain = predict_request("café", 1)
    first = pb.StreamPredictRequest(request=plain.request).SerializeToString()
    last = pb.StreamPredictRequest(id=plain.id).SerializeToString()

    answers = [
        pb.StreamPredictResponse.FromString(answer)
        for answer in raw(
            iter([first + last, plain.SerializeToString(), b"\x0a\x02\xff\xfe"]), timeout=WAIT_S
        )
    ]

    by_id = {answer.id: answer for answer in answers}
    assert sorted(answer.id for answer in answers) == ["", "café", "café"]
    assert by_id["café"].response.outputs[0].values.floats.values[:] == [4.5, 10.0]
    assert by_id[""].error.code == grpc.StatusCode.INVALID_ARGUMENT.value[0]


def test_errors_of_messages_are_counted_by_their_own_method(gateway, stub):
    def counted():
        text = gateway.metrics.collect()
        for family in text:
            for sample in family.samples:
                if sample.name == "headrace_rpc_errors_total" and sample.labels == {
                    "method": "ModelStreamInfer",
                    "code": "NOT_FOUND",
                }:
                    return sample.value
        return 0

    before = counted()

    list(stub.ModelStreamInfer(iter([infer_request(1, "nobody")] * 2), timeout=WAIT_S))

    assert counted() == before + 2


def test_open_streams_are_a_metric(gateway, stub):
    def gauge():
        families = {family.name: family for family in gateway.metrics.collect()}
        return families["headrace_rpc_open_streams"].samples[0].value

    until(lambda: gauge() == 0)
    more = queue.SimpleQueue()
    stream = stub.ModelStreamInfer(iter(more.get, None), timeout=WAIT_S)

    until(lambda: gauge() == 1)
    stream.cancel()
    more.put(None)
    until(lambda: gauge() == 0)


@pytest.mark.alone
def test_a_reader_that_does_not_read_slows_nobody_and_costs_little(gateway, stub):
    count = 5_000
    message = service_pb2.ModelInferRequest(model_name="echo_fp32")
    message.inputs.add(name="x", datatype="FP32", shape=[8, 2])
    message.raw_input_contents.append(np.ones((8, 2), np.float32).tobytes())
    message.id = "x" * 20_000  # comes back with the answer
    asked = [0]

    def endless():
        while asked[0] < count:
            asked[0] += 1
            yield message

    numbers = gateway.metrics.model("echo_fp32", "1")
    before = numbers.requests
    stream = stub.ModelStreamInfer(endless(), timeout=60)
    stuck, since_s = -1, time.monotonic()
    while time.monotonic() - since_s < 0.5:  # until nothing moves any more
        if numbers.requests != stuck:
            stuck, since_s = numbers.requests, time.monotonic()
        time.sleep(0.01)

    assert stuck - before < 1_000
    assert gateway.grpc.ingress.open_calls <= MESSAGES_MAX
    slowest_s = 0.0
    for i in range(100):
        start_s = time.perf_counter()
        fast = infer_request(i, "scores")
        assert stub.ModelInfer(fast, timeout=5).model_name == "scores"
        other = infer_request(i, "echo_fp32")
        other.inputs[0].shape[:] = [2, 2]
        assert stub.ModelInfer(other, timeout=5).model_name == "echo_fp32"
        slowest_s = max(slowest_s, time.perf_counter() - start_s)
    assert slowest_s < 1
    stream.cancel()
    nothing_is_left(gateway)


def test_an_open_stream_holds_no_thread_that_others_need(gateway, stub, client):
    idle = queue.SimpleQueue()
    streams = [stub.ModelStreamInfer(iter(idle.get, None), timeout=WAIT_S) for _ in range(64)]
    until(lambda: gateway.grpc.ingress.open_streams == 64)

    assert client.is_server_live()
    assert client.get_model_metadata("scores").name == "scores"
    assert stub.ModelInfer(infer_request(1), timeout=5).model_name == "scores"

    for stream in streams:
        stream.cancel()
        idle.put(None)
    nothing_is_left(gateway)


def test_streams_and_their_threads_come_and_go(gateway, stub):
    list(stub.ModelStreamInfer(iter([infer_request(1)]), timeout=WAIT_S))
    threads = threading.active_count()

    for _ in range(100):
        list(stub.ModelStreamInfer(iter([infer_request(1)]), timeout=WAIT_S))

    nothing_is_left(gateway)
    assert threading.active_count() <= threads + 2
