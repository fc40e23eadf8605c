"""Alarms on their way out: CloudEvents, posted to a webhook by a thread of its own.

Source: CloudEvents 1.0.2, "HTTP Protocol Binding", structured content mode.
"""

import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from datetime import UTC, datetime
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
ATTEMPTS = 6
FIRST_PAUSE_S = 0.5
"""Doubled after each failure."""

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
            "statistic": change.statistic,
            "threshold": change.threshold,
        },
    }
    return json.dumps(event)


class Webhook:
    """
    Posts notices in order, one at a time; tries again when it fails.

    Args:
        url: `http` or `https`.
        done: Is told of each notice that was delivered or given up. Called by the webhook's thread.

    Raises:
        StartupError: the URL is not one.
    """

    def __init__(self, url: str, done: Callable[[int], None]) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise StartupError("--webhook-url: expected http://… or https://…")
        self._url = url
        self._done = done
        handlers: list[urllib.request.BaseHandler] = [_NoRedirect()]
        if _is_loopback(parts.hostname):  # a proxy has no business between us and ourselves
            handlers.append(urllib.request.ProxyHandler({}))
        self._opener = urllib.request.build_opener(*handlers)
        self._queue: Queue[tuple[int, str]] = Queue(QUEUE_SIZE)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._deliver, name="webhook", daemon=True)
        self._lock = threading.Lock()
        self.delivered = self.failed = 0

    def put(self, notice: int, body: str) -> None:
        """Queue a notice; when too many wait it stays in the state until the next start."""
        try:
            self._queue.put_nowait((notice, body))
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

    def _deliver(self) -> None:
        while not self._stopping.is_set():
            try:
                notice, body = self._queue.get(timeout=0.2)
            except Empty:
                continue
            if self._post_patiently(body):
                self.delivered += 1
            elif self._stopping.is_set():
                return  # at the next start
            else:
                self.failed += 1
                _LOG.error("webhook_given_up", notice=notice, attempts=ATTEMPTS)
            self._done(notice)

    def _post_patiently(self, body: str) -> bool:
        pause_s = FIRST_PAUSE_S
        for attempt in range(ATTEMPTS):
            if attempt and self._stopping.wait(pause_s):
                return False
            if self._post(body):
                return True
            pause_s *= 2
        return False

    def _post(self, body: str) -> bool:
        headers = {"Content-Type": "application/cloudevents+json; charset=utf-8"}
        request = urllib.request.Request(  # noqa: S310 checked in the constructor
            self._url, body.encode(), headers, method="POST"
        )
        started_s = time.monotonic()
        reason: Any
        try:
            with self._opener.open(request, timeout=TIMEOUT_S) as response:
                if 200 <= response.status < 300:
                    return True
                reason = response.status
        except urllib.error.HTTPError as error:
            reason = error.code
            error.close()
        except (OSError, ValueError) as error:
            reason = type(error).__name__
        took_s = round(time.monotonic() - started_s, 3)
        _LOG.warning("webhook_failed", reason=reason, took_s=took_s)
        return False


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """An answer that points elsewhere is a failure: the operator named one address."""

    def redirect_request(self, *_: Any) -> None:
        return None


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
