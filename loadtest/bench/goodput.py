"""How much of its peak a server still serves when more is asked of it. Pure.

A model's peak is what it served in a closed loop in the same round: machines change, a round is
short.
"""

import math
from statistics import median
from typing import NamedTuple

from flood import Flood

GOODPUT_SHARE_MIN = 0.9
REFUSED_P99_MS_MAX = 5.0
RECOVERY_S_MAX = 2.0
GROWTH_MIB_MAX = 8.0
JUDGED = (1.5, 2.0, 5.0)
"""Shares of the peak that targets are for."""


class Peak(NamedTuple):
    """What is served of as much as can be answered, a second, and a second of processor time."""

    per_s: float
    per_cpu_s: float


class Point(NamedTuple):
    """
    What was served of so much, once.

    Args:
        share: What was to be offered, of the peak.
        offered_share: What was.
        goodput_share: Served right and in time, of the peak.
        cpu_goodput_share: The same per second of the server's processor time, which is what can
            still be compared where others use the machine.
        refused_share: Of what was offered.
        served_p99_ms: From when it was due.
        refused_p50_ms: Likewise; not a number if none was refused.
        refused_p99_ms: Likewise.
        refused_from_send_p99_ms: From when it was sent.
        recovered_s: From the end of it until 99 % were served; infinite for never.
        growth_mib: Of the server's memory, from the first half of it to the second.
        wrong: Answers to somebody else, or to nobody.
        lost: Requests that were sent and never answered.
        is_generator_bottleneck: Whether the generator says that it was measured itself.
    """

    share: float
    offered_share: float
    goodput_share: float
    cpu_goodput_share: float
    refused_share: float
    served_p99_ms: float
    refused_p50_ms: float
    refused_p99_ms: float
    refused_from_send_p99_ms: float
    recovered_s: float
    growth_mib: float
    wrong: int
    lost: int
    is_generator_bottleneck: bool


class Sweep(NamedTuple):
    """
    All that was measured of a model.

    Args:
        model: Its name.
        deadline_s: Of every call.
        peaks: Of each round.
        points: Of each round, by share.
    """

    model: str
    deadline_s: float
    peaks: list[Peak]
    points: dict[float, list[Point]]

    def middle(self, share: float) -> Point:
        """Return the median of each figure over the rounds; the worst of those that are faults."""
        points = self.points[share]
        middle = Point(*map(median, zip(*points, strict=True)))
        return middle._replace(
            recovered_s=max(point.recovered_s for point in points),
            growth_mib=max(point.growth_mib for point in points),
            wrong=sum(point.wrong for point in points),
            lost=sum(point.lost for point in points),
            is_generator_bottleneck=any(point.is_generator_bottleneck for point in points),
        )


def peak(flood: Flood) -> Peak:
    """Return the peak that a closed loop found."""
    figures = flood.figures
    served = figures["requests"] - figures["errors"]
    seconds = figures["window_end_s"] - figures["window_start_s"]
    return Peak(served / seconds, served / flood.cpu_s)


def point(share: float, at_best: Peak, flood: Flood) -> Point:
    """Return what an open loop found."""
    figures = flood.figures
    served = figures["goodput_per_s"] * figures["window_s"]
    statuses = figures["statuses"]
    refused = statuses["RESOURCE_EXHAUSTED"] + statuses["UNAVAILABLE"]
    return Point(
        share=share,
        offered_share=figures["offered_per_s"] / at_best.per_s,
        goodput_share=figures["goodput_per_s"] / at_best.per_s,
        cpu_goodput_share=served / flood.cpu_s / at_best.per_cpu_s,
        refused_share=refused / max(1, figures["offered"]),
        served_p99_ms=_number(figures["served_p99_ms"]),
        refused_p50_ms=_number(figures["refused_p50_ms"]),
        refused_p99_ms=_number(figures["refused_p99_ms"]),
        refused_from_send_p99_ms=_number(figures["refused_from_send_p99_ms"]),
        recovered_s=math.inf if figures["recovered_s"] is None else figures["recovered_s"],
        growth_mib=flood.growth_mib,
        wrong=figures["wrong"],
        lost=figures["unanswered"],
        is_generator_bottleneck=figures["generator_is_bottleneck"],
    )


def faults(sweep: Sweep) -> list[str]:
    """Return what no model may do under any load: answer wrongly or not at all, not recover."""
    found = []
    for share in sorted(sweep.points):
        middle, where = sweep.middle(share), f"{sweep.model} at {share:g} times its peak"
        if middle.wrong:
            found.append(f"{where}: {middle.wrong} wrong answers")
        if middle.lost:
            found.append(f"{where}: {middle.lost} calls never ended")
        if not middle.recovered_s < RECOVERY_S_MAX:
            found.append(
                f"{where}: recovered after {middle.recovered_s:.1f} s, not {RECOVERY_S_MAX:g} s"
            )
        if share > 1 and not middle.refused_share > 0:
            found.append(f"{where}: nothing was refused")
    return found


def missed(sweep: Sweep) -> list[str]:
    """Return the targets that a model whose rows cost far more than a refusal has missed."""
    found = []
    for share in sorted(set(JUDGED) & sweep.points.keys()):
        middle, where = sweep.middle(share), f"{sweep.model} at {share:g} times its peak"
        if middle.goodput_share < GOODPUT_SHARE_MIN:
            found.append(
                f"{where}: goodput {middle.goodput_share:.3f} of the peak, not {GOODPUT_SHARE_MIN}"
            )
        if not middle.refused_p99_ms <= REFUSED_P99_MS_MAX:
            found.append(
                f"{where}: refused within {middle.refused_p99_ms:.1f} ms (p99), "
                f"not {REFUSED_P99_MS_MAX:g} ms"
            )
        if middle.growth_mib > GROWTH_MIB_MAX:
            found.append(f"{where}: memory grew by {middle.growth_mib:.1f} MiB")
    return found


def _number(value: float | None) -> float:
    return math.nan if value is None else value
