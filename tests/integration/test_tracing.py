"""A traced call from its caller to the collector, through one gateway or two."""

import threading
import time
from concurrent import futures

import grpc
import numpy as np
import pytest
import structlog
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.trace.v1.trace_pb2 import Status
from tritonclient.grpc import service_pb2, service_pb2_grpc

import headrace
from headrace.app import Gateway
from headrace.settings import load_settings
from headrace.v1 import prediction_service_pb2, prediction_service_pb2_grpc

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
TRACEPARENT = (("traceparent", f"00-{TRACE}-{SPAN}-01"),)


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """An OTLP collector that keeps everything, and hangs while it is told to."""

    def __init__(self):
        self.resources, self.spans = [], []
        self.answers = threading.Event()
        self.answers.set()
        self.asked = threading.Event()
        self.server = grpc.server(futures.ThreadPoolExecutor(4))
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(self, self.server)
        self.port = self.server.add_insecure_port("127.0.0.1:0")
        self.server.start()

    def Export(self, request, context):
        self.asked.set()
        assert self.answers.wait(60)
        for of in request.resource_spans:
            self.resources.append(of.resource)
            for scope in of.scope_spans:
                self.spans += scope.spans
        return trace_service_pb2.ExportTraceServiceResponse()

    def wait_for(self, condition):
        deadline_s = time.monotonic() + 15
        while not (found := condition(list(self.spans))):
            assert time.monotonic() < deadline_s, [span.name for span in self.spans]
            time.sleep(0.02)
        return found


@pytest.fixture
def collector(monkeypatch):
    collector = Collector()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{collector.port}")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER_ARG", "0")  # only who asks
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    yield collector
    collector.answers.set()
    collector.server.stop(0).wait()


@pytest.fixture
def serve(model_repository, feature_repo):
    """Return a function that starts a gateway; all are stopped."""
    running = []

    def start(**settings):
        gateway = Gateway(
            load_settings(
                {
                    "model_repository": model_repository,
                    "feature_repo": feature_repo,
                    "grpc_address": "127.0.0.1:0",
                    "http_address": "127.0.0.1:0",
                    **settings,
                }
            )
        )
        gateway.start()
        running.append(gateway)
        return gateway

    yield start
    for gateway in running:
        assert gateway.stop()


@pytest.fixture
def channels():
    """Return a function that connects to a gateway."""
    opened = []

    def connect(gateway):
        options = [("grpc.enable_http_proxy", 0)]
        opened.append(grpc.insecure_channel(gateway.grpc_address, options=options))
        return opened[-1]

    yield connect
    for channel in opened:
        channel.close()


def scores(rows=1, model="scores"):
    message = service_pb2.ModelInferRequest(model_name=model)
    message.inputs.add(name="x", datatype="FP32", shape=[rows, 4])
    message.raw_input_contents.append(np.ones((rows, 4), np.float32).tobytes())
    return message


def trips():
    message = prediction_service_pb2.PredictRequest(model_name="driver_trip")
    message.columns.add(name="driver_id").values.int64s.values.extend([1, 2])
    message.columns.add(name="distance").values.floats.values.extend([1.0, 2.0])
    return message


def of_trace(spans, trace=TRACE):
    return {span.name: span for span in spans if span.trace_id.hex() == trace}


@pytest.mark.alone
@pytest.mark.parametrize("ingress", ["completion-queue", "threads"])
def test_a_caller_finds_every_stage_under_its_span(collector, serve, channels, ingress):
    gateway = serve(ingress=ingress)
    stub = prediction_service_pb2_grpc.PredictionServiceStub(channels(gateway))
    reply = stub.Predict(trips(), metadata=TRACEPARENT, timeout=10)

    spans = collector.wait_for(lambda spans: len(of_trace(spans)) == 5 and of_trace(spans))

    request = spans["headrace.request"]
    assert request.parent_span_id.hex() == SPAN
    stages = ["batch.wait", "features.fetch", "backend.infer", "batch.reply"]
    assert {spans[name].parent_span_id for name in stages} == {request.span_id}
    took_ns = {
        name: span.end_time_unix_nano - span.start_time_unix_nano for name, span in spans.items()
    }
    total_ns = took_ns.pop("headrace.request")
    assert sum(took_ns.values()) == pytest.approx(total_ns, rel=0.05)
    assert abs(request.end_time_unix_nano / 1e9 - time.time()) < 30
    attributes = {pair.key: pair.value.string_value for pair in request.attributes}
    assert attributes["headrace.prediction_id"] == reply.prediction_id
    run = next(span for span in collector.spans if span.name == "batch.run")
    assert run.links[0].span_id == request.span_id
    assert request.links[0].span_id == run.span_id
    names = {pair.key: pair.value.string_value for pair in collector.resources[0].attributes}
    assert names["service.name"] == "headrace"


def test_the_operator_names_the_service(collector, serve, channels, monkeypatch):
    monkeypatch.setenv("OTEL_SERVICE_NAME", "valuations")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=staging")
    stub = service_pb2_grpc.GRPCInferenceServiceStub(channels(serve()))
    stub.ModelInfer(scores(), metadata=TRACEPARENT, timeout=10)
    collector.wait_for(of_trace)
    names = {pair.key: pair.value.string_value for pair in collector.resources[0].attributes}
    expected = {"service.name": "valuations", "deployment.environment.name": "staging"}
    assert (expected | {"service.version": headrace.__version__}).items() <= names.items()


def test_members_of_one_batch_share_its_span(collector, serve, channels):
    stub = service_pb2_grpc.GRPCInferenceServiceStub(channels(serve()))
    traces = [f"{number:032x}" for number in range(1, 5)]
    calls = [
        stub.ModelInfer.future(
            scores(model="patient"),
            metadata=(("traceparent", f"00-{trace}-{SPAN}-01"),),
            timeout=10,
        )
        for trace in traces
    ]
    for call in calls:
        call.result()

    members = collector.wait_for(
        lambda spans: (
            (m := [of_trace(spans, t).get("headrace.request") for t in traces]) and all(m) and m
        )
    )
    runs = [span for span in collector.spans if span.name == "batch.run"]
    linked = {link.span_id for run in runs for link in run.links}
    assert linked == {member.span_id for member in members}
    assert len(runs) < len(members), "the model waits for company"


@pytest.mark.parametrize("ingress", ["completion-queue", "threads"])
def test_each_message_of_a_sampled_stream_is_a_call_under_its_callers_span(
    collector, serve, channels, ingress
):
    channel = channels(serve(ingress=ingress))
    stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
    predictions = prediction_service_pb2_grpc.PredictionServiceStub(channel)
    list(stub.ModelStreamInfer(iter([scores()]), timeout=10))  # not asked for

    wanted = [scores(), scores(), scores(model="nobody")]
    list(stub.ModelStreamInfer(iter(wanted), metadata=TRACEPARENT, timeout=10))
    asked = prediction_service_pb2.StreamPredictRequest(request=trips())
    list(predictions.StreamPredict(iter([asked]), metadata=TRACEPARENT, timeout=10))

    def requests(spans):
        found = [span for span in spans if span.name == "headrace.request"]
        return found if len(found) >= 4 else None

    found = collector.wait_for(requests)
    assert {(span.trace_id.hex(), span.parent_span_id.hex()) for span in found} == {(TRACE, SPAN)}
    assert len({span.span_id for span in found}) == 4
    methods = [
        pair.value.string_value
        for span in found
        for pair in span.attributes
        if pair.key == "rpc.method"
    ]
    assert sorted(methods) == [
        "headrace.v1.PredictionService/StreamPredict",
        *["inference.GRPCInferenceService/ModelStreamInfer"] * 3,
    ]


def test_who_does_not_ask_leaves_no_span(collector, serve, channels):
    stub = service_pb2_grpc.GRPCInferenceServiceStub(channels(serve()))
    unsampled = (("traceparent", f"00-{'1' * 32}-{SPAN}-00"),)
    stub.ModelInfer(scores(), timeout=10)
    stub.ModelInfer(scores(), metadata=unsampled, timeout=10)
    stub.ModelInfer(scores(), metadata=TRACEPARENT, timeout=10)
    collector.wait_for(of_trace)
    assert {span.trace_id.hex() for span in collector.spans if span.name != "batch.run"} == {TRACE}


@pytest.mark.parametrize("ingress", ["completion-queue", "threads"])
def test_a_hundred_calls_that_are_answered_and_not_sampled_leave_no_line(
    collector, serve, channels, ingress
):
    channel = channels(serve(ingress=ingress))
    stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
    predictions = prediction_service_pb2_grpc.PredictionServiceStub(channel)
    with structlog.testing.capture_logs() as lines:
        for _ in range(40):
            stub.ModelInfer(scores(), timeout=10)
            predictions.Predict(trips(), timeout=10)
        assert len(list(stub.ModelStreamInfer(iter([scores()] * 20), timeout=10))) == 20
        with pytest.raises(grpc.RpcError):  # its line comes after all that were to come before
            stub.ModelInfer(scores(model="nobody"), timeout=10)
        collector.wait_for(lambda _: any(line.get("code") == "NOT_FOUND" for line in lines))

    assert [line["code"] for line in lines if line["event"] == "request"] == ["NOT_FOUND"]
    assert len(lines) < 10


@pytest.mark.parametrize(
    ("spoil", "status"),
    [
        (lambda message: setattr(message, "model_name", "nobody"), "NOT_FOUND"),
        (lambda message: setattr(message.inputs[0], "name", "z"), "INVALID_ARGUMENT"),
    ],
)
def test_a_refused_call_has_a_span_with_the_reason(collector, serve, channels, spoil, status):
    stub = service_pb2_grpc.GRPCInferenceServiceStub(channels(serve()))
    message = scores()
    spoil(message)
    with pytest.raises(grpc.RpcError):
        stub.ModelInfer(message, metadata=TRACEPARENT, timeout=10)
    span = collector.wait_for(of_trace)["headrace.request"]
    attributes = {pair.key: pair.value.string_value for pair in span.attributes}
    assert attributes["rpc.response.status_code"] == status
    assert span.status.message


def gather(model="gather"):
    """Ask for a row that the model does not have: it fails while it runs."""
    message = service_pb2.ModelInferRequest(model_name=model)
    message.inputs.add(name="x", datatype="INT64", shape=[1, 1])
    message.raw_input_contents.append(np.array([99], np.int64).tobytes())
    return message


def test_a_call_that_expires_in_the_queue_has_a_span(collector, serve, channels):
    stub = service_pb2_grpc.GRPCInferenceServiceStub(channels(serve()))
    late = scores(model="patient")
    late.parameters["timeout"].int64_param = 1
    with pytest.raises(grpc.RpcError):
        stub.ModelInfer(late, metadata=TRACEPARENT, timeout=10)
    span = collector.wait_for(of_trace)["headrace.request"]
    attributes = {pair.key: pair.value.string_value for pair in span.attributes}
    assert attributes["rpc.response.status_code"] == "DEADLINE_EXCEEDED"
    assert span.status.code == Status.STATUS_CODE_ERROR


def test_a_call_whose_caller_leaves_has_a_span_that_says_so(collector, serve, channels):
    gateway = serve()
    stub = service_pb2_grpc.GRPCInferenceServiceStub(channels(gateway))
    model = gateway.catalog.find("scores", "")
    busy, gate, infer = threading.Event(), threading.Event(), model._backend.infer

    def held_up(inputs):
        busy.set()
        assert gate.wait(30)
        return infer(inputs)

    model._backend.infer = held_up
    first = stub.ModelInfer.future(scores(), timeout=30)
    assert busy.wait(15)
    leaving = stub.ModelInfer.future(scores(), metadata=TRACEPARENT, timeout=30)
    collector.wait_for(lambda _: model.waiting == 1)

    leaving.cancel()

    span = collector.wait_for(of_trace)["headrace.request"]
    gate.set()
    first.result()
    attributes = {pair.key: pair.value.string_value for pair in span.attributes}
    assert attributes["rpc.response.status_code"] == "CANCELLED"
    assert span.status.message == "the caller left while the request waited"


def test_a_failed_batch_has_a_span_that_names_its_model(collector, serve, channels):
    stub = service_pb2_grpc.GRPCInferenceServiceStub(channels(serve()))
    with pytest.raises(grpc.RpcError):
        stub.ModelInfer(gather(), metadata=TRACEPARENT, timeout=10)
    span = collector.wait_for(of_trace)["headrace.request"]
    attributes = {pair.key: pair.value.string_value for pair in span.attributes}
    assert attributes["headrace.model"] == "gather"
    assert attributes["rpc.response.status_code"] == "INTERNAL"


def test_a_model_that_fails_names_the_trace(collector, serve, channels):
    stub = service_pb2_grpc.GRPCInferenceServiceStub(channels(serve()))
    with pytest.raises(grpc.RpcError) as failed:
        stub.ModelInfer(gather(), metadata=TRACEPARENT, timeout=10)
    assert failed.value.details().endswith(f", trace {TRACE}")


@pytest.fixture
def relay(serve, tmp_path):
    """Return a function that starts a gateway for a model of another one."""

    def start(behind, model):
        folder = tmp_path / "models" / "front" / "1"
        folder.mkdir(parents=True)
        (folder.parent / "config.pbtxt").write_text(
            'backend: "oip"\n'
            'parameters { key: "oip_address" value { string_value: '
            f'"{behind.grpc_address}" }} }}\n'
            f'parameters {{ key: "oip_model" value {{ string_value: "{model}" }} }}\n'
        )
        return serve(model_repository=tmp_path / "models", feature_repo=None)

    return start


def ours_and_theirs(collector):
    """Return the call's spans in the first gateway and in the second."""

    def both(spans):
        requests = [s for s in spans if s.name == "headrace.request" and s.trace_id.hex() == TRACE]
        return len(requests) == 2 and requests

    requests = collector.wait_for(both)
    ours = next(span for span in requests if span.parent_span_id.hex() == SPAN)
    return ours, next(span for span in requests if span is not ours)


def test_a_trace_goes_on_in_the_server_that_runs_the_model(collector, serve, channels, relay):
    stub = service_pb2_grpc.GRPCInferenceServiceStub(channels(relay(serve(), "scores")))
    stub.ModelInfer(scores(model="front"), metadata=TRACEPARENT, timeout=10)
    ours, theirs = ours_and_theirs(collector)
    infers = [span for span in collector.spans if span.name == "backend.infer"]
    called = next(span for span in infers if span.parent_span_id == ours.span_id)
    assert theirs.parent_span_id == called.span_id


def test_a_failure_in_the_server_that_runs_the_model_is_under_the_call(
    collector, serve, channels, relay
):
    stub = service_pb2_grpc.GRPCInferenceServiceStub(channels(relay(serve(), "gather")))
    with pytest.raises(grpc.RpcError):
        stub.ModelInfer(gather("front"), metadata=TRACEPARENT, timeout=10)
    ours, theirs = ours_and_theirs(collector)
    (called,) = [span for span in collector.spans if span.name == "backend.infer"]
    assert called.parent_span_id == ours.span_id
    assert theirs.parent_span_id == called.span_id
    assert {ours.status.code, called.status.code, theirs.status.code} == {Status.STATUS_CODE_ERROR}


def test_a_collector_that_is_away_or_hangs_costs_no_answer(collector, serve, channels):
    gateway = serve()
    stub = service_pb2_grpc.GRPCInferenceServiceStub(channels(gateway))
    collector.answers.clear()
    started_s = time.monotonic()
    for _ in range(200):
        stub.ModelInfer(scores(), metadata=TRACEPARENT, timeout=5)
    assert time.monotonic() - started_s < 5
    exporter = gateway.calls.exporter
    deadline_s = time.monotonic() + 15
    while not exporter.dropped:
        assert time.monotonic() < deadline_s
        time.sleep(0.05)
    collector.answers.set()
    collector.server.stop(0).wait()
    for _ in range(50):
        stub.ModelInfer(scores(), metadata=TRACEPARENT, timeout=5)


def test_a_call_that_fails_has_its_line_while_the_collector_hangs(
    collector, serve, channels, monkeypatch
):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "60")
    gateway = serve()
    stub = service_pb2_grpc.GRPCInferenceServiceStub(channels(gateway))
    collector.answers.clear()
    stub.ModelInfer(scores(), metadata=TRACEPARENT, timeout=5)
    assert collector.asked.wait(15)
    with structlog.testing.capture_logs() as lines:
        for _ in range(5):
            with pytest.raises(grpc.RpcError):
                stub.ModelInfer(scores(model="nobody"), metadata=TRACEPARENT, timeout=5)

        collector.wait_for(lambda _: [line.get("code") for line in lines].count("NOT_FOUND") == 5)

    assert not collector.answers.is_set()
    assert not collector.spans
    collector.answers.set()
    collector.wait_for(lambda spans: sum(s.name == "headrace.request" for s in spans) == 6)
    assert not gateway.calls.exporter.dropped


def test_a_collector_that_comes_back_gets_spans_again(collector, serve, channels, monkeypatch):
    monkeypatch.setattr("headrace.telemetry.tracing.PAUSE_S", 0.5)
    gateway = serve()
    stub = service_pb2_grpc.GRPCInferenceServiceStub(channels(gateway))
    collector.answers.clear()
    stub.ModelInfer(scores(), metadata=TRACEPARENT, timeout=5)
    deadline_s = time.monotonic() + 15
    while not gateway.calls.exporter.dropped:
        assert time.monotonic() < deadline_s
        time.sleep(0.05)
    collector.answers.set()

    def again(_spans):
        stub.ModelInfer(scores(), metadata=TRACEPARENT, timeout=5)
        return gateway.calls.exporter.exported

    collector.wait_for(again)


def test_an_unknown_failure_names_its_trace(collector, serve, channels, monkeypatch):
    from headrace.catalog import Catalog

    def broken(*_):
        raise RuntimeError("a bug")

    gateway = serve()
    monkeypatch.setattr(Catalog, "find", broken)
    stub = service_pb2_grpc.GRPCInferenceServiceStub(channels(gateway))
    with pytest.raises(grpc.RpcError) as failed:
        stub.ModelInfer(scores(), metadata=TRACEPARENT, timeout=5)
    assert failed.value.details() == f"internal error, trace {TRACE}"


def test_without_an_endpoint_nothing_is_traced(serve, monkeypatch):
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_ENDPOINT", raising=False)
    assert serve().calls.sample is None
