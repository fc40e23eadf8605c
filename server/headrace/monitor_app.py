"""The monitor's composition root: builds its objects once, starts them, stops them in order."""

import json
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import structlog

from headrace.errors import ServingError
from headrace.monitoring.judgement import Rules
from headrace.monitoring.metrics import MonitorMetrics
from headrace.monitoring.monitor import Monitor
from headrace.monitoring.notices import Webhook
from headrace.monitoring.page import page
from headrace.monitoring.references import ReferenceFiles
from headrace.monitoring.report import report
from headrace.monitoring.state import MonitorState
from headrace.monitoring.thread import MonitorThread
from headrace.ports import refuse_taken_port
from headrace.rpc.monitor import MonitorServer
from headrace.settings import MonitorSettings, join_address, split_address
from headrace.telemetry.http import HttpEndpoint

_LOG = structlog.get_logger(__name__)

WATCH_PERIOD_S = 1.0
REPORT_TIMEOUT_S = 5.0
STOP_TIMEOUT_S = 10.0
GRACE_S = 1.0
"""How long streams may go on when stopping: gateways send what they have and try again later."""


class MonitorProcess:
    """
    One monitor.

    Construct it, `start` it, and `run` it until a signal; or `start` and `stop` it from a test.

    Args:
        settings: Fixed for its life.

    Raises:
        StartupError: a port or the state folder is unusable.
    """

    def __init__(self, settings: MonitorSettings) -> None:
        host, port = split_address(settings.grpc_address)
        http_host, http_port = split_address(settings.http_address)
        refuse_taken_port("--http-address", http_host, http_port)
        self._webhook: Webhook | None = None
        if settings.webhook_url is not None:
            self._webhook = Webhook(settings.webhook_url, self._forget_notice)
        self._state = MonitorState(settings.state_dir)
        monitor = Monitor(
            Rules(
                window_s=settings.window_s,
                rows_min=settings.window_rows,
                coverage_min=settings.label_coverage,
            ),
            self._state,
            ReferenceFiles(settings.model_repository).find,
            None if self._webhook is None else self._webhook.put,
            kept_share=settings.kept_share,
            kept_max=settings.kept_predictions,
            kept_days=settings.kept_days,
            now_s=time.time(),
        )
        self._thread = MonitorThread(monitor)
        self._server = MonitorServer(host, port, self._thread)
        metrics = MonitorMetrics(
            lambda: self.report(has_history=False),
            self._webhook_counts,
            lambda: self._thread.waiting,
        )
        self._http = HttpEndpoint(
            http_host,
            http_port,
            lambda: self._dead_thread() is None,
            metrics,
            {
                "/": lambda: ("text/html; charset=utf-8", page(self.report()).encode()),
                "/report.json": lambda: ("application/json", _json(self.report())),
            },
        )
        self.grpc_address = join_address(host, self._server.port)
        self.http_address = join_address(http_host, self._http.port)
        self._is_stopped = False
        if settings.state_dir is None:
            _LOG.warning("state_is_in_memory", effect="a restart forgets everything; --state-dir")

    def report(self, *, has_history: bool = True) -> dict[str, Any]:
        """
        Return the report as it is now, with or without what was before.

        Raises:
            Overloaded: the monitor has too much to do.
            Draining: it is stopping.
        """
        return self._thread.ask(
            lambda monitor: report(monitor, time.time(), has_history=has_history), REPORT_TIMEOUT_S
        )

    def start(self) -> None:
        """Begin to take predictions."""
        self._thread.start()
        if self._webhook is not None:
            self._webhook.start()
        self._server.start()
        self._http.start()

    def run(self, on_ready: Callable[[], None]) -> int:
        """
        Start, watch until SIGTERM or SIGINT, and stop; a second signal ends the process at once.

        Returns:
            The exit code: 0 stopped as asked, 1 failed while running.
        """
        asked = threading.Event()

        def on_signal(number: int, _frame: FrameType | None) -> None:
            if asked.is_set():
                signal.signal(number, signal.SIG_DFL)
                signal.raise_signal(number)
            asked.set()

        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, on_signal)
        self.start()
        on_ready()
        while not asked.wait(WATCH_PERIOD_S):
            if (name := self._dead_thread()) is not None:
                _LOG.critical("thread_died", thread=name)
                return 1
        self.stop()
        return 0

    def stop(self) -> None:
        """Take no more, count what came, keep it. A second call does nothing."""
        if self._is_stopped:
            return
        self._is_stopped = True
        self._server.stop(GRACE_S)
        self._http.stop()
        if self._webhook is not None:
            self._webhook.stop(STOP_TIMEOUT_S)
        self._thread.stop(STOP_TIMEOUT_S)
        if not self._thread.is_alive:
            self._state.close()
        _LOG.info("stopped")

    def _dead_thread(self) -> str | None:
        """Name a thread that should run and does not."""
        if not self._thread.is_alive:
            return "monitor"
        if self._webhook is not None and not self._webhook.is_alive:
            return "webhook"
        return None

    def _forget_notice(self, notice: int) -> None:
        try:
            self._thread.put(lambda monitor: monitor.delivered(notice), STOP_TIMEOUT_S)
        except ServingError as error:  # it goes out again at the next start, with the same id
            _LOG.warning("notice_not_forgotten", notice=notice, reason=str(error))

    def _webhook_counts(self) -> tuple[int, int]:
        return (0, 0) if self._webhook is None else (self._webhook.delivered, self._webhook.failed)


def _json(document: dict[str, Any]) -> bytes:
    return json.dumps(document, allow_nan=False).encode()
