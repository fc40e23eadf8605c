"""grpcio's private names, and how calls are asked for.

`grpc.server`'s own loop thread polls the completion queue and runs any tag that is not one of its
own as `rpc_state, callbacks = tag(event)`. The tags in this package are bound methods: no pool
thread, no task and no future per call. What is relied on, tried on grpcio 1.85.1:

* a method registered with the core and not with the Python server is ours alone;
* a tag that raises kills the loop while the port stays open: no tag here may raise;
* `ReceiveCloseOnServer` in a batch of its own completes when the caller leaves or the deadline
  passes, and after a normal end too;
* `start_server_batch` may be called by any thread; when it returns an error nothing was started and
  the tag never comes;
* a message of None is a caller that left, one that sent too much, or one that sends no more; only
  the last comes with `success`.
"""

import threading
from typing import Any

import structlog

try:
    from grpc import _server
    from grpc._cython import cygrpc
except ImportError:  # a future grpcio: `unusable_because` says so
    _server = cygrpc = None

__all__ = ["FAR_FUTURE_S", "NO_STATE", "Taker", "_server", "cancel", "cygrpc", "loop_thread"]

_LOG = structlog.get_logger(__name__)

FAR_FUTURE_S = 1e15
"""A call without a deadline carries 9.2e18, not infinity."""

NO_STATE: tuple[None, tuple[()]] = (None, ())
"""What a tag returns."""


class Taker:
    """
    Asks C-core for calls of one method; a subclass begins each in `on_call`.

    Args:
        state: The server's.
        path: The method's, registered.
    """

    __slots__ = ("_path", "_state")

    def __init__(self, state: Any, path: str) -> None:
        self._state = state
        self._path = path

    def ask(self) -> None:
        """Ask for one call, unless the server stops."""
        state = self._state
        with state.lock:
            if state.stage is _server._ServerStage.STARTED:
                queue = state.completion_queue
                state.server.request_registered_call(queue, queue, self._path, self.on_call)

    def on_call(self, event: Any) -> Any:
        """Begin a call; a tag."""
        raise NotImplementedError


def loop_thread(state: Any) -> threading.Thread | None:
    """Find the thread that `server.start()` made: grpcio keeps no reference to it."""
    for thread in threading.enumerate():
        if getattr(thread, "_args", None) == (state,):
            return thread
    return None


def cancel(call: Any) -> None:
    """End a call that cannot be ended properly."""
    try:
        call.cancel(cygrpc.StatusCode.internal, "internal error")
    except Exception:
        _LOG.exception("ingress_failed", where="cancel")
