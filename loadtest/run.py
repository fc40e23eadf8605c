"""Run Locust against `headrace up`, and fail when a target is missed.

    python loadtest/run.py [--users 20] [--seconds 15]

Writes Locust's own report to loadtest/results/locust.html (not kept in git).
"""

import argparse
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
START_TIMEOUT_S = 120
P99_MS_MAX = 50.0
REQUESTS_PER_USER_S = 10
ACHIEVED_SHARE_MIN = 0.9
"""A generator that does not reach its offered rate has measured itself."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Return 0 when every target is met, 1 when one is missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--users", type=int, default=20)
    parser.add_argument("--seconds", type=int, default=15)
    options = parser.parse_args(arguments)
    up = subprocess.Popen(
        [sys.executable, "-m", "headrace", "up", "--root", str(ROOT)],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        address = _serving(up)
        statistics = _locust(address, options.users, options.seconds)
    finally:
        up.send_signal(signal.SIGINT)
        up.wait(START_TIMEOUT_S)
    return _judge(statistics, offered_per_s=options.users * REQUESTS_PER_USER_S)


def _serving(up: "subprocess.Popen[str]") -> str:
    alarm = threading.Timer(START_TIMEOUT_S, up.kill)
    alarm.start()
    assert up.stdout is not None
    try:
        for line in up.stdout:
            if line.startswith('{"event": "serving"'):
                return str(json.loads(line)["grpc_address"])
            print(line, end="")
    finally:
        alarm.cancel()
    raise SystemExit("loadtest: `headrace up` did not start")


def _locust(address: str, users: int, seconds: int) -> list[dict[str, object]]:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "locust", "-f", str(ROOT / "loadtest" / "locustfile.py")),
            *("--headless", "--host", f"grpc://{address}", "--users", str(users)),
            *("--spawn-rate", str(users), "--run-time", f"{seconds}s", "--reset-stats", "--json"),
            *("--html", str(ROOT / "loadtest" / "results" / "locust.html"), "--skip-log"),
        ],
        capture_output=True,
        text=True,
        timeout=seconds + 60,
        check=False,
    )
    if not done.stdout.strip():
        raise SystemExit(f"loadtest: locust failed: {done.stderr[-2000:]}")
    statistics: list[dict[str, object]] = json.loads(done.stdout)
    return statistics


def _judge(statistics: list[dict[str, object]], *, offered_per_s: float) -> int:
    faults = []
    achieved_per_s = 0.0
    for entry in statistics:
        times = {float(ms): int(n) for ms, n in dict(entry["response_times"]).items()}  # type: ignore[call-overload]
        count, failures = int(str(entry["num_requests"])), int(str(entry["num_failures"]))
        span_s = float(str(entry["last_request_timestamp"])) - float(str(entry["start_time"]))
        achieved_per_s += count / max(span_s, 1e-9)
        p50_ms, p99_ms = _percentile(times, 0.50), _percentile(times, 0.99)
        print(
            f"{entry['name']:<10} {count:>6} requests  p50 {p50_ms:g} ms  p99 {p99_ms:g} ms", end=""
        )
        print(f"  {failures} failures")
        if failures:
            faults.append(f"{entry['name']}: {failures} failures")
        if p99_ms > P99_MS_MAX:
            faults.append(f"{entry['name']}: p99 {p99_ms:g} ms > {P99_MS_MAX:g} ms")
    print(f"achieved {achieved_per_s:.0f} of {offered_per_s:.0f} offered requests/s")
    if achieved_per_s < ACHIEVED_SHARE_MIN * offered_per_s:
        faults.append("the offered rate was not reached")
    for fault in faults:
        print(f"missed: {fault}", file=sys.stderr)
    return 1 if faults else 0


def _percentile(times: dict[float, int], share: float) -> float:
    total, seen = sum(times.values()), 0
    for ms in sorted(times):
        seen += times[ms]
        if seen >= share * total:
            return ms
    return 0.0


if __name__ == "__main__":
    sys.exit(main())
