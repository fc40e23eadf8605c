"""A queue in front of one model version, emptied a batch at a time by whoever is free.

The ingress thread puts, executor threads take: a batch is formed at the moment an executor is free,
of everything that waits and fits (late binding), so nobody waits while there is somebody to work.
Who cannot be answered in time is refused when he comes, and given up when his turn comes too late.
"""

import math
import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence
from queue import Empty, SimpleQueue
from typing import Generic, TypeVar

import structlog

from headrace.batching.codel import Codel
from headrace.batching.cost import BatchCost
from headrace.batching.fair_queue import FairQueue
from headrace.batching.lane import PATIENCE_S
from headrace.batching.policy import BatchPolicy, LevelPolicy
from headrace.batching.pushback import RETRY_STEPS_S, UNKNOWN_S, retry_step_s
from headrace.batching.queue import RequestQueue
from headrace.batching.waiting import Waiting
from headrace.errors import DeadlineExceeded, Draining, InvalidRequest, Overloaded

RequestT = TypeVar("RequestT", bound=Waiting)

_LOG = structlog.get_logger(__name__)

_FULL = "too many requests are already waiting"
_LATE = "too much is waiting to answer this request before its deadline"
_SLOW = "answering takes longer than what is left until this request's deadline"

READ_OF_LATE = 16
"""Of so many requests that seem too late unread, one is read: it may name a `timeout`."""

TOLD_AT_ONCE = 64
"""Of those who are given up, before a batch is carried: a flood of them must not hold it up."""

TELLING_SHARE = 0.1
"""
Of the time that a batch is expected to take: for so long more of them are told before it. All who
wait to be told are told within a second or so, however slow the batches are.
"""

TOLD_BESIDE = 2
"""By whoever puts a request, if more wait to be told: as many are given up as come, at the most."""


_ALL_FULL = {step_s: Overloaded(_FULL, step_s) for step_s in RETRY_STEPS_S}
_ALL_LATE = {step_s: Overloaded(_LATE, step_s) for step_s in RETRY_STEPS_S}
"""To be told and never raised: that would collect every traceback."""


class Batcher(Generic[RequestT]):
    """
    Holds requests until an executor takes them.

    Every request that `put` accepted is either returned by one `take`, dropped because it had
    expired or would be answered too late, or let go by `leave`; none is returned twice. Requests
    whose `batch_key` differs never share a batch and never hold each other up. Any number of
    threads may call any method.

    How long a batch takes is learned from the executors: from the end of one `take` to the
    beginning of the next by the same thread, which says whether anybody was answered meanwhile.

    Where batches mostly wait for something else than a processor, one more may be under way while
    `overlaps` is set. It begins only when it is full, as far as the sizes of those that wait can
    tell: a batch that could still grow is better left until an executor is free.

    Args:
        policy: Decides what makes a batch.
        max_queue_size: Most requests waiting at once; one more is refused.
        max_queue_bytes: Most bytes of requests waiting at once, likewise.
        levels: Policies of the priority levels, of level 1 first.
        default_level: Of a request that names none.
        executors: How many threads take whatever waits.
        overlapping: How many more threads take, but only full batches and while `overlaps` is set,
            when so many batches are under way already.
        is_fair: Whether callers take turns; otherwise whose a request is makes no difference.
        codel: Says when the queue stands; whoever has waited too long is given up then.

    Attributes:
        refused_full: Requests refused because too many waited.
        refused_late: Requests refused because they could not have been answered in time.
        dropped: Requests given up while they waited.
        shed: Of these, those that had waited too long while the queue stood.
        pressure: Above 0 since a request was refused for those that wait, until batches have left
            without another.
    """

    def __init__(
        self,
        policy: BatchPolicy,
        *,
        max_queue_size: int,
        max_queue_bytes: int = 1 << 62,
        levels: Sequence[LevelPolicy] = (LevelPolicy(),),
        default_level: int = 1,
        executors: int = 1,
        overlapping: int = 0,
        is_fair: bool = False,
        codel: Codel | None = None,
    ) -> None:
        self.refused_full = self.refused_late = self.dropped = self.shed = 0
        self.pressure = 0
        self._retry_after_s = UNKNOWN_S
        self._names_timeouts = False
        self._late_unread = 0
        self._has_codel = codel is not None
        self._has_delay = policy.max_queue_delay_s > 0
        self._max_queue_size = max_queue_size
        self._max_queue_bytes = max_queue_bytes
        self._executors = executors
        self._overlapping = overlapping
        self._overlaps = False
        self._rows_of_full = policy.max_batch_size or 1
        self._lock = threading.Lock()
        self._cost = BatchCost(executors + overlapping)
        self._queue: RequestQueue[RequestT]
        self._queue = (FairQueue if is_fair else RequestQueue)(
            *(policy, self._cost, levels, default_level, executors, codel),
            max_queue_size=max_queue_size,
            max_queue_bytes=max_queue_bytes,
        )
        self._untold: deque[RequestT] = deque()
        self._refused_since_sweep = 0
        self._closed = False
        self._learned_s = time.perf_counter()  # or that something was tried
        # By thread: (when it took a batch, its rows, when it will be free), `time.perf_counter`.
        self._running: dict[int, tuple[float, int, float]] = {}
        # A taker with nothing to do counts itself idle under the lock, then waits for a token; who
        # puts work (or closes) un-counts it and sends the token. SimpleQueue wakes a thread several
        # times faster than Condition.
        self._idle = 0
        self._tokens: SimpleQueue[None] = SimpleQueue()

    def put(self, request: RequestT) -> None:
        """
        Queue one request.

        Raises:
            Overloaded: too many requests already wait, or too many bytes of them; or it could not
                be answered before its deadline, be it by an executor with nothing else to do.
            DeadlineExceeded: its deadline has passed already.
            InvalidRequest: it has more bytes than may ever wait.
            Draining: the batcher is closed.
        """
        try:
            with self._lock:
                if self._closed:
                    raise Draining("this server is stopping")
                queue, now_s = self._queue, time.time()
                if self._is_full(request.byte_count):
                    self._refuse_unless_some_left(request, now_s)
                if request.timeout_s:
                    self._names_timeouts = True
                    queue.bind(request, now_s)
                deadline_s = request.deadline_s
                if deadline_s != math.inf and not queue.is_in_time(deadline_s, now_s):
                    self._refuse_if_late(request, now_s)
                if not (
                    queue.add(request, now_s)
                    or (self._gives_up_overdue(now_s) and queue.add(request, now_s))
                    or self._displaces((request,), now_s)
                ):
                    self._refuse_for_want_of_room(queue.REFUSAL)
                request.waits_in = self
                wake = self._idle > 0 and self._may_begin()
                if wake:
                    self._idle -= 1
            if wake:
                self._tokens.put(None)
        finally:
            if self._untold:
                self._tell(TOLD_BESIDE)

    def binds(self, request: RequestT) -> bool:
        """Say whether what a request says of its own timeout becomes a deadline in the queue."""
        return self._queue.binds(request)

    def refuses(self, deadline_s: float, byte_count: int = 1) -> Overloaded | None:
        """
        Say whether `put` would refuse a request of which no more is known than this.

        It looks only while `pressure` is above 0, and never refuses what `put` would take, but for
        two cases. A request that names a `timeout` may overtake those that wait: once one has,
        nobody is refused here for his deadline any more; until then one in `READ_OF_LATE` is not.
        And one for whose bytes there is no room lets callers who have left be swept out.

        Args:
            deadline_s: Unix seconds; infinite for none.
            byte_count: At least so many bytes.

        Returns:
            What to tell the caller, counted as refused; None to let `put` decide. Not to be raised.
        """
        if not self.pressure:
            return None
        with self._lock:
            now_s = time.time()
            if self._closed or deadline_s <= now_s or not self._queue.is_impartial:
                return None
            # It may be of the highest level.
            if self._is_full(byte_count) and not self._queue.yields(1, byte_count):
                if byte_count > self._max_queue_bytes or self._sweeps_next():
                    return None  # it is wrong, or callers who left may make room
                self._refused_since_sweep += 1
                self.refused_full += 1
                error = _ALL_FULL[self._retry_after_s]
            elif self._is_late_unread(deadline_s, now_s):
                self.refused_late += 1
                error = _ALL_LATE[self._retry_after_s]
            else:
                return None
            self.pressure = 2
        return error

    def turned_away(self) -> None:
        """Count a request that was refused for want of room before it could be put."""
        with self._lock:
            self.refused_full += 1
            self._press()

    def take(self, *, was_answered: bool = True) -> list[RequestT] | None:
        """
        Wait for work and take one batch.

        Args:
            was_answered: Whether anybody was, of the batch that this thread took last. Otherwise
                how fast it ended does not count.

        Returns:
            At least one request, all of one `batch_key`; None when the batcher is closed and
            nothing waits any more.
        """
        thread = threading.get_ident()
        is_free = False
        while True:
            with self._lock:
                if not is_free:
                    is_free = True
                    self._learn(self._running.pop(thread, None), was_answered=was_answered)
                arrived_before_s = (
                    math.inf if self._closed or not self._has_delay else time.perf_counter()
                )
                batch: list[RequestT] = []
                dropped: list[RequestT] = []
                wait_s: float | None = None
                if self._may_begin():
                    batch, dropped, wait_s = self._queue.take(time.time(), arrived_before_s)
                if dropped:
                    self._give_up(dropped)
                rests, telling_s = not batch and not self._untold, 0.0
                if batch:
                    rows = sum([request.rows for request in batch])
                    telling_s = TELLING_SHARE * self._note_running(thread, rows)
                    if self.pressure:
                        self.pressure -= 1
                        self._look_ahead()
                elif rests:
                    if self._closed:
                        return None
                    self._idle += 1
                # Whoever leaves with a batch leaves nobody asleep beside what still waits.
                wake = bool(batch and self._idle and self._queue.count and self._may_begin())
                if wake:
                    self._idle -= 1
            if wake:
                self._tokens.put(None)
            if self._untold:
                self._tell(TOLD_AT_ONCE, telling_s)
            if batch:
                return batch
            if rests:
                self._wait(wait_s)

    def judge(self, request: RequestT, parts: int) -> None:
        """
        Judge beforehand whether a request may be put in parts, by `put_all`.

        Args:
            request: The whole of it. What it says of its own timeout becomes part of its deadline.
            parts: Into how many it will be split.

        Raises:
            Overloaded, DeadlineExceeded, InvalidRequest, Draining: as `put`.
        """
        try:
            with self._lock:
                if self._closed:
                    raise Draining("this server is stopping")
                queue, now_s = self._queue, time.time()
                if self._is_full(request.byte_count, parts):
                    self._refuse_unless_some_left(request, now_s, parts)
                if request.timeout_s:
                    self._names_timeouts = True
                    queue.bind(request, now_s)
                if request.deadline_s != math.inf:
                    self._refuse_if_late(request, now_s, parts)
                if not queue.has_room(request, parts) and not (
                    self._gives_up_overdue(now_s) and queue.has_room(request, parts)
                ):
                    self._refuse_for_want_of_room(queue.REFUSAL)
        finally:
            if self._untold:
                self._tell(TOLD_BESIDE)

    def put_all(self, requests: Sequence[RequestT]) -> None:
        """
        Queue what was judged: all of it, or nothing.

        Raises:
            Overloaded: others came meanwhile, and there is no room any more.
            InvalidRequest: they have more bytes than may ever wait.
            Draining: the batcher is closed.
        """
        with self._lock:
            if self._closed:
                raise Draining("this server is stopping")
            queue, now_s, places = self._queue, time.time(), len(requests)
            byte_count = sum([request.byte_count for request in requests])
            level = queue.level_of(requests[0])
            if self._is_full(byte_count, places):
                self._refuse_if_too_large(byte_count)
                if not queue.yields(level, byte_count, places):
                    self._refuse_for_want_of_room(_FULL)
            if not queue.add_all(requests, now_s) and not self._displaces(requests, now_s):
                self._refuse_for_want_of_room(queue.REFUSAL)
            for request in requests:
                request.waits_in = self
            wake = min(self._idle, len(requests)) if self._may_begin() else 0
            self._idle -= wake
        for _ in range(wake):
            self._tokens.put(None)
        if self._untold:
            self._tell(TOLD_BESIDE)

    def withdraw(self, requests: Iterable[RequestT], *, counts_as_dropped: bool) -> None:
        """
        Let go of those that still wait, of the parts of one request. Nobody is told.

        Args:
            requests: Some may be in a batch, or never have been put.
            counts_as_dropped: Whether one dropped request is counted, if any of them waited.
        """
        with self._lock:
            waited = sum([self._queue.remove(request) for request in requests])
            self.dropped += counts_as_dropped and waited > 0

    def leave(self, request: RequestT) -> bool:
        """
        Let go of a request that nobody waits for any more. Whoever calls answers it.

        Returns:
            Whether it still waited. If not, it is in a batch, or has been let go before.
        """
        with self._lock:
            was_waiting = self._queue.remove(request)
            self.dropped += was_waiting
        return was_waiting

    def close(self) -> None:
        """Refuse new requests; those that wait are still taken, at once."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, 0
        for _ in range(idle):
            self._tokens.put(None)

    @property
    def overlaps(self) -> bool:
        """Whether full batches may begin beside those that all executors carry already."""
        return self._overlaps

    @overlaps.setter
    def overlaps(self, overlaps: bool) -> None:
        if overlaps is not self._overlaps:  # looked at for each batch, changed seldom
            with self._lock:
                self._overlaps = overlaps
                self._queue.executors = self._executors + self._overlapping * overlaps

    def __len__(self) -> int:
        """Requests waiting now."""
        return self._queue.count

    def _learn(self, took: tuple[float, int, float] | None, *, was_answered: bool = True) -> None:
        if took is not None:
            started_s, rows, _ = took
            self._learned_s = now_s = time.perf_counter()
            cost = self._cost
            observe = cost.observe if was_answered else cost.observe_failed
            observe(rows, max(now_s - started_s, 1e-6))

    def _note_running(self, thread: int, rows: int) -> float:
        """Note that a thread begins a batch; return how long that takes, about."""
        now_s, takes_s = time.perf_counter(), self._cost.estimate_s(rows)
        self._running[thread] = now_s, rows, now_s + takes_s
        return takes_s

    def _refuse_for_want_of_room(self, why: str) -> None:
        self.refused_full += 1
        self._press()
        raise Overloaded(why, self._retry_after_s)

    def _press(self) -> None:
        """Note that somebody is refused for those who wait."""
        if not self.pressure:
            self._look_ahead()
        self.pressure = 2

    def _look_ahead(self) -> None:
        """Find, once for each batch, when those who are refused may come again."""
        batches = self._queue.batches + 1  # and the one under way
        wait_s = batches * self._cost.estimate_s(self._rows_of_full)
        self._retry_after_s = retry_step_s(wait_s / self._queue.executors)

    def _give_up(self, dropped: Sequence[RequestT]) -> None:
        """Count those who left the queue unserved; each is to be told, without the lock."""
        for request in dropped:
            request.retry_after_s = self._retry_after_s
            # Parts of one request are one caller's, who is counted once.
            split = getattr(request, "split", None)
            if split is None or split.give_up():
                self.dropped += 1
                self.shed += self._has_codel and request.is_shed
        self._untold += dropped

    def _gives_up_overdue(self, now_s: float) -> bool:
        """Make room of those whose own time is over; say whether there were any."""
        overdue = self._queue.overdue(now_s)
        self._give_up(overdue)
        return bool(overdue)

    def _displaces(self, requests: Sequence[RequestT], now_s: float) -> bool:
        """Put a request, or its parts, in place of others of lower levels; say whether it was."""
        displaced = self._queue.displace(requests, now_s)
        if displaced:
            self._press()  # they are refused, late
            self._give_up(displaced)
        return bool(displaced)

    def _refuse_if_late(self, request: RequestT, now_s: float, parts: int = 1) -> None:
        if request.deadline_s <= now_s:
            raise DeadlineExceeded("the deadline had passed when the request came")
        free_in_s = self._free_in_s()
        if free_in_s is None:
            # It would begin now. Where it is long ago that anything was learned it is tried,
            # whatever is expected: this is how expectations mend.
            if time.perf_counter() - self._learned_s > PATIENCE_S:
                self._learned_s = time.perf_counter()  # the next one is not, until it is known
                return
            if parts == 1:
                if now_s + self._cost.hoped_s(request.rows) > request.deadline_s:
                    self.refused_late += 1
                    raise Overloaded(_SLOW)
                return
            free_in_s = 0.0
        if self._queue.finish_s(request, now_s, free_in_s) > request.deadline_s:
            self.refused_late += 1
            self._press()
            raise Overloaded(_LATE, self._retry_after_s)

    def _is_late_unread(self, deadline_s: float, now_s: float) -> bool:
        if deadline_s == math.inf or self._names_timeouts:
            return False
        free_in_s = None if self._queue.is_in_time(deadline_s, now_s) else self._free_in_s()
        if free_in_s is None or self._queue.soonest_s(deadline_s, now_s, free_in_s) <= deadline_s:
            return False
        self._late_unread += 1
        return self._late_unread % READ_OF_LATE != 0

    def _free_in_s(self) -> float | None:
        """Return when an executor will be free, about; None when one is and nobody waits."""
        if self._may_begin():
            return 0.0 if self._queue.count else None
        soonest_s = min([free_s for _, _, free_s in self._running.values()])
        return max(0.0, soonest_s - time.perf_counter())

    def _may_begin(self) -> bool:
        """Say whether a thread that takes may take now, if anything waits."""
        beside = len(self._running) - self._executors
        if beside < 0 or self._closed:
            return True
        if not self._overlaps or beside >= self._overlapping:
            return False
        # Full: one more request like those that wait, on average, would not fit.
        rows, count = self._queue.rows, self._queue.count
        return rows * (count + 1) > self._rows_of_full * count

    def _is_full(self, byte_count: int, places: int = 1) -> bool:
        queue = self._queue
        return queue.count + places > self._max_queue_size or (
            queue.byte_count + byte_count > self._max_queue_bytes
        )

    def _wait(self, timeout_s: float | None) -> None:
        try:
            self._tokens.get(timeout=timeout_s)
        except Empty:
            with self._lock:
                if self._idle:
                    self._idle -= 1
                    return
            self._tokens.get()  # already on its way: whoever un-counted this thread sent it

    def _refuse_unless_some_left(self, request: RequestT, now_s: float, places: int = 1) -> None:
        """
        Make room of callers who have left, swept rarely: that walks the whole queue.

        A queue that is still full may leave its room to a higher level, which takes it when put.
        """
        queue, byte_count = self._queue, request.byte_count
        self._refuse_if_too_large(byte_count)
        is_due = self._sweeps_next()
        self._refused_since_sweep += 1
        if is_due:
            self._refused_since_sweep = 1
            expired = queue.sweep(now_s)
            self._give_up(expired)
        if not self._is_full(byte_count, places):
            self._refused_since_sweep = 0
        elif not queue.yields(queue.level_of(request), byte_count, places):
            self._refuse_for_want_of_room(_FULL)

    def _refuse_if_too_large(self, byte_count: int) -> None:
        if byte_count > self._max_queue_bytes:  # to come again would not help
            raise InvalidRequest(
                f"request has {byte_count} bytes; at most {self._max_queue_bytes} may wait here"
            )

    def _sweeps_next(self) -> bool:
        count = self._refused_since_sweep + 1
        return count == 1 or count * 16 >= self._max_queue_size

    def _tell(self, most: int, for_s: float = 0.0) -> None:
        """
        Tell some of those who are given up that they are; without the lock.

        Args:
            most: So many, whatever it takes.
            for_s: Others for as long as that, in seconds, from the first on.
        """
        untold = self._untold
        until_s = time.perf_counter() + for_s if for_s else -math.inf
        told = 0
        while told < most or time.perf_counter() < until_s:
            told += 1
            try:
                request = untold.popleft()
            except IndexError:  # another thread told the rest
                return
            try:
                request.drop()
            except Exception:  # noqa: BLE001 the others must be told, and the thread must go on
                _LOG.exception("drop_failed")
