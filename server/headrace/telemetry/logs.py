"""Log lines: structlog on stderr, for people on a terminal and as JSON otherwise."""

import contextlib
import logging
import sys
import threading
import time
from typing import TextIO, cast

import structlog
from structlog.typing import EventDict

from headrace.telemetry.line_limit import LineLimit

LOG_LEVELS = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}
"""The least severe first."""

FLOODING = frozenset(
    {
        *("batch_failed", "feature_batch_failed", "onnx_runtime_failed", "oip_failed"),
        *("call_not_received", "call_not_watched", "drop_failed", "ingress_failed"),
        *("feature_reply_failed", "reply_failed", "reply_not_sent", "rpc_failed", "stream_failed"),
        "call_record_failed",
    }
)
"""Events that every request, or every batch, can cause again, with a traceback each time."""

FLOODING_LINES_PER_S = 10.0
"""Of each of them, for each model or kind of exception."""

FLOODS_MAX = 256
"""Models and kinds that have limits of their own; those that come later share their event's."""

INCIDENT_LINES_PER_S = 200.0
"""
Of all that name an incident: its number was told to a caller, who will ask for its line. Those
beyond `FLOODING_LINES_PER_S` come without the traceback, which is the others' as well.
"""


def set_up_logs(level: str, worker: int | None = None) -> None:
    """
    Configure logging for the process, once.

    stdout stays free for what a command answers; log lines go to stderr.

    Args:
        level: One of `LOG_LEVELS`.
        worker: Said on every line, where several processes write to one stream.
    """
    _least.level = level

    def say_worker(_logger: object, _method: str, event: EventDict) -> EventDict:
        event["worker"] = worker
        return event

    is_terminal = sys.stderr.isatty()
    renderer: structlog.typing.Processor = (
        structlog.dev.ConsoleRenderer() if is_terminal else structlog.processors.JSONRenderer()
    )
    structlog.configure(
        processors=[
            drop_less_severe,
            hold_back_floods(),
            structlog.contextvars.merge_contextvars,
            *([] if worker is None else [say_worker]),
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            *([] if is_terminal else [structlog.processors.format_exc_info]),
            renderer,
        ],
        # Loggers are made once: what of theirs is written is for a processor to say.
        wrapper_class=structlog.make_filtering_bound_logger(logging.DEBUG),
        logger_factory=structlog.PrintLoggerFactory(cast("TextIO", _Unfailing(sys.stderr))),
        cache_logger_on_first_use=True,
    )
    logging.basicConfig(
        level=logging.WARNING,
        stream=_Unfailing(sys.stderr),
        format="%(name)s: %(message)s"
        if worker is None
        else f"worker {worker}: %(name)s: %(message)s",
    )


class _Least:
    """What is written from, in this process; replaced whole, so that any thread may look."""

    level = "info"


_least = _Least()


def log_level() -> str:
    """Return the least severe of `LOG_LEVELS` that is written."""
    return _least.level


def set_log_level(level: str) -> None:
    """
    Write lines of this severity and above from now on; say so, at either level. Any thread may.

    Args:
        level: One of `LOG_LEVELS`.
    """
    before = _least.level
    if level == before:
        return
    _least.level = min(before, level, key=LOG_LEVELS.__getitem__)
    structlog.get_logger(__name__).log(
        max(LOG_LEVELS[_least.level], logging.INFO), "log_level_changed", to=level, before=before
    )
    _least.level = level


def drop_less_severe(_logger: object, method: str, event: EventDict) -> EventDict:
    """Leave out, as a processor of structlog, what is below the level of now."""
    if LOG_LEVELS.get(method, logging.CRITICAL) < LOG_LEVELS[_least.level]:
        raise structlog.DropEvent
    return event


def hold_back_floods() -> structlog.typing.Processor:
    """
    Make a processor that lets few lines of each of the `FLOODING` events through.

    The next one says in `suppressed` how many were held back. Any thread may log.
    """
    limits = {(event, ""): LineLimit(FLOODING_LINES_PER_S) for event in FLOODING}
    incidents = LineLimit(INCIDENT_LINES_PER_S)
    lock = threading.Lock()

    def limit_of(event: EventDict) -> LineLimit:
        key = event["event"], _cause(event)
        limit = limits.get(key)
        if limit is None and len(limits) < FLOODS_MAX:
            limit = limits[key] = LineLimit(FLOODING_LINES_PER_S)
        return limits[event["event"], ""] if limit is None else limit

    def hold_back(_logger: object, _method: str, event: EventDict) -> EventDict:
        if event["event"] not in FLOODING:
            return event
        is_incident, now_s = "incident" in event, time.monotonic()
        with lock:
            suppressed = limit_of(event).take(now_s, 0 if is_incident else 1)
            if suppressed is None and is_incident:
                suppressed = incidents.take(now_s)
                _drop_traceback(event)
        if suppressed is None:
            raise structlog.DropEvent
        if suppressed:
            event["suppressed"] = suppressed
        return event

    return hold_back


def _cause(event: EventDict) -> str:
    """Name what tells one flood of an event from another: the model, or the kind of exception."""
    model = event.get("model")
    if model:
        return str(model)
    kind = type(_exception(event))
    return "" if kind is type(None) else kind.__qualname__


def _exception(event: EventDict) -> BaseException | None:
    given = event.get("exc_info")
    if isinstance(given, BaseException):
        return given
    if isinstance(given, tuple):
        return cast("BaseException | None", given[1])
    return sys.exc_info()[1] if given else None


def _drop_traceback(event: EventDict) -> None:
    """Leave of an exception what it is, and not what it says: that is with the traceback."""
    exception = _exception(event)
    if event.pop("exc_info", None) is not None and exception is not None:
        event["exception_type"] = type(exception).__qualname__


class _Unfailing:
    """A stream that loses what it cannot write: nobody may die of a log line."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()
