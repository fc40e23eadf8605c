"""Which ingress a server takes, and what it says when it is not the one asked for."""

import math

import grpc
import pytest
import structlog

from headrace.catalog import Catalog
from headrace.rpc.completion_queue import core, ingress, self_check, streams
from headrace.rpc.server import GrpcServer
from headrace.telemetry.calls import CallRecorder
from headrace.telemetry.metrics import Metrics


def _raise(*_):
    raise AttributeError("no such thing")


def server(ingress):
    return GrpcServer(
        host="127.0.0.1",
        port=0,
        ingress=ingress,
        catalog=lambda: catalog,
        repository=None,
        is_ready=lambda: True,
        calls=CallRecorder(Metrics()),
        metrics=Metrics(),
        max_message_bytes=10_000,
        max_concurrent_streams=100,
        with_reflection=False,
    )


catalog = Catalog([])


def answer_of(server):
    server.start()
    try:
        with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            hot = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
            with pytest.raises(grpc.RpcError) as refused:
                hot(b"\x0a\x06nobody", timeout=10)
            return refused.value.code()
    finally:
        server.refuse_new()
        server.stop(5)


@pytest.mark.parametrize("ingress", ["completion-queue", "threads"])
def test_the_ingress_that_is_asked_for_is_taken(ingress):
    with structlog.testing.capture_logs() as log:
        made = server(ingress)

    assert made.ingress.name == ingress
    assert log == []
    assert answer_of(made) is grpc.StatusCode.NOT_FOUND


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize(
    ("owner", "name", "value"),
    [
        pytest.param(self_check, "cygrpc", None, id="the module is gone"),
        pytest.param(ingress, "loop_thread", lambda state: None, id="the loop thread is not found"),
        pytest.param(ingress._Call, "_on_close", _raise, id="the close event has changed"),
        pytest.param(ingress._Call, "_on_sent", _raise, id="the status event has changed"),
        pytest.param(ingress, "FAR_FUTURE_S", math.inf, id="no deadline looks otherwise"),
        pytest.param(
            core, "_server", type("Changed", (), {"_ServerStage": None}), id="a name is gone"
        ),
        pytest.param(streams._Stream, "_on_message", _raise, id="a stream's message has changed"),
        pytest.param(streams._Stream, "_on_close", lambda *_: (None, ()), id="no stream ends"),
    ],
)
def test_a_grpcio_with_other_privates_is_served_on_threads_and_logged(
    monkeypatch, owner, name, value
):
    monkeypatch.setattr(owner, name, value)
    monkeypatch.setattr(self_check, "_SELF_CHECK_S", 0.5)
    with structlog.testing.capture_logs() as log:
        made = server("completion-queue")
    monkeypatch.undo()

    assert made.ingress.name == "threads"
    fell_back = [line for line in log if line["event"] == "ingress_fell_back"]
    assert len(fell_back) == 1
    assert fell_back[0]["log_level"] == "warning"
    assert fell_back[0]["reason"]
    assert fell_back[0]["grpcio"] == grpc.__version__
    assert answer_of(made) is grpc.StatusCode.NOT_FOUND
