"""A question about two servers, and what their rounds say: a ratio, its interval, a verdict. Pure.

What is compared is the ratio of the two figures of a round, which were taken in turn within
seconds: what slows the machine for minutes is in both. The verdict is that of the median of these
ratios, so that no odd round decides; the interval says how far to trust it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import comb
from statistics import median
from typing import NamedTuple

CONFIDENCE = 0.95

IDLE_SHARE_MIN = 0.03
"""A generator whose core has less left than this asked no faster than it could."""

Figures = Mapping[str, float]
"""What was measured of one server, as the generator or `FIGURES` names it."""

FIGURES = {
    "requests_per_s": ("requests/s", ",.0f"),
    "rows_per_s": ("rows/s", ",.0f"),
    "requests_per_cpu_s": ("requests per processor second", ",.0f"),
    "mean_ms": ("mean ms", ".3f"),
    "cpu_us": ("processor µs a request", ".1f"),
}
"""Unit and format."""


class Target(NamedTuple):
    """
    Where a ratio has to be.

    Args:
        bound: The ratio that just does.
        is_most: Whether it may not be above, rather than not below.
    """

    bound: float
    is_most: bool = False

    def is_met_by(self, ratio: float) -> bool:
        return ratio <= self.bound if self.is_most else ratio >= self.bound

    def __str__(self) -> str:
        return f"{'≤' if self.is_most else '≥'} {self.bound:g}"


@dataclass(frozen=True, slots=True)
class Load:
    """
    How a server is asked.

    Args:
        requests: Which ones; see `stage.Stage.bodies`.
        connections: To it.
        in_flight: Requests on each.
        rows: In each request.
    """

    requests: str
    connections: int = 4
    in_flight: int = 16
    rows: int = 1


@dataclass(frozen=True, slots=True)
class Side:
    """A server, of `names`, under a load."""

    server: str
    load: Load


@dataclass(frozen=True, slots=True)
class Question:
    """
    Two servers and what is compared.

    Args:
        name: On the command line.
        title: On the page.
        first: Whose figure is divided.
        second: By whose.
        figure: Which figure counts.
        target: Where the ratio has to be; None is only reported.
        is_fresh: Whether both are started anew for each round. How a process happens to lie in
            memory makes it faster or slower by a percent for as long as it lives; where the
            question is one of percents, each round has to draw that anew.
        rounds_times: How many times as many rounds as other questions it takes: a round between
            fresh processes is off by five percent and more, and a target may be three.
    """

    name: str
    title: str
    first: Side
    second: Side
    figure: str
    target: Target | None = None
    is_fresh: bool = False
    rounds_times: int = 1


class Interval(NamedTuple):
    """Holds the median of what was sampled with a probability of `coverage`."""

    low: float
    high: float
    coverage: float


@dataclass(slots=True)
class Contest:
    """
    What came of a question.

    Args:
        question: The question.
        rounds: The figures of the first and of the second server, round for round.
        skipped: Why it was not asked, if it was not.
        failure: Why its figures do not count, if they do not.
        notes: What else is to be known.
    """

    question: Question
    rounds: list[tuple[Figures, Figures]] = field(default_factory=list)
    skipped: str | None = None
    failure: str | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def is_measured(self) -> bool:
        return bool(self.rounds) and self.skipped is None and self.failure is None

    @property
    def ratios(self) -> list[float]:
        """The first over the second, round by round."""
        return self._ratios(self.question.figure)

    @property
    def ratio(self) -> float:
        """The median of the rounds' ratios."""
        return median(self.ratios)

    @property
    def interval(self) -> Interval:
        """Where the ratio is, if the rounds are a fair sample."""
        return median_interval(self.ratios)

    @property
    def cpu_ratio(self) -> float:
        """The processor time a request costs at the first over that at the second."""
        return median(self._ratios("cpu_us"))

    @property
    def cpu_interval(self) -> Interval:
        return median_interval(self._ratios("cpu_us"))

    @property
    def rate_ratio(self) -> float:
        """Requests per second of the first over those of the second."""
        return median(self._ratios("requests_per_s"))

    @property
    def rate_interval(self) -> Interval:
        return median_interval(self._ratios("requests_per_s"))

    @property
    def idle_shares(self) -> tuple[float | None, float | None]:
        """What the generator's core had left, for each server; None where no generator ran."""
        return self._known("generator_idle_share")

    @property
    def generator_ms(self) -> tuple[float | None, float | None]:
        """The generator's own processor time for each request; None likewise."""
        return self._known("generator_cpu_ms")

    def _known(self, figure: str) -> tuple[float | None, float | None]:
        first, second = (
            [figures[figure] for figures in side if figure in figures]
            for side in zip(*self.rounds, strict=True)
        )
        return (median(first) if first else None, median(second) if second else None)

    def medians(self, figure: str) -> tuple[float, float]:
        """Each server's own median of a figure."""
        firsts, seconds = zip(*self.rounds, strict=True)
        return (
            median(figures[figure] for figures in firsts),
            median(figures[figure] for figures in seconds),
        )

    @property
    def is_missed(self) -> bool:
        """Whether there is a target and the median misses it."""
        target = self.question.target
        return self.is_measured and target is not None and not target.is_met_by(self.ratio)

    @property
    def verdict(self) -> str:
        """`met`, `missed`, perhaps `…, barely`; or `reported`, `skipped`, `failed`."""
        target = self.question.target
        if not self.is_measured:
            return "failed" if self.failure is not None else "skipped"
        if target is None:
            return "reported"
        word = "missed" if self.is_missed else "met"
        ends = {target.is_met_by(end) for end in self.interval[:2]}
        return word if len(ends) == 1 else f"{word}, barely"

    def _ratios(self, figure: str) -> list[float]:
        return [one[figure] / two[figure] for one, two in self.rounds]


def median_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """
    Bound the median of what the values are drawn from, whatever its distribution.

    Args:
        values: One at least, each drawn on its own.
        confidence: The coverage to reach.

    Returns:
        The narrowest pair of the values, equally far from both ends, that reaches it; the smallest
        and the largest, with the coverage they have, where there are too few to reach it.

    Source:
        The median is between the k-th smallest and the k-th largest of n values unless fewer than
        k of them fall on one side of it: with probability 1 − 2 Σ_{i<k} C(n, i) / 2^n. Conover,
        "Practical Nonparametric Statistics", 3.2 (confidence interval for a quantile).
    """
    ordered, n = sorted(values), len(values)
    k, coverage = 1, 1 - 2 / 2**n
    while 2 * (k + 1) <= n:
        narrower = 1 - 2 * sum(comb(n, i) for i in range(k + 1)) / 2**n
        if narrower < confidence:
            break
        k, coverage = k + 1, narrower
    return Interval(ordered[k - 1], ordered[n - k], coverage)


def together(windows: Sequence[Figures], cpu_s: float, rows: int) -> dict[str, float]:
    """
    Take several windows of one server as one.

    Args:
        windows: Each with `requests`, `requests_per_s` and `mean_ms`, as the generator has them.
        cpu_s: What they cost the server.
        rows: In each request.

    Returns:
        All of `FIGURES`, with `requests`, `seconds` and `cpu_s`; where a generator told of them,
        `generator_idle_share` (of its core) and `generator_cpu_ms` (its own for each request).
    """
    requests = sum(window["requests"] for window in windows)
    seconds = sum(window["requests"] / window["requests_per_s"] for window in windows)
    waited_ms = sum(window["requests"] * window["mean_ms"] for window in windows)
    return {
        **_of_the_generator(windows),
        "requests": requests,
        "seconds": seconds,
        "cpu_s": cpu_s,
        "requests_per_s": requests / seconds,
        "rows_per_s": rows * requests / seconds,
        "requests_per_cpu_s": requests / cpu_s,
        "mean_ms": waited_ms / requests,
        "cpu_us": 1e6 * cpu_s / requests,
    }


def _of_the_generator(windows: Sequence[Mapping[str, float | None]]) -> dict[str, float]:
    lengths_s = [window["requests"] / window["requests_per_s"] for window in windows]
    found = {}
    for figure in ("generator_idle_share", "generator_cpu_share"):
        shares = [window.get(figure) for window in windows]
        known = [share for share in shares if share is not None]
        if len(known) == len(windows):
            spent_s = sum(share * s for share, s in zip(known, lengths_s, strict=True))
            found[figure] = spent_s / sum(lengths_s)
    if "generator_cpu_share" in found:
        requests = sum(window["requests"] for window in windows)
        found["generator_cpu_ms"] = 1e3 * found["generator_cpu_share"] * sum(lengths_s) / requests
    return found
