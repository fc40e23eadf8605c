"""How Locust reaches gRPC: a user with a channel of its own, each call reported as a request."""

import time
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import grpc
import grpc.experimental.gevent
from locust import User

grpc.experimental.gevent.init_gevent()  # once, before the first channel

TIMEOUT_S = 5.0


class GrpcUser(User):
    """
    A caller on one connection.

    `--host` is `grpc://127.0.0.1:8500`. Subclasses call `timed`.
    """

    abstract = True

    def __init__(self, environment: Any) -> None:
        super().__init__(environment)
        address = urlsplit(self.host or "grpc://127.0.0.1:8500").netloc
        # Channels to one address share a connection unless their options differ.
        # A proxy from the environment would be measured too.
        options = [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_http_proxy", 0)]
        self.channel = grpc.insecure_channel(address, options=options)

    def on_stop(self) -> None:
        self.channel.close()

    def timed(self, name: str, method: Callable[..., Any], request: Any) -> Any:
        """Call, and report time, size and error under `name`; return the reply or None."""
        started_s = time.perf_counter()
        reply, error = None, None
        try:
            reply = method(request, timeout=TIMEOUT_S)
        except grpc.RpcError as failure:
            error = failure
        self.environment.events.request.fire(
            request_type="grpc",
            name=name,
            response_time=(time.perf_counter() - started_s) * 1e3,
            response_length=0 if reply is None else reply.ByteSize(),
            exception=error,
            context={},
        )
        return reply
