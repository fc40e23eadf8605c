"""An HTTP/1.1 load generator for `feast serve`: POSTs, in a closed loop or paced."""

import http.client
import threading
import time
from collections.abc import Sequence


def run(
    port: int,
    path: str,
    bodies: Sequence[bytes],
    *,
    connections: int,
    warm_up_s: float,
    seconds: float,
    rate_per_s: float | None = None,
) -> dict[str, float]:
    """
    Keep one request in flight on each connection; contract as `http2.run`.

    With a rate, a request that is due while every connection is busy waits for one, and its wait
    counts.
    """
    start_s = time.perf_counter() + warm_up_s
    first_s = start_s - warm_up_s
    lock = threading.Lock()
    latencies_s: list[float] = []
    errors: list[str] = []
    taken = 0

    def take() -> float:
        """Return when the next request is due."""
        nonlocal taken
        with lock:
            taken += 1
            return first_s + taken / rate_per_s if rate_per_s else time.perf_counter()

    def loop(number: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        sent = number
        while (due_s := take()) < start_s + seconds:
            time.sleep(max(0.0, due_s - time.perf_counter()))
            body = bodies[sent % len(bodies)]
            try:
                response = _ask(connection, path, body)
            except (OSError, http.client.HTTPException):
                # A server may end a worker after so many requests; its connections go with it.
                connection.close()
                response = _ask(connection, path, body)
            sent += connections
            now_s = time.perf_counter()
            if start_s <= due_s:
                latencies_s.append(now_s - due_s)
                if response.status != http.client.OK:
                    errors.append(str(response.status))
            if now_s > start_s + seconds:
                break
        connection.close()

    threads = [threading.Thread(target=loop, args=(i,)) for i in range(connections)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    took_s = time.perf_counter() - start_s
    # Nothing may have been answered in time: then each took longer than there was.
    ordered = sorted(latencies_s) or [took_s]
    return {
        "requests": len(latencies_s),
        "requests_per_s": len(latencies_s) / took_s,
        "errors": len(errors),
        "p50_ms": 1e3 * ordered[len(ordered) // 2],
        "p99_ms": 1e3 * ordered[len(ordered) * 99 // 100],
    }


def _ask(
    connection: http.client.HTTPConnection, path: str, body: bytes
) -> http.client.HTTPResponse:
    connection.request("POST", path, body, {"content-type": "application/json"})
    response = connection.getresponse()
    response.read()
    return response
