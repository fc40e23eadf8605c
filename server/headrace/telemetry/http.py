"""The HTTP port: /healthz, /readyz and /metrics. Nothing here changes state."""

import socket
import socketserver
import threading
from collections.abc import Callable, Mapping, Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import structlog
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector

from headrace.errors import StartupError

_LOG = structlog.get_logger(__name__)

SILENCE_TIMEOUT_S = 5.0
"""A client that sends nothing for so long is cut off."""

MAX_CONNECTIONS = 32
"""Open at once; one more is closed. Probes and scrapers need a handful."""


class HttpEndpoint:
    """
    A small server on a thread of its own.

    Args:
        host: To listen on.
        port: 0 takes a free one.
        is_ready: Answers /readyz.
        collector: Answers /metrics.
        notes: What /readyz says besides, a line each.
        pages: What else there is, by path: each returns (content type, body). One that raises is
            answered with 503.

    Raises:
        StartupError: the address cannot be listened on.
    """

    def __init__(
        self,
        host: str,
        port: int,
        is_ready: Callable[[], bool],
        collector: Collector,
        pages: Mapping[str, Callable[[], tuple[str, bytes]]] | None = None,
        notes: Callable[[], Sequence[str]] = tuple,
    ) -> None:
        own_pages = pages
        registry = CollectorRegistry()
        registry.register(collector)

        class Handler(_Handler):
            pages = {  # noqa: RUF012 set once
                **{path: _found(page) for path, page in (own_pages or {}).items()},
                "/healthz": lambda: (HTTPStatus.OK, "text/plain", b"ok\n"),
                "/readyz": lambda: _readiness(is_ready=is_ready(), notes=notes()),
                "/metrics": lambda: (
                    HTTPStatus.OK,
                    CONTENT_TYPE_LATEST,
                    generate_latest(registry),
                ),
            }

        try:
            self._server = _Server((host, port), Handler)
        except OSError as error:
            raise StartupError(
                f"--http-address {host}:{port}: {error.strerror}; choose another or stop what uses "
                "it"
            ) from None
        self.port: int = self._server.server_address[1]
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.1,), name="http", daemon=True
        )

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    def stop(self) -> None:
        """Close the port."""
        if self._thread.ident is not None:
            self._server.shutdown()
            self._thread.join(5)
        self._server.server_close()


def _readiness(*, is_ready: bool, notes: Sequence[str]) -> tuple[HTTPStatus, str, bytes]:
    lines = ["ready" if is_ready else "not ready", *notes]
    status = HTTPStatus.OK if is_ready else HTTPStatus.SERVICE_UNAVAILABLE
    return status, "text/plain", "".join(f"{line}\n" for line in lines).encode()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 64

    def __init__(self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler]) -> None:
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self._places = threading.Semaphore(MAX_CONNECTIONS)
        super().__init__(address, handler)

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)  # HTTPServer's looks its own name up in the DNS
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._places.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of clients that leave in the middle of a reply."""


class _Handler(BaseHTTPRequestHandler):
    pages: dict[str, Callable[[], tuple[HTTPStatus, str, bytes]]]
    timeout = SILENCE_TIMEOUT_S
    server_version = "headrace"
    sys_version = ""

    def do_GET(self) -> None:
        page = self.pages.get(self.path.partition("?")[0])
        if page is None:
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        try:
            status, content_type, body = page()
        except Exception:  # noqa: BLE001 the port stays open
            _LOG.exception("page_failed", page=self.path)
            self.send_error(HTTPStatus.SERVICE_UNAVAILABLE)
            return
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Security-Policy", "default-src 'none'; style-src 'unsafe-inline'")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Probes are no news."""


def _found(
    page: Callable[[], tuple[str, bytes]],
) -> Callable[[], tuple[HTTPStatus, str, bytes]]:
    return lambda: (HTTPStatus.OK, *page())
