"""One message of a stream, as the call that the hot methods know."""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Protocol

import structlog

from headrace.rpc.ingress import HotCall, Metadata
from headrace.rpc.status import Status

_LOG = structlog.get_logger(__name__)


class Stream(Protocol):
    """The stream that a message came by. Any thread may call."""

    deadline_s: float
    gone: bool

    @property
    def metadata(self) -> Metadata: ...

    def answer(self, message: "StreamMessage", answer: bytes) -> None:
        """Send the answer to a message, unless it has one."""

    def refuse(self, message: "StreamMessage", status: Status) -> None:
        """End with a status, unless the message has an answer: those given before go out first."""


class StreamMessage:
    """
    A `HotCall` whose reply is one message of its stream.

    Args:
        stream: Where it came from, and where the reply goes.
        size: Bytes of the message.
    """

    __slots__ = ("_stream", "arrival_s", "deadline_s", "is_answered", "on_gone", "size")

    def __init__(self, stream: Stream, size: int) -> None:
        self._stream = stream
        self.arrival_s = time.perf_counter()
        self.deadline_s = stream.deadline_s
        self.size = size
        self.on_gone: Callable[[], None] | None = None
        self.is_answered = False
        """The stream's to read, under its lock."""

    @property
    def gone(self) -> bool:
        return self._stream.gone

    @property
    def metadata(self) -> Metadata:
        return self._stream.metadata

    def reply(self, message: bytes) -> None:
        self._stream.answer(self, message)

    def refuse(self, status: Status) -> None:
        self._stream.refuse(self, status)

    def settle(self) -> bool:
        """
        Note the answer; for the stream to call, under its lock.

        Returns:
            Whether it is the first.
        """
        is_first = not self.is_answered
        self.is_answered = True
        self.on_gone = None  # whom it leads to leads back here: references alone would not free it
        return is_first

    def leave(self) -> None:
        """Say that its stream is lost; for the stream to call, without its lock. Never raises."""
        on_gone, self.on_gone = self.on_gone, None
        if on_gone is not None:
            try:
                on_gone()
            except Exception:  # the others must be told as well
                _LOG.exception("ingress_failed", where="on_gone")


class WrappedMessage(ABC):
    """
    A `HotCall` whose reply and refusal are wrapped into an answer of its stream.

    Args:
        call: The message's own.
    """

    __slots__ = ("_call", "arrival_s", "deadline_s")

    def __init__(self, call: HotCall) -> None:
        self._call = call
        self.arrival_s = call.arrival_s
        self.deadline_s = call.deadline_s

    @property
    def gone(self) -> bool:
        return self._call.gone

    @property
    def on_gone(self) -> Callable[[], None] | None:
        return self._call.on_gone

    @on_gone.setter
    def on_gone(self, on_gone: Callable[[], None] | None) -> None:
        self._call.on_gone = on_gone

    @property
    def metadata(self) -> Metadata:
        return self._call.metadata

    @abstractmethod
    def reply(self, message: bytes) -> None: ...

    @abstractmethod
    def refuse(self, status: Status) -> None: ...
