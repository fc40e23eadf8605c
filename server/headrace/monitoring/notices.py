"""Alarms on their way out: CloudEvents, posted to a webhook by a thread of its own.

Source: CloudEvents 1.0.2, "HTTP Protocol Binding", structured content mode.
"""

import json
import math
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from datetime import UTC, datetime
from http.client import HTTPException
from ipaddress import ip_address
from queue import Empty, Full, Queue
from typing import Any
from urllib.parse import urlsplit

import structlog

from headrace.errors import StartupError
from headrace.monitoring.detectors import Signal
from headrace.monitoring.judgement import Change

_LOG = structlog.get_logger(__name__)

QUEUE_SIZE = 1_000
TIMEOUT_S = 5.0
FIRST_PAUSE_S = 0.5
"""Doubled after each failure, up to `LONGEST_PAUSE_S`."""

LONGEST_PAUSE_S = 300.0
PATIENCE_S = 24 * 3600.0
"""A receiver that is away for a night misses nothing."""

REFUSED_PATIENCE_S = 3600.0
"""For one that is there and says no: it will hardly change its mind, and others wait behind."""

_TYPES = {
    Signal.DRIFT: "io.headrace.drift.detected",
    Signal.PREDICTION_DRIFT: "io.headrace.drift.detected",
    Signal.PREDICTION_MISSING: "io.headrace.quality.violated",
    Signal.MISSING: "io.headrace.quality.violated",
    Signal.OUT_OF_RANGE: "io.headrace.quality.violated",
    Signal.STALE: "io.headrace.quality.violated",
    Signal.ERROR: "io.headrace.performance.degraded",
}
_RECOVERED = "io.headrace.recovered"


def cloud_event(
    model: str, version: int, change: Change, incident: int | None, now_s: float
) -> str:
    """
    Return the event of an alarm that began or ended, as JSON.

    Its `id` is the same for the same alarm: who gets it twice can tell.
    """
    happened = "opened" if change.is_alarmed else "resolved"
    event = {
        "specversion": "1.0",
        "id": f"{model}/{version}/{incident}/{happened}",
        "source": "/headrace/monitor",
        "type": _TYPES[change.signal] if change.is_alarmed else _RECOVERED,
        "subject": f"{model}/{version}",
        "time": datetime.fromtimestamp(now_s, UTC).isoformat(),
        "datacontenttype": "application/json",
        "data": {
            "model": model,
            "version": version,
            "incident": incident,
            "signal": str(change.signal),
            "column": change.subject,
            "statistic": change.statistic if math.isfinite(change.statistic) else None,
            "threshold": change.threshold,
        },
    }
    return json.dumps(event, allow_nan=False)


class Webhook:
    """
    Posts notices in order, one at a time; tries again, ever less often, when it fails.

    Args:
        url: `http` or `https`.
        done: Is told of each notice that was delivered or given up. Called by the webhook's thread.

    Raises:
        StartupError: the URL is not one that can be posted to.
    """

    def __init__(self, url: str, done: Callable[[int], None]) -> None:
        host = _host_of(url)
        self._url = url
        self._done = done
        handlers: list[urllib.request.BaseHandler] = [_NoRedirect()]
        if _is_loopback(host):  # a proxy has no business between us and ourselves
            handlers.append(urllib.request.ProxyHandler({}))
        self._opener = urllib.request.build_opener(*handlers)
        self._queue: Queue[tuple[int, str, float]] = Queue(QUEUE_SIZE)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="webhook", daemon=True)
        self.delivered = self.failed = 0

    def put(self, notice: int, body: str) -> None:
        """Queue a notice; when too many wait it stays in the state until the next start."""
        try:
            self._queue.put_nowait((notice, body, time.monotonic()))
        except Full:
            _LOG.error("webhook_queue_full", notice=notice)

    def start(self) -> None:
        """Begin to deliver."""
        self._thread.start()

    def stop(self, timeout_s: float) -> None:
        """End; what was not delivered stays in the state."""
        self._stopping.set()
        if self._thread.ident is not None:
            self._thread.join(timeout_s)

    @property
    def is_alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                notice, body, put_s = self._queue.get(timeout=0.2)
            except Empty:
                continue
            try:
                self._deliver(notice, body, put_s)
            except Exception:  # noqa: BLE001 one notice must not end the thread: it stays in the state
                _LOG.exception("webhook_error", notice=notice)

    def _deliver(self, notice: int, body: str, put_s: float) -> None:
        pause_s = FIRST_PAUSE_S
        while (reason := self._post(body)) is not None:
            is_refused = isinstance(reason, int) and 400 <= reason < 500 and reason not in _LATER
            waited_s = time.monotonic() - put_s
            if waited_s > (REFUSED_PATIENCE_S if is_refused else PATIENCE_S):
                self.failed += 1
                _LOG.error("webhook_given_up", notice=notice, reason=reason, waited_s=int(waited_s))
                break
            _LOG.warning("webhook_failed", notice=notice, reason=reason, retry_in_s=pause_s)
            if self._stopping.wait(pause_s):
                return  # it goes out at the next start
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
        else:
            self.delivered += 1
        self._done(notice)

    def _post(self, body: str) -> int | str | None:
        """Try once; return the status or the error that it failed with."""
        headers = {"Content-Type": "application/cloudevents+json; charset=utf-8"}
        request = urllib.request.Request(  # noqa: S310 checked in the constructor
            self._url, body.encode(), headers, method="POST"
        )
        try:
            with self._opener.open(request, timeout=TIMEOUT_S) as response:
                status = int(response.status)
        except urllib.error.HTTPError as error:
            status = error.code
            error.close()
        # An answer that is not HTTP is an HTTPException, and that is no OSError.
        except (OSError, ValueError, HTTPException) as error:
            return type(error).__name__
        return None if 200 <= status < 300 else status


_LATER = (408, 425, 429)
"""Of the refusals, those that say: come back."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """An answer that points elsewhere is a failure: the operator named one address."""

    def redirect_request(self, *_: Any) -> None:
        return None


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _host_of(url: str) -> str:
    """
    Return the host of a web address.

    Raises:
        StartupError: it is none, or one that no request could be made of.
    """
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port  # a port that is no number is a ValueError
    except ValueError:
        host = None
    if host is None or parts.scheme not in ("http", "https"):
        raise StartupError("--webhook-url: expected http://… or https://…")
    if not url.isascii() or not url.isprintable() or " " in url or "@" in parts.netloc:
        raise StartupError("--webhook-url: has a user, a space, or a character beyond ASCII")
    return host
