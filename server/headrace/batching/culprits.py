"""A batch is tried; when somebody in it makes it fail, only whoever that is fails."""

import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from headrace.batching.bisection import Bisection, Blame
from headrace.batching.queued import QueuedRequest
from headrace.errors import (
    BackendUnavailable,
    CallerLeft,
    DeadlineExceeded,
    FeatureStoreUnavailable,
    Overloaded,
)

RequestT = TypeVar("RequestT", bound=QueuedRequest)

Attempt = Callable[[Sequence[RequestT]], Blame[RequestT] | None]
"""
Carries requests as far as it goes. Returns None when everybody is answered, or those who are not,
because of something in one of them; raises when nobody who is left can be answered, whoever it is.
"""

Fail = Callable[[Sequence[RequestT], Exception], None]
"""Answers requests, perhaps none, with an error. Does not raise."""

_GONE = FeatureStoreUnavailable, BackendUnavailable, Overloaded
"""What a batch needs does not answer: another part would not fare better."""

_TOO_LONG_A_SEARCH = "the deadline passed while it was found out whose values made a batch fail"
_LEFT = "the caller left while it was found out whose values made a batch fail"


def try_whole(batch: Sequence[RequestT], attempt: Attempt[RequestT], fail: Fail[RequestT]) -> None:
    """
    See to it that every request of a batch is answered, whatever happens. Does not raise.

    Who is to blame is found by bisection; when that takes too long (`bisection.attempts_max`),
    those still in question fail together. Whose deadline passes meanwhile fails too. What failed is
    freed with the call: nothing here keeps an error, whose traceback leads to every request.
    """
    blame: Blame[RequestT] | None = None
    try:
        blame = attempt(batch)
        if blame is not None:
            if len(blame.items) == 1:
                fail(blame.items, blame.error)
            else:
                _search(blame, attempt, fail)
    except Exception as error:  # noqa: BLE001 the thread must go on
        fail(batch, error)
    finally:
        del blame  # references alone would free neither it nor those in it


def _search(blame: Blame[RequestT], attempt: Attempt[RequestT], fail: Fail[RequestT]) -> None:
    """Find the requests that are to blame; the others deserve their answer."""
    error, found = blame.error, None
    bisection = Bisection(blame.items)
    try:
        while part := bisection.next_part():
            kept = _without_expired(part, fail)
            if not kept:
                continue
            try:
                found = attempt(kept)
            except _GONE as gone:
                fail(kept, gone)
                if time.time() < max([request.deadline_s for request in kept]):
                    # Not for want of their time: the others would wait as long for as little.
                    fail(bisection.rest(), gone)
                continue
            except Exception as unexpected:  # noqa: BLE001 the others must be tried
                fail(kept, unexpected)
                continue
            if found is not None:
                error = found.error
                fail(bisection.failed(found.items), error)
        fail(bisection.rest(), error)
    finally:
        del blame, error, found  # as in `try_whole`


def _without_expired(part: Sequence[RequestT], fail: Fail[RequestT]) -> list[RequestT]:
    """Fail those for whom the search takes too long: they had their run, and pay for it."""
    now_s = time.time()
    left: list[RequestT] = []
    late: list[RequestT] = []
    kept: list[RequestT] = []
    for request in part:  # asked once: whoever leaves after that is run
        if not request.expired(now_s):
            kept.append(request)
        else:
            (left if request.left_early() else late).append(request)
    fail(left, CallerLeft(_LEFT))
    fail(late, DeadlineExceeded(_TOO_LONG_A_SEARCH))
    return kept
