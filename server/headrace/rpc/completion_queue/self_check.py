"""Whether the installed grpcio can be relied on, tried with calls over loopback."""

import time
from collections.abc import Callable
from concurrent import futures

import grpc

from headrace.rpc.completion_queue.core import _server, cygrpc
from headrace.rpc.completion_queue.ingress import CompletionQueueIngress
from headrace.rpc.ingress import Accept, HotCall, HotMethod, HotStream, Metadata
from headrace.rpc.status import Status

_SELF_CHECK_S = 2.0
"""For each step."""


def unusable_because() -> str | None:
    """
    Try the private names of the installed grpcio with calls over loopback.

    Returns:
        None when everything works; else why not, for the log.
    """
    if cygrpc is None or _server is None:
        return "grpcio has no completion queue under the expected names"
    try:
        return _try_calls()
    except Exception as error:  # whatever a future grpcio does, the answer is the other ingress
        return f"{type(error).__name__}: {error}".partition("\n")[0]


def _try_calls() -> str | None:
    """Make a call of each kind that the server will meet; return what is not as it should be."""
    held: list[HotCall] = []

    def accept(call: HotCall, message: bytes) -> None:
        if message == b"hold":
            held.append(call)
        elif message == b"refuse":
            call.refuse(Status(grpc.StatusCode.ABORTED, "refused"))
        elif message == b"no deadline":
            call.reply(str(call.deadline_s).encode())
        else:
            call.reply(message)

    def begin(_metadata: Metadata) -> Accept:
        return accept

    path, stream_path = "/headrace.SelfCheck/Echo", "/headrace.SelfCheck/Echoes"
    server = grpc.server(futures.ThreadPoolExecutor(1), options=[("grpc.so_reuseport", 0)])
    ingress = CompletionQueueIngress(
        server, [HotMethod(path, accept)], [HotStream(stream_path, begin)]
    )
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        ingress.begin()
        if not ingress.is_alive:
            return "the loop thread was not found"
        # A proxy from the environment has no business between us and ourselves.
        options = [("grpc.enable_http_proxy", 0)]
        with grpc.insecure_channel(f"127.0.0.1:{port}", options=options) as channel:
            hot = channel.unary_unary(path, None, None)
            if hot(b"headrace", timeout=_SELF_CHECK_S) != b"headrace":
                return "an echo came back changed"
            if hot.future(b"no deadline").result(timeout=_SELF_CHECK_S) != b"inf":
                return "a call without a deadline has one"
            if hot.future(b"refuse", timeout=_SELF_CHECK_S).code() is not grpc.StatusCode.ABORTED:
                return "a refusal came back changed"
            echoes = channel.stream_stream(stream_path, None, None)
            if list(echoes(iter([b"one", b"two"]), timeout=_SELF_CHECK_S)) != [b"one", b"two"]:
                return "a stream's echoes came back changed"
            leaving = hot.future(b"hold", timeout=_SELF_CHECK_S)
            if not _soon(lambda: bool(held)):
                return "a call did not arrive"
            leaving.cancel()  # type: ignore[no-untyped-call]
            if not _soon(lambda: held[0].gone):
                return "a caller who left was not noticed"
            held[0].reply(b"too late")
        if not _soon(lambda: not ingress.open_calls and not ingress.open_streams):
            return "calls do not end"
        return None if ingress.is_alive else "the loop thread died"
    finally:
        server.stop(grace=0).wait(_SELF_CHECK_S)
        ingress.end()


def _soon(condition: Callable[[], bool]) -> bool:
    deadline_s = time.monotonic() + _SELF_CHECK_S
    while not condition():
        if time.monotonic() > deadline_s:
            return False
        time.sleep(0.001)
    return True
