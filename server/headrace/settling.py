"""Telling whoever waits for a future how it ended: once, whoever else tells it at the same time."""

import contextlib
from concurrent.futures import Future, InvalidStateError


def settle(future: "Future[None]", error: Exception | None) -> None:
    """
    End a future, unless it has ended: an answer and a stop may meet, and the first one counts.

    Args:
        future: Somebody waits for it.
        error: Raised there; None for success.
    """
    with contextlib.suppress(InvalidStateError):
        if error is None:
            future.set_result(None)
        else:
            future.set_exception(error)
