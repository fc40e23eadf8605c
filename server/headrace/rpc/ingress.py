"""The contract between the port and the hot methods, whichever ingress carries the calls."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from headrace.rpc.status import Status

Metadata = Sequence[tuple[str, str | bytes]]


class HotCall(Protocol):
    """
    One unary call of a hot method.

    Exactly one of `reply` and `refuse` has an effect, the first; both may be called from any thread
    and never raise because the caller has left. A call that is dropped without either stays open
    until its deadline: always end it.
    """

    arrival_s: float
    """On `time.perf_counter`'s clock."""

    deadline_s: float
    """Unix seconds; infinite when the caller set none."""

    gone: bool
    """
    Whether the caller has cancelled, or its deadline has passed, or its connection is lost. A call
    that is answered within some milliseconds may never learn it.
    """

    @property
    def metadata(self) -> Metadata:
        """What the caller sent besides the message."""

    def reply(self, message: bytes) -> None:
        """Answer with a serialized message."""

    def refuse(self, status: Status) -> None:
        """Answer with an error."""


@dataclass(frozen=True, slots=True)
class HotMethod:
    """
    A unary method that is taken straight from the port.

    Args:
        path: `/package.Service/Method`.
        accept: Takes the call and its serialized request, on the ingress thread. Must return soon
            and see to it that the call is answered, then or later, on any thread.
    """

    path: str
    accept: Callable[[HotCall, bytes], None]


class Ingress(Protocol):
    """
    How hot calls get from the port to their methods.

    `refuse_new` and the wait for `open_calls` to reach 0 come before the server stops: calls that
    reach the port once gRPC itself is stopping are cancelled.
    """

    name: str

    def begin(self) -> None:
        """Take calls. The server has been started."""

    def refuse_new(self, status: Status) -> None:
        """Answer every call from now on with `status`, unread."""

    def end(self) -> None:
        """Let go of threads. The server has stopped."""

    @property
    def open_calls(self) -> int:
        """Calls that have not ended yet."""

    @property
    def is_alive(self) -> bool:
        """Whether calls are being taken. False: the port is open and nobody listens."""
