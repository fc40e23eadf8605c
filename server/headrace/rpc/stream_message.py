"""One message of a stream, as the call that the hot methods know."""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Protocol

from headrace.rpc.ingress import HotCall, Metadata
from headrace.rpc.status import Status


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
        self.on_gone: Callable[[], None] | None = None
        self.size = size
        self.is_answered = False
        """The stream's to read and write, under its lock."""

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


class WrappedMessage(ABC):
    """
    A `HotCall` whose reply and refusal are wrapped into an answer of its stream.

    Args:
        call: The message's own.
    """

    __slots__ = ("_call", "arrival_s", "deadline_s", "on_gone")

    def __init__(self, call: HotCall) -> None:
        self._call = call
        self.arrival_s = call.arrival_s
        self.deadline_s = call.deadline_s
        self.on_gone: Callable[[], None] | None = None

    @property
    def gone(self) -> bool:
        return self._call.gone

    @property
    def metadata(self) -> Metadata:
        return self._call.metadata

    @abstractmethod
    def reply(self, message: bytes) -> None: ...

    @abstractmethod
    def refuse(self, status: Status) -> None: ...
