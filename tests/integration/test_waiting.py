"""Callers who share a queue: company that is waited for, callers who leave, time that runs out."""

import time

import grpc
import numpy as np
import pytest
from tritonclient.grpc import service_pb2, service_pb2_grpc

pytestmark = pytest.mark.alone

DELAY_S = 0.5
"""What `patient` waits for company; see `model_files`."""


@pytest.fixture
def stub(gateway):
    with grpc.insecure_channel(gateway.grpc_address) as channel:
        yield service_pb2_grpc.GRPCInferenceServiceStub(channel)


@pytest.fixture
def counted(gateway):
    """Check the model's numbers since the test began; they follow the replies by a moment."""
    found = gateway.metrics.model("patient", "1")

    def now():
        return found.batches, found.batch_rows.total, found.requests

    before = now()

    def check(**expected):
        until(lambda: gateway.grpc.ingress.open_calls == 0)
        wanted = tuple(expected[name] for name in ("batches", "rows", "requests"))
        until(lambda: tuple(a - b for a, b in zip(now(), before, strict=True)) == wanted)

    return check


def until(condition, timeout_s=10.0):
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "it did not happen"
        time.sleep(0.002)


def waiting(gateway):
    return gateway.catalog.find("patient", "").waiting


def request(number, rows=1, timeout_us=0):
    message = service_pb2.ModelInferRequest(model_name="patient")
    message.inputs.add(name="x", datatype="FP32", shape=[rows, 4])
    message.raw_input_contents.append(np.full((rows, 4), number, np.float32).tobytes())
    if timeout_us:
        message.parameters["timeout"].int64_param = timeout_us
    return message


def result(future):
    return np.frombuffer(future.result().raw_output_contents[0], np.float32).tolist()


def test_a_preferred_batch_does_not_wait_for_the_delay(stub, counted):
    start_s = time.perf_counter()

    futures = [stub.ModelInfer.future(request(i), timeout=10) for i in range(4)]

    assert [result(future) for future in futures] == [[0], [4], [8], [12]]
    assert time.perf_counter() - start_s < DELAY_S
    counted(batches=1, rows=4, requests=4)


def test_rows_count_towards_a_preferred_batch_and_not_requests(stub, counted):
    start_s = time.perf_counter()

    futures = [stub.ModelInfer.future(request(i, rows=2), timeout=10) for i in range(2)]

    assert [result(future) for future in futures] == [[0, 0], [4, 4]]
    assert time.perf_counter() - start_s < DELAY_S
    counted(batches=1, rows=4, requests=2)


def test_a_lonely_request_goes_when_the_delay_is_over(stub, counted):
    start_s = time.perf_counter()

    assert result(stub.ModelInfer.future(request(1), timeout=10)) == [4]

    assert time.perf_counter() - start_s >= DELAY_S
    counted(batches=1, rows=1, requests=1)


def test_a_caller_who_cancels_costs_nothing_and_does_not_disturb_its_batch(gateway, stub, counted):
    staying = [stub.ModelInfer.future(request(1), timeout=10)]
    leaving = stub.ModelInfer.future(request(2), timeout=10)
    staying.append(stub.ModelInfer.future(request(3), timeout=10))
    until(lambda: waiting(gateway) == 3)

    leaving.cancel()

    assert [result(future) for future in staying] == [[4], [12]]
    counted(batches=1, rows=2, requests=2)


def test_a_deadline_before_the_end_of_the_delay_is_kept(gateway, stub, counted):
    hurried = stub.ModelInfer.future(request(1, timeout_us=int(DELAY_S * 0.5e6)), timeout=10)
    until(lambda: waiting(gateway) == 1)
    company = stub.ModelInfer.future(request(2), timeout=10)

    assert [result(hurried), result(company)] == [[4], [8]]
    counted(batches=1, rows=2, requests=2)


def test_tritons_timeout_parameter_is_a_deadline_in_the_queue(stub, counted):
    with pytest.raises(grpc.RpcError) as late:
        stub.ModelInfer(request(1, timeout_us=1), timeout=10)

    # Which, depends on whether anything is known of the model yet: that it takes longer.
    codes = grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.RESOURCE_EXHAUSTED
    assert late.value.code() in codes
    counted(batches=0, rows=0, requests=0)


def test_a_lost_connection_takes_its_requests_out_of_the_queue(gateway, stub, counted):
    with grpc.insecure_channel(
        gateway.grpc_address, [("grpc.use_local_subchannel_pool", 1)]
    ) as other:
        gone = service_pb2_grpc.GRPCInferenceServiceStub(other).ModelInfer.future(
            request(1), timeout=10
        )
        until(lambda: waiting(gateway) == 1)
    staying = stub.ModelInfer.future(request(2), timeout=10)

    assert gone.code() is grpc.StatusCode.CANCELLED
    assert result(staying) == [8]
    counted(batches=1, rows=1, requests=1)
