"""An hour's worth of feature reads, as fast as they go: does anything grow?

    python loadtest/bench/soak.py [--requests 1080000] [--segments 30]

One gateway answers an hour of 300 requests a second, 64 in flight, in segments of equal time. A
line is fitted to each segment's median latency, and to the gateway's memory. Writes a page under
loadtest/results/ and exits with 1 when either has grown: by more than 5 % of its mean from the
first segment to the last, and by more than two standard errors.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import feature_subjects
import features
import http2
import numpy as np
import subjects
from cores import GENERATOR_CORE
from page import commit, machine
from rich.console import Console

GROWTH_MAX = 0.05
LOADED = features.Shape(1, "loaded")
WARM_UP_S = 5.0


class Growth(NamedTuple):
    """A fitted line from the first segment to the last, in shares of the mean."""

    change: float
    standard_error: float

    @property
    def is_real(self) -> bool:
        """Whether it is more than may be, and more than chance."""
        return self.change > max(GROWTH_MAX, 2 * self.standard_error)

    def __str__(self) -> str:
        return f"{self.change:+.1%} ± {self.standard_error:.1%}"


@dataclass(frozen=True, slots=True)
class Segment:
    """What a segment saw."""

    requests: int
    p50_ms: float
    p99_ms: float
    rss_mib: float


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write the page; return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--requests", type=int, default=3600 * 300)
    parser.add_argument("--segments", type=int, default=30)
    parser.add_argument("--no-page", action="store_true", help="write no results page")
    options = parser.parse_args(arguments)
    if options.segments < 3:
        parser.error("a line needs three segments at least")
    os.sched_setaffinity(0, {GENERATOR_CORE})
    console = Console(stderr=True)
    started_s = time.monotonic()
    segments = _measure(options, console)
    growths = {
        "median latency": growth([segment.p50_ms for segment in segments]),
        "memory": growth([segment.rss_mib for segment in segments]),
    }
    if not options.no_page:
        page = features.ROOT / "loadtest" / "results" / f"{datetime.now(UTC):%Y-%m-%d}-soak.md"
        page.write_text(_page(segments, growths, time.monotonic() - started_s))
        console.print(f"written: {page.relative_to(features.ROOT)}")
    for name, one in growths.items():
        print(f"{name}: {one} from the first segment to the last")
    return 1 if any(one.is_real for one in growths.values()) else 0


def growth(values: Sequence[float]) -> Growth:
    """
    Fit a line by least squares.

    Source: any statistics book's simple linear regression; the error is that of the slope.
    """
    y = np.array(values)
    x = np.linspace(-0.5, 0.5, len(y))
    slope = float((x * (y - y.mean())).sum() / (x * x).sum())
    residuals = y - y.mean() - slope * x
    error = float(np.sqrt((residuals**2).sum() / (len(y) - 2) / (x * x).sum()))
    return Growth(slope / float(y.mean()), error / float(y.mean()))


def _measure(options: argparse.Namespace, console: Console) -> list[Segment]:
    with ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        valkey = stack.enter_context(subjects.valkey())
        repo, models, bodies = work / "feature_repo", work / "models", work / "bodies"
        models.mkdir()
        console.print(f"writing {feature_subjects.ENTITIES} entities through Feast …")
        feature_subjects.write_repo(repo, valkey.port)
        http2.write_bodies(bodies, feature_subjects.feast_requests(1))
        port = subjects.free_port()
        gateway = subjects.gateway(models, repo, port)
        pid = stack.enter_context(features.running(gateway, port))

        def ask(seconds: float) -> features.Figures:
            figures = features.over_grpc(port, features.FEAST_PATH, bodies, LOADED, seconds)
            if figures["errors"]:
                raise RuntimeError(f"{figures['errors']:g} errors")
            return figures

        rate_per_s = ask(WARM_UP_S)["requests_per_s"]
        seconds = options.requests / rate_per_s / options.segments
        segments: list[Segment] = []
        while sum(segment.requests for segment in segments) < options.requests:
            figures = ask(seconds)
            segment = Segment(
                int(figures["requests"]),
                figures["p50_ms"],
                figures["p99_ms"],
                _rss_mib(pid),
            )
            segments.append(segment)
            console.print(
                f"segment {len(segments):>3}  {figures['requests_per_s']:>8,.0f}/s  "
                f"p50 {segment.p50_ms:.2f} ms  p99 {segment.p99_ms:.2f} ms  "
                f"{segment.rss_mib:.1f} MiB"
            )
        return segments


def _rss_mib(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def _page(segments: Sequence[Segment], growths: dict[str, Growth], took_s: float) -> str:
    requests = sum(segment.requests for segment in segments)
    rows = "\n".join(
        f"| {number} | {segment.requests:,} | {segment.p50_ms:.2f} | {segment.p99_ms:.2f} "
        f"| {segment.rss_mib:.1f} |"
        for number, segment in enumerate(segments, 1)
    )
    grown = "; ".join(f"{name} {one}" for name, one in growths.items())
    return f"""# An hour's worth of feature reads

{requests:,} requests for fifty floats in five views of one entity: an hour of
{requests / 3600:,.0f} a second, answered in {took_s / 60:.0f} minutes by one gateway on one core,
64 in flight.

From the first segment to the last, by a fitted line: {grown}.

| segment | requests | p50 ms | p99 ms | memory MiB |
|---|---|---|---|---|
{rows}

{machine()}; commit {commit()}; `make bench-soak`.
"""


if __name__ == "__main__":
    sys.exit(main())
