"""A queue in front of one model version, emptied a batch at a time by whoever is free.

The ingress thread puts, executor threads take: a batch is formed at the moment an executor is free,
of everything that waits and fits (late binding), so nobody waits while there is somebody to work.
"""

import heapq
import itertools
import threading
import time
from collections import deque
from collections.abc import Hashable, Iterable
from operator import attrgetter
from queue import Empty, SimpleQueue
from typing import Generic, Protocol, TypeVar

import structlog

from headrace.batching.policy import BatchPolicy
from headrace.errors import Draining, Overloaded


class Waiting(Protocol):
    """What the batcher needs to know of a request."""

    rows: int
    byte_count: int
    """What it holds in memory, about."""
    arrival_s: float
    """On `time.perf_counter`'s clock."""

    @property
    def batch_key(self) -> Hashable:
        """Requests share a batch only when their keys are equal."""

    def expired(self, now_s: float) -> bool:
        """Say whether its caller has left, or its deadline has passed (Unix seconds)."""

    def drop(self) -> None:
        """Answer an expired request: it costs nothing else."""


RequestT = TypeVar("RequestT", bound=Waiting)

_LOG = structlog.get_logger(__name__)

_rows, _byte_count = attrgetter("rows"), attrgetter("byte_count")


class Batcher(Generic[RequestT]):
    """
    Holds requests until an executor takes them.

    Every request that `put` accepted is either returned by one `take` or dropped because it had
    expired; none is returned twice. Requests whose `batch_key` differs never share a batch and
    never hold each other up: of the batches that may leave, the one with the oldest request does.
    Any number of threads may call any method.

    Args:
        policy: Decides what makes a batch.
        max_queue_size: Most requests waiting at once; one more is refused.
        max_queue_bytes: Most bytes of requests waiting at once, likewise.
    """

    def __init__(
        self, policy: BatchPolicy, *, max_queue_size: int, max_queue_bytes: int = 1 << 62
    ) -> None:
        self._policy = policy
        self._max_queue_size = max_queue_size
        self._max_queue_bytes = max_queue_bytes
        self._lock = threading.Lock()
        self._lanes: dict[Hashable, deque[RequestT]] = {}
        # Every lane once, by the arrival of its head; the number settles ties.
        self._order: list[tuple[float, int, Hashable]] = []
        self._lane_numbers = itertools.count()
        self._waiting = self._waiting_bytes = 0
        self._refused_since_sweep = 0
        self._closed = False
        # A taker with nothing to do counts itself idle under the lock, then waits for a token; who
        # puts work (or closes) un-counts it and sends the token. SimpleQueue wakes a thread several
        # times faster than Condition.
        self._idle = 0
        self._tokens: SimpleQueue[None] = SimpleQueue()

    def put(self, request: RequestT) -> None:
        """
        Queue one request.

        Raises:
            Overloaded: `max_queue_size` requests already wait, or too many bytes of them.
            Draining: the batcher is closed.
        """
        expired: list[RequestT] = []
        try:
            with self._lock:
                if self._closed:
                    raise Draining("this server is stopping")
                self._waiting_bytes += request.byte_count
                if (
                    self._waiting >= self._max_queue_size
                    or self._waiting_bytes > self._max_queue_bytes
                ):
                    self._refuse_unless_some_left(request, expired)
                self._append(request)
                self._waiting += 1
                wake = self._idle > 0
                if wake:
                    self._idle -= 1
            if wake:
                self._tokens.put(None)
        finally:
            _drop_all(expired)

    def take(self) -> list[RequestT] | None:
        """
        Wait for work and take one batch.

        Returns:
            At least one request, all of one `batch_key`, oldest first; None when the batcher is
            closed and nothing waits any more.
        """
        while True:
            with self._lock:
                batch, expired, wait_s = self._next()
                if not batch and not expired:
                    if self._closed:
                        return None
                    self._idle += 1
                # Whoever leaves with a batch leaves nobody asleep beside what still waits.
                wake = bool(batch and self._waiting and self._idle)
                if wake:
                    self._idle -= 1
            if wake:
                self._tokens.put(None)
            _drop_all(expired)
            if batch:
                return batch
            if not expired:
                self._wait(wait_s)

    def close(self) -> None:
        """Refuse new requests; those that wait are still taken, at once."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, 0
        for _ in range(idle):
            self._tokens.put(None)

    def __len__(self) -> int:
        """Requests waiting now, expired ones included until an executor looks."""
        return self._waiting

    def _append(self, request: RequestT) -> None:
        lane = self._lanes.get(request.batch_key)
        if lane is None:
            lane = self._lanes[request.batch_key] = deque()
            self._file(request.batch_key, request)
        lane.append(request)

    def _file(self, key: Hashable, head: RequestT) -> None:
        heapq.heappush(self._order, (head.arrival_s, next(self._lane_numbers), key))

    def _next(self) -> tuple[list[RequestT], list[RequestT], float | None]:
        """Form the next batch under the lock: (batch, expired, how long to wait without one)."""
        if not self._waiting:
            return [], [], None
        now_s = time.time()
        expired: list[RequestT] = []
        held: list[tuple[float, int, Hashable]] = []
        batch: list[RequestT] = []
        wait_s: float | None = None
        while self._order and not batch:
            place = heapq.heappop(self._order)
            lane = self._lanes[place[2]]
            self._drop_expired_heads(lane, now_s, expired)
            if not lane:
                del self._lanes[place[2]]
                continue
            decision = self._policy.decide(map(_rows, lane), self._oldest_wait_s(lane))
            if decision.count:
                batch = self._take_from(place[2], lane, decision.count, now_s, expired)
            else:
                held.append(place)
                wait_s = decision.wait_s if wait_s is None else min(wait_s, decision.wait_s)
        for place in held:
            heapq.heappush(self._order, place)
        return batch, expired, wait_s

    def _oldest_wait_s(self, lane: deque[RequestT]) -> float:
        if self._closed:
            return self._policy.max_queue_delay_s  # nobody else is coming
        if self._policy.max_queue_delay_s:
            return time.perf_counter() - lane[0].arrival_s
        return 0.0

    def _drop_expired_heads(
        self, lane: deque[RequestT], now_s: float, expired: list[RequestT]
    ) -> None:
        while lane and lane[0].expired(now_s):
            self._waiting -= 1
            self._waiting_bytes -= lane[0].byte_count
            expired.append(lane.popleft())

    def _take_from(
        self,
        key: Hashable,
        lane: deque[RequestT],
        count: int,
        now_s: float,
        expired: list[RequestT],
    ) -> list[RequestT]:
        if count == len(lane):
            taken = list(lane)
            del self._lanes[key]
        else:
            taken = [lane.popleft() for _ in range(count)]
            self._file(key, lane[0])
        self._waiting -= count
        self._waiting_bytes -= sum(map(_byte_count, taken))
        batch: list[RequestT] = []
        for request in taken:
            (expired if request.expired(now_s) else batch).append(request)
        return batch

    def _wait(self, timeout_s: float | None) -> None:
        try:
            self._tokens.get(timeout=timeout_s)
        except Empty:
            with self._lock:
                if self._idle:
                    self._idle -= 1
                    return
            self._tokens.get()  # already on its way: whoever un-counted this thread sent it

    def _refuse_unless_some_left(self, request: RequestT, expired: list[RequestT]) -> None:
        """Make room of callers who have left. Swept rarely: it walks the whole queue."""
        self._refused_since_sweep += 1
        if self._refused_since_sweep * 16 >= self._max_queue_size or self._refused_since_sweep == 1:
            self._refused_since_sweep = 1
            self._sweep(expired)
        if self._waiting >= self._max_queue_size or self._waiting_bytes > self._max_queue_bytes:
            self._waiting_bytes -= request.byte_count
            raise Overloaded(f"{self._waiting} requests are already waiting")
        self._refused_since_sweep = 0

    def _sweep(self, expired: list[RequestT]) -> None:
        now_s = time.time()
        self._order.clear()
        for key, lane in list(self._lanes.items()):
            staying: deque[RequestT] = deque()
            for request in lane:
                (expired if request.expired(now_s) else staying).append(request)
            if staying:
                self._lanes[key] = staying
                self._file(key, staying[0])
            else:
                del self._lanes[key]
        self._waiting -= len(expired)
        self._waiting_bytes -= sum(map(_byte_count, expired))


def _drop_all(expired: Iterable[Waiting]) -> None:
    for request in expired:
        try:
            request.drop()
        except Exception:  # noqa: BLE001 the others must be told, and the thread must go on
            _LOG.exception("drop_failed")
