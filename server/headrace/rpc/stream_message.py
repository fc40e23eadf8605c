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


class Unheard:
    """Calls nobody when its caller leaves; keeping whom to call would keep both in memory."""

    __slots__ = ()

    @property
    def on_gone(self) -> Callable[[], None] | None:
        return None

    @on_gone.setter
    def on_gone(self, _: Callable[[], None] | None) -> None: ...


class StreamMessage(Unheard):
    """
    A `HotCall` whose reply is one message of its stream.

    Args:
        stream: Where it came from, and where the reply goes.
        size: Bytes of the message.
    """

    __slots__ = ("_stream", "arrival_s", "deadline_s", "is_answered", "size")

    def __init__(self, stream: Stream, size: int) -> None:
        self._stream = stream
        self.arrival_s = time.perf_counter()
        self.deadline_s = stream.deadline_s
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


class WrappedMessage(Unheard, ABC):
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
    def metadata(self) -> Metadata:
        return self._call.metadata

    @abstractmethod
    def reply(self, message: bytes) -> None: ...

    @abstractmethod
    def refuse(self, status: Status) -> None: ...
