"""A queue in front of one model version, emptied a batch at a time by whoever is free.

The ingress thread puts, executor threads take: a batch is formed at the moment an executor is free,
of everything that waits and fits (late binding), so nobody waits while there is somebody to work.
"""

import threading
import time
from collections import deque
from collections.abc import Hashable
from itertools import islice
from operator import attrgetter
from queue import Empty, SimpleQueue
from typing import Generic, Protocol, TypeVar

from headrace.batching.policy import BatchPolicy
from headrace.errors import Draining, Overloaded


class Waiting(Protocol):
    """What the batcher needs to know of a request."""

    rows: int
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

_rows = attrgetter("rows")


class Batcher(Generic[RequestT]):
    """
    Holds requests until an executor takes them.

    Every request that `put` accepted is either returned by one `take` or dropped because it had
    expired; none is returned twice. Requests whose `batch_key` differs never share a batch and
    never hold each other up: the oldest request decides whose turn it is. Any number of threads may
    call any method.

    Args:
        policy: Decides what makes a batch.
        max_queue_size: Most requests waiting at once; one more is refused.
    """

    def __init__(self, policy: BatchPolicy, *, max_queue_size: int) -> None:
        self._policy = policy
        self._max_queue_size = max_queue_size
        self._lock = threading.Lock()
        self._lanes: dict[Hashable, deque[RequestT]] = {}
        self._waiting = 0
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
            Overloaded: `max_queue_size` requests already wait.
            Draining: the batcher is closed.
        """
        with self._lock:
            if self._closed:
                raise Draining("this server is stopping")
            if self._waiting >= self._max_queue_size:
                self._refuse_unless_some_left()
            lane = self._lanes.get(request.batch_key)
            if lane is None:
                lane = self._lanes[request.batch_key] = deque()
            lane.append(request)
            self._waiting += 1
            wake = self._idle > 0
            if wake:
                self._idle -= 1
        if wake:
            self._tokens.put(None)

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
            for request in expired:
                request.drop()
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

    def _next(self) -> tuple[list[RequestT], list[RequestT], float | None]:
        """Form the next batch under the lock: (batch, expired, how long to wait without one)."""
        if not self._waiting:
            return [], [], None
        now_s = time.time()
        expired: list[RequestT] = []
        lane_key, lane = self._oldest_lane(now_s, expired)
        if lane is None:
            return [], expired, None
        if self._closed:
            oldest_wait_s = self._policy.max_queue_delay_s  # nobody else is coming
        elif self._policy.max_queue_delay_s:
            oldest_wait_s = time.perf_counter() - lane[0].arrival_s
        else:
            oldest_wait_s = 0.0
        decision = self._policy.decide(map(_rows, lane), oldest_wait_s)
        if decision.count == len(lane):
            taken = list(lane)
            del self._lanes[lane_key]
        else:
            taken = list(islice(lane, decision.count))
            for _ in range(decision.count):
                lane.popleft()
        self._waiting -= decision.count
        batch: list[RequestT] = []
        for request in taken:
            (expired if request.expired(now_s) else batch).append(request)
        return batch, expired, decision.wait_s

    def _oldest_lane(
        self, now_s: float, expired: list[RequestT]
    ) -> tuple[Hashable, deque[RequestT] | None]:
        """Find the lane whose head has waited longest, clearing expired heads on the way."""
        oldest: tuple[Hashable, deque[RequestT] | None] = (None, None)
        for key, lane in list(self._lanes.items()):
            while lane and lane[0].expired(now_s):
                expired.append(lane.popleft())
                self._waiting -= 1
            if not lane:
                del self._lanes[key]
            elif oldest[1] is None or lane[0].arrival_s < oldest[1][0].arrival_s:
                oldest = (key, lane)
        return oldest

    def _wait(self, timeout_s: float | None) -> None:
        try:
            self._tokens.get(timeout=timeout_s)
        except Empty:
            with self._lock:
                if self._idle:
                    self._idle -= 1
                    return
            self._tokens.get()  # already on its way: whoever un-counted this thread sent it

    def _refuse_unless_some_left(self) -> None:
        """Make room of callers who have left. Swept rarely: it walks the whole queue."""
        self._refused_since_sweep += 1
        if self._refused_since_sweep * 16 >= self._max_queue_size or self._refused_since_sweep == 1:
            self._refused_since_sweep = 1
            self._sweep()
        if self._waiting >= self._max_queue_size:
            raise Overloaded(f"{self._waiting} requests are already waiting for this model")
        self._refused_since_sweep = 0

    def _sweep(self) -> None:
        now_s = time.time()
        for key, lane in list(self._lanes.items()):
            staying: deque[RequestT] = deque()
            for request in lane:
                if request.expired(now_s):
                    request.drop()
                else:
                    staying.append(request)
            self._waiting -= len(lane) - len(staying)
            if staying:
                self._lanes[key] = staying
            else:
                del self._lanes[key]
