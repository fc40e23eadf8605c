"""The contract between the port and the hot methods, whichever ingress carries the calls."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from headrace.rpc.status import Status

Metadata = Sequence[tuple[str, str | bytes]]

STALLED_S = 2.0
"""A reader that takes nothing for so long is not waited for when the server stops."""


class HotCall(Protocol):
    """
    One unary call of a hot method, or one message of a stream.

    Exactly one of `reply` and `refuse` has an effect, the first; both may be called from any
    thread, never block, and never raise because the caller has left. A call that is dropped without
    either stays open until its deadline: always end it.
    """

    arrival_s: float
    """On `time.perf_counter`'s clock."""

    deadline_s: float
    """Unix seconds; infinite when the caller set none."""

    @property
    def gone(self) -> bool:
        """
        Whether the caller has cancelled, or its deadline has passed, or its connection is lost.

        A call that is answered within some milliseconds may never learn it.
        """

    on_gone: Callable[[], None] | None
    """
    Called once when the caller is found to have left, and forgotten when the call is answered. For
    `accept` to set: it is not called before that has returned.
    """

    @property
    def metadata(self) -> Metadata:
        """What the caller sent besides the message; there until the call is answered."""

    def reply(self, message: bytes) -> None:
        """Answer with a serialized message."""

    def refuse(self, status: Status) -> None:
        """Answer with an error. Of a stream's message: end the whole stream with it, soon."""


Accept = Callable[[HotCall, bytes], None]
"""
Takes a call and its serialized message, on the ingress thread. Must return soon and see to it that
the call is answered, then or later, on any thread.
"""


Glance = Callable[[HotCall], Status | None]
"""Judges a call by what is known of it without its message."""


@dataclass(frozen=True, slots=True)
class HotMethod:
    """
    A unary method that is taken straight from the port.

    Args:
        path: `/package.Service/Method`.
        accept: Takes each call.
        glance: Asked about each call before its message is read, on the ingress thread; returns
            the status to refuse it with, or None to take it. Must cost next to nothing.
    """

    path: str
    accept: Accept
    glance: Glance | None = None


@dataclass(frozen=True, slots=True)
class HotStream:
    """
    A bidirectional method that is taken straight from the port, message by message.

    Each message is a `HotCall` of its own, with the stream's deadline and metadata; its reply is
    one message back. Replies go out in the order in which they are given. A caller that sends no
    more gets what is still open, then OK. A stream takes no more messages while
    `exchange.MESSAGES_MAX` of its own are unanswered or their replies unread: HTTP/2 then holds its
    caller back. `accept` raising ends the stream with INTERNAL, and no other.

    Args:
        path: `/package.Service/Method`.
        begin: Called once for each stream with its metadata, on the ingress thread; returns what
            takes its messages.
    """

    path: str
    begin: Callable[[Metadata], Accept]


class Ingress(Protocol):
    """
    How hot calls get from the port to their methods.

    `refuse_new` and the wait for `open_calls` to reach 0 come before the server stops: calls that
    reach the port once gRPC itself is stopping are cancelled. After `refuse_new` a stream takes no
    more messages; it ends with the same status when those it took are answered, at once if there
    are none.
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
        """
        Unary calls that have not ended yet, and messages of streams that are not answered yet.

        An answer counts as given when the transport has taken it, or when the stream's reader has
        taken nothing for `STALLED_S`.
        """

    @property
    def open_streams(self) -> int:
        """Streams that have not ended yet."""

    @property
    def is_alive(self) -> bool:
        """Whether calls are being taken. False: the port is open and nobody listens."""
