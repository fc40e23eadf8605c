"""What callers have of one another, when a header says who they are."""

import contextlib
import threading
import time
import urllib.request
from collections import Counter
from typing import NamedTuple

import grpc
import numpy as np
import pytest
from feast.protos.feast.serving import ServingService_pb2 as feast_pb2
from live_objects import live, nothing_collected
from tritonclient.grpc import service_pb2

from headrace.app import Gateway
from headrace.batching.queued import QueuedRequest
from headrace.settings import load_settings
from headrace.v1 import feature_service_pb2, prediction_service_pb2

BURST = 5
BATCH = 4
MODEL_S = 0.02
"""What the slow model takes for a batch."""

EXHAUSTED = grpc.StatusCode.RESOURCE_EXHAUSTED
INFER = "/inference.GRPCInferenceService/ModelInfer"
STREAM_INFER = "/inference.GRPCInferenceService/ModelStreamInfer"
PREDICT = "/headrace.v1.PredictionService/Predict"
STREAM_PREDICT = "/headrace.v1.PredictionService/StreamPredict"
READS = [
    "/headrace.v1.FeatureService/GetOnlineFeatures",
    "/feast.serving.ServingService/GetOnlineFeatures",
    "/GrpcFeatureServer/GetOnlineFeatures",
]
INGRESSES = ["completion-queue", "threads"]


def open_gateway(ingress, root, **settings):
    return Gateway(
        load_settings(
            {
                "model_repository": root,
                "grpc_address": "127.0.0.1:0",
                "http_address": "127.0.0.1:0",
                "ingress": ingress,
                "caller_header": "x-caller",
                **settings,
            }
        )
    )


@pytest.fixture(scope="module", params=INGRESSES)
def metered(request, model_repository, feature_repo):
    """A gateway where each caller may ask for 5 rows, and then for hardly any."""
    gateway = open_gateway(
        request.param,
        model_repository,
        feature_repo=feature_repo,
        caller_rate_per_s=0.001,
        caller_burst=BURST,
    )
    gateway.start()
    yield gateway
    assert gateway.stop()


@pytest.fixture(scope="module")
def two_models(tmp_path_factory, model_files):
    """The repository of the slow gateways; what makes their models slow is `_slow_down`."""
    root = tmp_path_factory.mktemp("models")
    codel = "".join(
        f'parameters {{ key: "codel_{name}_ms" value {{ string_value: "{ms}" }} }}\n'
        for name, ms in (("target", 60), ("interval", 100))
    )
    for name, more in (("plain", ""), ("controlled", codel)):
        model_files.write_model(
            root,
            name,
            [model_files.helper.make_node("Identity", ["x"], ["y"])],
            [("x", "FP32", ["n", 1])],
            [("y", "FP32", ["n", 1])],
            config=f"max_batch_size: {BATCH}\n{more}",
        )
    return root


@pytest.fixture(scope="module", params=INGRESSES)
def slow(request, two_models):
    """A gateway whose model takes `MODEL_S` for a batch; what it ran is in `ran`."""
    gateway = open_gateway(request.param, two_models, max_queue_size=100)
    _slow_down(gateway, MODEL_S)
    gateway.start()
    yield gateway
    assert gateway.stop()


def _slow_down(gateway, takes_s):
    gateway.ran, gateway.gate = [], threading.Event()
    gateway.gate.set()
    for served in gateway.catalog.served():
        _slow_down_one(served._backend, gateway, takes_s)


def _slow_down_one(backend, gateway, takes_s):
    real = backend.infer

    def infer(inputs):
        gateway.ran.append(inputs["x"][:, 0].tolist())
        time.sleep(takes_s)
        assert gateway.gate.wait(20)
        return real(inputs)

    backend.infer = infer


def message(model, rows=1, number=0.0, columns=4):
    asked = service_pb2.ModelInferRequest(model_name=model)
    asked.inputs.add(name="x", datatype="FP32", shape=[rows, columns])
    asked.raw_input_contents.append(np.full((rows, columns), number, np.float32).tobytes())
    return asked


def prediction(rows=1):
    asked = prediction_service_pb2.PredictRequest(model_name="driver_score")
    asked.columns.add(name="driver_id").values.int64s.values.extend([1] * rows)
    return asked


def body(path, rows=1):
    """Return a serialized request for so many rows."""
    if path == INFER:
        return message("scores", rows).SerializeToString()
    if path == PREDICT:
        return prediction(rows).SerializeToString()
    if path == READS[0]:
        asked = feature_service_pb2.GetOnlineFeaturesRequest(feature_service="driver_features")
        asked.entities.add(name="driver_id").values.int64s.values.extend([1] * rows)
        return asked.SerializeToString()
    asked = feast_pb2.GetOnlineFeaturesRequest(feature_service="driver_features")
    for _ in range(rows):
        asked.entities["driver_id"].val.add(int64_val=1)
    return asked.SerializeToString()


@pytest.fixture
def channel(metered):
    with grpc.insecure_channel(metered.grpc_address) as channel:
        yield channel


@pytest.fixture
def me(request):
    """A caller of this test's own."""
    return [("x-caller", request.node.name)]


def refused(call):
    with pytest.raises(grpc.RpcError) as error:
        call()
    return error.value


def until(condition, timeout_s=20.0):
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "it did not happen"
        time.sleep(0.001)


@pytest.mark.parametrize("path", [INFER, PREDICT, *READS])
def test_who_has_used_up_his_quota_is_refused_until_it_has_grown(channel, me, path):
    call = channel.unary_unary(path)
    for _ in range(BURST):
        call(body(path), metadata=me, timeout=20)

    error = refused(lambda: call(body(path), metadata=me, timeout=20))

    assert error.code() is EXHAUSTED
    assert "the caller has used up its quota of 0.001 rows per second" in error.details()
    assert ("grpc-retry-pushback-ms", "60000") in error.trailing_metadata()
    call(body(path), metadata=[("x-caller", "somebody else " + me[0][1])], timeout=20)


@pytest.mark.parametrize("path", [INFER, PREDICT, *READS])
def test_quotas_are_counted_by_rows(channel, me, path):
    call = channel.unary_unary(path)
    call(body(path, BURST - 1), metadata=me, timeout=20)
    call(body(path, 3), metadata=me, timeout=20)  # one row is left: it may be overdrawn

    assert refused(lambda: call(body(path), metadata=me, timeout=20)).code() is EXHAUSTED


def test_a_caller_has_one_quota_for_everything(channel, me):
    for path in (INFER, PREDICT, *READS):
        channel.unary_unary(path)(body(path), metadata=me, timeout=20)

    for path in (INFER, PREDICT, *READS):
        error = refused(lambda path=path: channel.unary_unary(path)(body(path), None, me))
        assert error.code() is EXHAUSTED


def test_a_request_that_is_wrong_costs_nothing(channel, me):
    call = channel.unary_unary(INFER)
    for _ in range(2 * BURST):
        error = refused(lambda: call(message("scores", columns=3).SerializeToString(), 20, me))
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT

    call(body(INFER, BURST), metadata=me, timeout=20)


def test_each_message_of_a_stream_is_a_request_of_the_streams_caller(channel, me):
    stream = channel.stream_stream(
        STREAM_INFER,
        service_pb2.ModelInferRequest.SerializeToString,
        service_pb2.ModelStreamInferResponse.FromString,
    )
    answers = list(stream((message("scores") for _ in range(BURST + 3)), metadata=me, timeout=20))

    errors = [answer.error_message for answer in answers]
    assert errors[:BURST] == [""] * BURST
    assert all("has used up its quota" in error for error in errors[BURST:])
    assert len(errors) == BURST + 3
    unary = channel.unary_unary(INFER)
    assert refused(lambda: unary(body(INFER), metadata=me, timeout=20)).code() is EXHAUSTED


def test_a_streamed_prediction_over_quota_is_answered_with_the_code_and_the_stream_goes_on(
    channel, me
):
    stream = channel.stream_stream(
        STREAM_PREDICT,
        prediction_service_pb2.StreamPredictRequest.SerializeToString,
        prediction_service_pb2.StreamPredictResponse.FromString,
    )
    asked = (
        prediction_service_pb2.StreamPredictRequest(id=str(number), request=prediction())
        for number in range(BURST + 3)
    )

    codes = {answer.id: answer.error.code for answer in stream(asked, metadata=me, timeout=20)}

    assert Counter(codes.values()) == {0: BURST, EXHAUSTED.value[0]: 3}


def test_refusals_are_counted_by_reason_and_nobody_is_named(channel, metered, me):
    def count():
        with urllib.request.urlopen(f"http://{metered.http_address}/metrics") as page:
            text = page.read().decode()
        (line,) = [
            line
            for line in text.splitlines()
            if line.startswith('headrace_calls_refused_total{reason="quota"}')
        ]
        return float(line.rpartition(" ")[2]), text

    before, _ = count()
    call = channel.unary_unary(INFER)
    call(body(INFER, BURST), metadata=me, timeout=20)
    for _ in range(3):
        refused(lambda: call(body(INFER), metadata=me, timeout=20))

    after, text = count()
    assert after == before + 3
    assert me[0][1] not in text


@pytest.mark.parametrize("path", [INFER, PREDICT, READS[0]])
def test_requests_that_are_answered_are_freed_without_the_collector(metered, path, me):
    with grpc.insecure_channel(metered.grpc_address) as channel:
        call = channel.unary_unary(path)
        with nothing_collected():
            before = live(QueuedRequest)
            for number in range(300):
                whose = [("x-caller", f"{me[0][1]} {number // 4}")]
                with contextlib.suppress(grpc.RpcError):
                    call(body(path, 2), metadata=whose, timeout=20)

            until(lambda: live(QueuedRequest) - before < 100)  # each of them would be 225


@pytest.fixture
def ask(slow):
    """Begin a call of the slow model; the future is returned."""
    with grpc.insecure_channel(slow.grpc_address) as channel:
        call = channel.unary_unary(INFER)

        def begin(caller, number=0.0, model="plain"):
            asked = message(model, number=number, columns=1).SerializeToString()
            return call.future(asked, metadata=[("x-caller", caller)], timeout=30)

        begin("first", -1.0).result()
        begin("first", -1.0, "controlled").result()
        slow.ran.clear()
        yield begin
        slow.gate.set()


def code(future):
    with contextlib.suppress(grpc.RpcError):
        future.result()
    return future.code()


def waiting(gateway, model="plain"):
    return gateway.catalog.find(model, "").waiting


def arrived(gateway, model="plain"):
    """Return how many calls wait or have been in a batch, since `ask`."""
    return waiting(gateway, model) + sum(map(len, gateway.ran))


def test_who_asks_for_little_is_in_the_batch_after_a_flood_has_come(slow, ask):
    slow.gate.clear()
    flood = [ask("flood", 1.0) for _ in range(60)]
    until(lambda: arrived(slow) == 60)
    light = [ask(f"light {number}", 2.0) for number in range(3)]
    until(lambda: arrived(slow) == 60 + 3)

    under_way = len(slow.ran)
    slow.gate.set()
    for call in (*light, *flood):
        call.result()

    assert sorted(slow.ran[under_way]) == [1.0, 2.0, 2.0, 2.0]


def test_a_flood_fills_its_own_part_of_the_queue_and_costs_nobody_else_a_refusal(slow, ask):
    slow.gate.clear()
    flood = [ask("flood") for _ in range(150)]
    until(lambda: sum(call.done() for call in flood) + arrived(slow) == 150)
    refusals = [call for call in flood if call.done()]
    light = [ask(f"light {number}") for number in range(10)]
    until(lambda: waiting(slow) == 80 + 10)
    slow.gate.set()

    assert {code(call) for call in light} == {grpc.StatusCode.OK}
    assert {code(call) for call in refusals} == {EXHAUSTED}
    assert {code(call) for call in flood if call not in refusals} == {grpc.StatusCode.OK}


def test_in_a_queue_that_stands_callers_are_told_to_slow_down_and_the_rest_is_served(slow, ask):
    slow.gate.clear()
    calls = [ask(f"caller {number % 8}", model="controlled") for number in range(60)]
    until(lambda: arrived(slow, "controlled") == 60)
    slow.gate.set()

    outcomes = Counter(map(code, calls))

    assert set(outcomes) == {grpc.StatusCode.OK, EXHAUSTED}
    shed = [call for call in calls if call.code() is EXHAUSTED]
    assert {call.details() for call in shed} == {"too much has been waiting for too long"}
    assert slow.catalog.find("controlled", "")._batcher.shed == len(shed)


LIGHT_PER_S, QUOTA_PER_S, FLOOD_PER_S = 10, 16, 160
FLOODED_S = 0.05
"""What the flooded model takes for a batch: of what the flood asks it can serve half."""

CLEARLY = 3
"""So many times as long the same caller must wait where nothing protects him; fifteen is usual."""


@pytest.mark.alone
@pytest.mark.parametrize("quota_per_s", [None, QUOTA_PER_S], ids=["shares", "shares and quotas"])
def test_a_caller_beside_a_flood_waits_far_less_than_where_nobody_knows_who_calls(
    two_models, quota_per_s
):
    """Open loop, of ten times the quota. Both are measured here, on the same kind of gateway."""
    protected = flooded(two_models, caller_rate_per_s=quota_per_s)
    unprotected = flooded(two_models, caller_header=None)

    assert set(protected.light_codes) == set(unprotected.light_codes) == {grpc.StatusCode.OK}
    assert CLEARLY * np.median(protected.light_s) < np.median(unprotected.light_s)
    assert CLEARLY * max(protected.light_s) < max(unprotected.light_s)


@pytest.mark.alone
def test_who_asks_for_ten_times_his_quota_is_refused_the_rest_and_nobody_else_is_any(two_models):
    codes = flooded(two_models, caller_rate_per_s=QUOTA_PER_S)

    assert codes.flood_codes[EXHAUSTED] > codes.flood_codes[grpc.StatusCode.OK] > 0
    assert set(codes.light_codes) == {grpc.StatusCode.OK}


class Heard(NamedTuple):
    """What two callers heard: codes by how often, and how long one of them waited."""

    light_s: list[float]
    light_codes: Counter
    flood_codes: Counter


def flooded(root, **settings):
    """Flood a slow model of a gateway with these settings while somebody else asks for little."""
    gateway = open_gateway("completion-queue", root, **settings)
    _slow_down(gateway, FLOODED_S)
    gateway.start()
    try:
        return both(gateway)
    finally:
        assert gateway.stop()


def both(gateway, for_s=2.0):
    """Send a light caller's requests and a flood's, each when it is due."""
    heard = Heard([], Counter(), Counter())
    asked = message("plain", columns=1).SerializeToString()
    due = sorted(
        (number / rate_per_s, caller)
        for caller, rate_per_s in (("light", LIGHT_PER_S), ("flood", FLOOD_PER_S))
        for number in range(int(for_s * rate_per_s))
    )
    with grpc.insecure_channel(gateway.grpc_address) as channel:
        call = channel.unary_unary(INFER)
        call(asked, metadata=[("x-caller", "first")], timeout=20)
        began_s, calls = time.perf_counter(), []
        for at_s, caller in due:
            time.sleep(max(0.0, began_s + at_s - time.perf_counter()))
            sent_s = time.perf_counter()
            future = call.future(asked, metadata=[("x-caller", caller)], timeout=60)
            calls.append((future, caller))
            if caller == "light":
                future.add_done_callback(
                    lambda _, sent_s=sent_s: heard.light_s.append(time.perf_counter() - sent_s)
                )
        for future, caller in calls:
            codes = heard.light_codes if caller == "light" else heard.flood_codes
            codes[code(future)] += 1
        until(lambda: len(heard.light_s) == heard.light_codes.total())
    return heard
