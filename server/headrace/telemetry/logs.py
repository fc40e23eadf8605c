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
"""Of each of them."""


def set_up_logs(level: str, worker: int | None = None) -> None:
    """
    Configure logging for the process, once.

    stdout stays free for what a command answers; log lines go to stderr.

    Args:
        level: `debug`, `info`, `warning` or `error`.
        worker: Said on every line, where several processes write to one stream.
    """

    def say_worker(_logger: object, _method: str, event: EventDict) -> EventDict:
        event["worker"] = worker
        return event

    is_terminal = sys.stderr.isatty()
    renderer: structlog.typing.Processor = (
        structlog.dev.ConsoleRenderer() if is_terminal else structlog.processors.JSONRenderer()
    )
    structlog.configure(
        processors=[
            hold_back_floods(),
            structlog.contextvars.merge_contextvars,
            *([] if worker is None else [say_worker]),
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            *([] if is_terminal else [structlog.processors.format_exc_info]),
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelName(level.upper())),
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


def hold_back_floods() -> structlog.typing.Processor:
    """
    Make a processor that lets few lines of each of the `FLOODING` events through.

    The next one says in `suppressed` how many were held back. Any thread may log.
    """
    limits = {event: LineLimit(FLOODING_LINES_PER_S) for event in FLOODING}
    lock = threading.Lock()

    def hold_back(_logger: object, _method: str, event: EventDict) -> EventDict:
        limit = limits.get(event["event"])
        if limit is not None:
            with lock:
                suppressed = limit.take(time.monotonic())
            if suppressed is None:
                raise structlog.DropEvent
            if suppressed:
                event["suppressed"] = suppressed
        return event

    return hold_back


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
