"""A batch is tried; when somebody in it makes it fail, only whoever that is fails."""

import time
from collections.abc import Callable, Sequence
from typing import Generic, NamedTuple, TypeVar

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


class Survivors(NamedTuple, Generic[RequestT]):
    """
    Those who are left of a batch whose others have been told what is wrong with them.

    Args:
        requests: To be tried again, by themselves; perhaps none.
    """

    requests: Sequence[RequestT]


Attempt = Callable[[Sequence[RequestT]], Blame[RequestT] | Survivors[RequestT] | None]
"""
Carries requests as far as it goes. Returns None when everybody is answered; or those who are not,
because of something in one of them, or because others were in the way. Raises when nobody has been
told anything, and nobody can be answered, whoever it is.
"""

Fail = Callable[[Sequence[RequestT], Exception], None]
"""Answers requests, perhaps none, with an error. Does not raise."""

_GONE = FeatureStoreUnavailable, BackendUnavailable, Overloaded
"""What a batch needs does not answer: another part would not fare better."""

_TOO_LONG_A_SEARCH = "the deadline passed while it was found out whose values made a batch fail"
_LEFT = "the caller left while it was found out whose values made a batch fail"


def try_whole(batch: Sequence[RequestT], attempt: Attempt[RequestT], fail: Fail[RequestT]) -> bool:
    """
    See to it that every request of a batch is answered, whatever happens. Does not raise.

    Who is to blame is found by bisection; when that takes too long (`bisection.attempts_max`),
    those still in question fail together. Whose deadline passes meanwhile fails too. What failed is
    freed with the call: nothing here keeps an error, whose traceback leads to every request.

    Returns:
        Whether anybody was answered otherwise than with an error.
    """
    left, found = _through(batch, attempt)
    try:
        if found is None:
            return bool(left)
        if isinstance(found, Exception):
            fail(left, found)
        elif len(found.items) == 1:
            fail(found.items, found.error)
        else:
            return _search(found, attempt, fail)
    except Exception as error:  # noqa: BLE001 the thread must go on
        fail(left, error)
    finally:
        del found  # references alone would free neither it nor those in it
    return False


def _through(
    requests: Sequence[RequestT], attempt: Attempt[RequestT]
) -> tuple[Sequence[RequestT], Blame[RequestT] | Exception | None]:
    """Return who was left at the last attempt, perhaps nobody, and how it ended for them."""
    found = None
    try:
        while requests:
            found = attempt(requests)
            if not isinstance(found, Survivors):
                return requests, found
            requests = found.requests
    except Exception as error:  # noqa: BLE001 whoever is left must hear of it
        return requests, error
    finally:
        del found  # as in `try_whole`
    return requests, None


def _search(blame: Blame[RequestT], attempt: Attempt[RequestT], fail: Fail[RequestT]) -> bool:
    """Find the requests that are to blame; the others deserve their answer."""
    error, found = blame.error, None
    bisection = Bisection(blame.items)
    was_answered = False
    try:
        while part := bisection.next_part():
            left, found = _through(_without_expired(part, fail), attempt)
            if found is None:
                was_answered |= bool(left)
            elif isinstance(found, Blame):
                error = found.error
                fail(bisection.failed(found.items), error)
            else:
                fail(left, found)
                if isinstance(found, _GONE) and time.time() < max(
                    [request.deadline_s for request in left]
                ):
                    # Not for want of their time: the others would wait as long for as little.
                    fail(bisection.rest(), found)
        fail(bisection.rest(), error)
    finally:
        del blame, error, found  # as in `try_whole`
    return was_answered


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
