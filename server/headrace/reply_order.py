"""Replies of a model leave in the order in which its requests came, whoever is done first.

Executors hand replies over and go on; a thread sends them, each when all earlier ones have been.
Source: Triton, `preserve_ordering` of `ModelDynamicBatching`.
"""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from queue import SimpleQueue

import structlog

from headrace.errors import BackendError, Draining, InvalidRequest, Overloaded, ServingError
from headrace.request import AnsweredBatch, Request, StandIn

_LOG = structlog.get_logger(__name__)

_FULL = Overloaded("too many replies of this model wait for an earlier one")
"""To be told and never raised: that would collect every traceback."""

_Reply = tuple[Callable[[Request], None], Request]
"""How a request is replied to, and the request."""


class Turn:
    """
    A request's place in the order. Its request waits here, as far as its caller can see.

    Args:
        request: The caller's.
        order: Whose place it is.
    """

    __slots__ = ("byte_count", "is_settled", "order", "reply", "request", "stand_in")

    def __init__(self, request: Request, order: "ReplyOrder") -> None:
        self.order = order
        self.byte_count = request.byte_count
        self.request: Request | None = request
        """None once it is settled."""
        self.stand_in: OrderedRequest | None = None
        """What waits in the queue; None likewise."""
        self.reply: _Reply | None = None
        self.is_settled = False

    def leave(self, _request: Request) -> bool:
        """Let go of the request, whose caller has left; say whether it is still to be answered."""
        stand_in = self.stand_in
        place = None if stand_in is None else stand_in.waits_in  # read once: others clear it
        if place is None or not place.leave(stand_in):
            return False
        return self.order.settle(self, None)


class OrderedRequest(StandIn):
    """
    Waits and runs in place of a caller's request, whose reply it hands over to be sent in turn.

    Args:
        request: The caller's.
        turn: When that is.
    """

    __slots__ = ("turn",)

    def __init__(self, request: Request, turn: Turn) -> None:
        super().__init__(request, request.rows, request.raws, request.byte_count)
        self.turn = turn

    def expired(self, now_s: float) -> bool:
        request = self.turn.request
        return request is None or self.deadline_s <= now_s or request.expired(now_s)

    def answer(self, batch: AnsweredBatch, start: int, prediction_id: str) -> None:
        turn = self.turn
        turn.order.settle(turn, lambda request: request.answer(batch, start, prediction_id))

    def fail(self, error: ServingError) -> None:
        turn = self.turn
        turn.order.settle(turn, lambda request: request.fail(error))

    def drop(self) -> None:
        turn = self.turn
        turn.order.settle(turn, self.drop_for())


class ReplyOrder:
    """
    Sends the replies of one model version in the order of its requests.

    `start`, then `stop` when no executor works any more. Any thread may call the rest.

    Args:
        name: Of the thread that sends.
        most: Requests that may wait, run, or wait for their turn to be answered; one more is
            refused, so that one slow batch cannot make the others pile up replies without end.
        most_bytes: Of those requests, likewise.

    Attributes:
        held: Replies that are ready and wait for an earlier one.
    """

    def __init__(self, name: str, most: int, most_bytes: int = 1 << 62) -> None:
        self.held = 0
        self._most = most
        self._most_bytes = most_bytes
        self._bytes = 0
        self._lock = threading.Lock()
        # Found in one step at either end, and in between when one leaves that is not replied to.
        self._turns: OrderedDict[Turn, None] = OrderedDict()
        self._ready: SimpleQueue[list[_Reply] | None] = SimpleQueue()
        self._has_ended = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Begin to send."""
        self._thread.start()

    def stop(self, deadline_s: float) -> bool:
        """
        Send what is ready, whatever comes before it, and end the thread.

        Args:
            deadline_s: Until when to wait for it, on `time.perf_counter`'s clock.

        Returns:
            Whether it ended in time.
        """
        with self._lock:
            self._has_ended = True
            turns, self._turns = self._turns, OrderedDict()
            self.held = self._bytes = 0
            self._ready.put(_replies_of(turns))
            self._ready.put(None)
        if self._thread.ident is not None:
            self._thread.join(max(0.0, deadline_s - time.perf_counter()))
        return not self._thread.is_alive()

    def __len__(self) -> int:
        """Requests that have a place now."""
        return len(self._turns)

    @property
    def is_alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def enter(self, request: Request) -> OrderedRequest:
        """
        Give a request its place in the order, and return what shall wait for it.

        Raises:
            Overloaded: too many are on their way, or too many bytes of them.
            InvalidRequest: it has more bytes than may ever be.
            Draining: it has been stopped.
        """
        turn = Turn(request, self)
        stand_in = turn.stand_in = OrderedRequest(request, turn)
        with self._lock:
            if self._has_ended:
                raise Draining("this server is stopping")
            if turn.byte_count > self._most_bytes:
                raise InvalidRequest(
                    f"request has {turn.byte_count} bytes; at most {self._most_bytes} may wait here"
                )
            if self._is_full(turn.byte_count):
                raise _FULL.again()
            self._turns[turn] = None
            self._bytes += turn.byte_count
        request.waits_in = turn
        return stand_in

    def refuses(self, byte_count: int) -> Overloaded | None:
        """
        Say whether `enter` would refuse a request of at least so many bytes.

        Returns:
            What to tell its caller; not to be raised.
        """
        with self._lock:
            if self._has_ended or byte_count > self._most_bytes:
                return None  # that is not why
            return _FULL if self._is_full(byte_count) else None

    def settle(self, turn: Turn, how: Callable[[Request], None] | None) -> bool:
        """
        Settle how a request is replied to; with None it is not, and whoever calls does it.

        Who is not replied to has no place any more: refused requests must not fill the order.

        Returns:
            Whether that had not been settled before. Otherwise nothing happens.
        """
        with self._lock:
            request = turn.request
            if request is None:
                return False
            # They lead to one another: references alone would free none of them.
            request.waits_in = turn.request = turn.stand_in = None
            turn.is_settled = True
            request.raws = ()  # all that is left to do is to reply, and that may be much later
            if how is not None:
                turn.reply = how, request
            if not self._has_ended:
                if how is None:
                    del self._turns[turn]
                    self._bytes -= turn.byte_count
                else:
                    self.held += 1
                self._advance()
                return True
        if how is not None:
            _send(how, request)
        return True

    def _advance(self) -> None:
        """Hand over every reply that nobody is before. Under the lock, so that they stay so."""
        turns, over = self._turns, []
        while turns and (turn := next(iter(turns))).is_settled:
            del turns[turn]
            self._bytes -= turn.byte_count
            over.append(turn)
        ready = _replies_of(over)
        if ready:
            self.held -= len(ready)
            self._ready.put(ready)

    def _is_full(self, byte_count: int) -> bool:
        return len(self._turns) >= self._most or self._bytes + byte_count > self._most_bytes

    def _run(self) -> None:
        while (ready := self._ready.get()) is not None:
            while ready:  # nothing that was sent is kept while there is nothing to do
                _send(*ready.pop(0))


def _replies_of(turns: Iterable[Turn]) -> list[_Reply]:
    """Take the replies that are ready out of their turns, in order."""
    ready = []
    for turn in turns:
        # An error leads back, by way of its traceback and the batch in it.
        reply, turn.reply = turn.reply, None
        if reply is not None:
            ready.append(reply)
    return ready


def _send(how: Callable[[Request], None], request: Request) -> None:
    try:
        how(request)
    except Exception:  # noqa: BLE001 the next one has its turn all the same
        _LOG.exception("reply_failed")
        try:
            request.fail(BackendError("internal error"))
        except Exception:  # noqa: BLE001 likewise
            _LOG.exception("reply_failed")
