"""An HTTP/1.1 load generator for `feast serve`: POSTs, in a closed loop or paced."""

import http.client
import threading
import time
from collections.abc import Sequence

STALL_S = 5.0


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
    counts; one that has found none `STALL_S` after the end counts with its age.
    """
    start_s = time.perf_counter() + warm_up_s
    first_s, end_s = start_s - warm_up_s, start_s + seconds
    lock = threading.Lock()
    latencies_s: list[float] = []
    errors: list[str] = []
    in_time: list[int] = []
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
        while (due_s := take()) < end_s:
            time.sleep(max(0.0, due_s - time.perf_counter()))
            if (now_s := time.perf_counter()) > end_s + STALL_S:
                latencies_s.append(now_s - due_s)
                continue
            problem = _ask_again(connection, path, bodies[sent % len(bodies)])
            sent += connections
            now_s = time.perf_counter()
            if start_s <= due_s:
                latencies_s.append(now_s - due_s)
                if now_s <= end_s:
                    in_time.append(1)
                if problem:
                    errors.append(problem)
            if now_s > end_s and not rate_per_s:
                break
        connection.close()

    threads = [threading.Thread(target=loop, args=(i,)) for i in range(connections)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # In a closed loop the last answers come after the end, and so count the time until them.
    took_s = seconds if rate_per_s else time.perf_counter() - start_s
    answered = len(in_time) if rate_per_s else len(latencies_s)
    # Nothing may have been answered in time: then each took longer than there was.
    ordered = sorted(latencies_s) or [took_s]
    return {
        "requests": answered,
        "requests_per_s": answered / took_s,
        "errors": len(errors),
        "p50_ms": 1e3 * ordered[len(ordered) // 2],
        "p99_ms": 1e3 * ordered[len(ordered) * 99 // 100],
    }


def _ask_again(connection: http.client.HTTPConnection, path: str, body: bytes) -> str:
    """Ask, a second time on a new connection if need be; return what was wrong, if anything."""
    for is_last in (False, True):
        try:
            response = _ask(connection, path, body)
        except (OSError, http.client.HTTPException) as error:
            # A server may end a worker after so many requests; its connections go with it.
            connection.close()
            if is_last:
                return repr(error)
        else:
            return "" if response.status == http.client.OK else str(response.status)
    raise AssertionError


def _ask(
    connection: http.client.HTTPConnection, path: str, body: bytes
) -> http.client.HTTPResponse:
    connection.request("POST", path, body, {"content-type": "application/json"})
    response = connection.getresponse()
    response.read()
    return response
