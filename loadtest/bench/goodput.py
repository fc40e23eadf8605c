"""How much of its peak a server still serves when more is asked of it. Pure.

A model's peak is what it served in a closed loop in the same round: machines change, a round is
short. Rounds in which the generator was late, or full, judge nothing: what they measured is itself.
"""

import math
from statistics import median
from typing import NamedTuple

from contest import Target
from flood import Flood

GOODPUT_SHARE = Target(0.9)
REFUSED_P99_MS = Target(5.0, is_most=True)
RECOVERY_S = Target(2.0, is_most=True)
GROWTH_MIB = Target(8.0, is_most=True)
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
        offered_per_s: The same, a second.
        achieved_per_s: What was sent of it in time; the rest waited for the server's limits, or for
            the generator.
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
        generator_cpu_share: Of its core, that the generator used itself.
        generator_idle_share: Of its core, that nobody used; not a number if that is not known.
        is_generator_bottleneck: Whether the generator says that it was measured itself.
    """

    share: float
    offered_share: float
    offered_per_s: float
    achieved_per_s: float
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
    generator_cpu_share: float
    generator_idle_share: float
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

    def sound(self, share: float) -> list[Point]:
        """Return the rounds in which the generator kept up; all, if those are not most of them."""
        points = self.points[share]
        sound = [point for point in points if not point.is_generator_bottleneck]
        return sound if 2 * len(sound) > len(points) else points

    def middle(self, share: float) -> Point:
        """
        Return the median of each figure over the sound rounds; the worst of those that are faults.

        Wrong answers and lost calls are those of all rounds.
        """
        points = self.sound(share)
        middle = Point(*map(_median, zip(*points, strict=True)))
        return middle._replace(
            recovered_s=max(point.recovered_s for point in points),
            growth_mib=max(point.growth_mib for point in points),
            wrong=sum(point.wrong for point in self.points[share]),
            lost=sum(point.lost for point in self.points[share]),
            is_generator_bottleneck=any(point.is_generator_bottleneck for point in points),
        )


class Judgement(NamedTuple):
    """
    A figure of a model that has a target.

    Args:
        what: At which shares of the peak.
        figure: Which one.
        target: Where it has to be.
        value: The median over the rounds, or the worst of several loads or rounds.
        values: Of each round, or load.
        is_sound: Whether the generator kept up where it was measured, in most rounds.
        cpu_value: By processor time, if that can be said.
        is_worst: Whether the value is the worst and no median.
    """

    what: str
    figure: str
    target: Target
    value: float
    values: list[float]
    is_sound: bool
    cpu_value: float | None = None
    is_worst: bool = False

    @property
    def is_missed(self) -> bool:
        """What is no number, since nobody was refused or the like, is not met."""
        return self.is_sound and not self.target.is_met_by(self.value)

    @property
    def verdict(self) -> str:
        """`met` or `missed`, `…, barely` of a median whose rounds differ; or `not measured`."""
        if not self.is_sound:
            return "not measured"
        word = "missed" if self.is_missed else "met"
        known = [value for value in self.values if not math.isnan(value)]
        differ = len({self.target.is_met_by(value) for value in known}) > 1
        return f"{word}, barely" if differ and not self.is_worst else word


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
        offered_per_s=figures["offered_per_s"],
        achieved_per_s=figures["achieved_per_s"],
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
        generator_cpu_share=figures["generator_cpu_share"],
        generator_idle_share=_number(figures["generator_idle_share"]),
        is_generator_bottleneck=figures["generator_is_bottleneck"],
    )


def faults(sweep: Sweep) -> list[str]:
    """Return what no model may do under any load: answer wrongly, not at all, or refuse nobody."""
    found = []
    for share in sorted(sweep.points):
        middle, where = sweep.middle(share), f"{sweep.model} at {share:g} times its peak"
        if middle.wrong:
            found.append(f"{where}: {middle.wrong} wrong answers")
        if middle.lost:
            found.append(f"{where}: {middle.lost} calls never ended")
        is_asked = share >= min(JUDGED) and not middle.is_generator_bottleneck
        if is_asked and not middle.refused_share > 0:
            found.append(f"{where}: nothing was refused")
    return found


def judgements(sweep: Sweep, *, is_cheap_to_refuse: bool) -> list[Judgement]:
    """
    Judge a model by the targets that it has, as far as their loads were offered.

    Args:
        sweep: Of the model.
        is_cheap_to_refuse: Whether its rows cost far more than refusals; others need to recover
            and no more.
    """
    found = []
    judged = sorted(set(JUDGED) & sweep.points.keys()) if is_cheap_to_refuse else []
    for share in judged:
        middle, points = sweep.middle(share), sweep.sound(share)
        found.append(
            Judgement(
                f"{share:g}",
                "goodput in time, of the peak",
                GOODPUT_SHARE,
                middle.goodput_share,
                [point.goodput_share for point in points],
                not middle.is_generator_bottleneck,
                middle.cpu_goodput_share,
            )
        )
    flooded = sorted(share for share in sweep.points if share > 1)
    telling = [share for share in flooded if _tells_of_recovery(sweep.middle(share))]
    is_judged = not any(sweep.middle(share).is_generator_bottleneck for share in judged)
    for shares, is_sound, figure, target, values in (
        (judged, is_judged, "refused within, p99 ms", REFUSED_P99_MS, "refused_p99_ms"),
        (judged, is_judged, "memory's growth, MiB", GROWTH_MIB, "growth_mib"),
        (telling or flooded, bool(telling), "recovery, s", RECOVERY_S, "recovered_s"),
    ):
        if shares:
            what = ", ".join(f"{share:g}" for share in shares)
            of_each = [getattr(sweep.middle(share), values) for share in shares]
            worst = Judgement(what, figure, target, _worst(of_each), of_each, is_sound)
            found.append(worst._replace(is_worst=True))
    return found


def _tells_of_recovery(middle: Point) -> bool:
    """
    Say whether a flood was one, and what came after it was the server's doing.

    A generator that is late makes a recovery look longer, never shorter, if it floods at all.
    """
    if not middle.is_generator_bottleneck:
        return True
    is_flood = middle.offered_share * middle.achieved_per_s > middle.offered_per_s
    return is_flood and RECOVERY_S.is_met_by(middle.recovered_s)


def _worst(values: list[float]) -> float:
    """Return the largest of those that are numbers."""
    return max((value for value in values if not math.isnan(value)), default=math.nan)


def _median(values: tuple[float, ...]) -> float:
    """Return the median of those that are numbers."""
    known = [value for value in values if not math.isnan(value)]
    return median(known) if known else math.nan


def _number(value: float | None) -> float:
    return math.nan if value is None else value
