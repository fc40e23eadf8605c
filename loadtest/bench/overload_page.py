"""What the results page says about overload. Pure: figures come in, Markdown goes out."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from statistics import median

import goodput
from goodput import Judgement, Sweep
from overload_models import SLOW
from page import Section, bullets, table

SUBHEADS = (
    *("offered, of peak", "offered/s", "sent in time/s", "generator's processor / idle"),
    *("goodput, of peak", "in rounds", "per CPU second", "refused", "too late", "served p99 ms"),
    *("refused p50 / p99 ms", "from send p99 ms", "recovery s", "memory MiB"),
)


@dataclass(slots=True)
class Overload:
    """
    What came of asking too much.

    Args:
        rounds: Of each model.
        seconds: Of each load.
        sweeps: The slow model's first; those that failed with what they have.
        failures: Why one ended early.
        row_ms: What a row of the slow model takes of a processor.
        curve: The picture's name, beside the page.
    """

    rounds: int
    seconds: float
    sweeps: list[Sweep] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    row_ms: float = math.nan
    curve: str | None = None

    @property
    def judgements(self) -> list[tuple[Sweep, Judgement]]:
        """All that has a target, by model; only the slow one has to serve so much."""
        return [
            (sweep, one)
            for sweep in self.sweeps
            for one in goodput.judgements(sweep, is_cheap_to_refuse=sweep.model == SLOW)
        ]

    @property
    def missed(self) -> list[str]:
        """Targets missed, and what no server may do."""
        found = [text for sweep in self.sweeps for text in goodput.faults(sweep)]
        return found + [
            f"{sweep.model} at {one.what} times its peak: {one.figure}: {_figure(one.value, 3)}, "
            f"not {one.target}"
            for sweep, one in self.judgements
            if one.is_missed
        ]

    @property
    def unmeasured(self) -> list[str]:
        """What could not be asked, and why."""
        late = [
            (sweep, ", ".join(f"{share:g}" for share in sorted(_late(sweep))))
            for sweep in self.sweeps
            if any(of is sweep and not one.is_sound for of, one in self.judgements)
        ]
        return self.failures + [
            f"{sweep.model}: the generator did not keep up at {shares} times its peak: what is "
            "judged there is not measured"
            for sweep, shares in late
        ]

    @property
    def status(self) -> int:
        """
        Of the process: 2 if something was not measured, 1 if a target is missed, else 0.

        On two cores no generator may keep up with a tiny model: that is said and fails nothing.
        """
        is_lacking = any(of.model == SLOW and not one.is_sound for of, one in self.judgements)
        return 2 if self.failures or is_lacking else int(bool(self.missed))


def section(overload: Overload) -> Section:
    """Return its rows, notes and text for the results page."""
    rows = [_head_row(sweep, one) for sweep, one in overload.judgements]
    if overload.failures and not rows:
        rows.append(["overload", "-", "gateway", "-", "-", "-", "failed", "-"])
    notes = [f"overload: {text}" for text in (*overload.missed, *overload.unmeasured)]
    curve = f"![goodput over offered load]({overload.curve})\n\n" if overload.curve else ""
    models = "".join(_model(sweep, overload) for sweep in overload.sweeps if sweep.points)
    return Section(
        rows,
        notes,
        f"""## Overload

What is still served, right and in time, when more is asked than can be: open loop, requests due at
random (Poisson, other times in each round and at each load), latencies from when they were due,
every reply compared with its own answer. Metrics are on, one call in a hundred is traced and every
prediction streamed to a monitor. Each gateway has one model, as refusing calls unread needs it
(decision 0024): beside other models every call is read before it is refused, which costs more.

{curve}{models}### How to read it

- A share is of the peak: what the same gateway served in a closed loop in the same round. Figures
  are medians of {overload.rounds} rounds of {overload.seconds:g} s, with what the rounds lie
  between; recovery and memory the worst of them. A load goes on for a second or more before it
  counts, until as much waits as the deadline lets. *Per CPU second* divides by the processor time
  that the gateway used. "barely" says that some round was on the other side of the target.
- *Generator's processor* is its own share of its core; *idle* is what it and all others left of it.
- *Sent in time* is less than offered where the server's limits on streams hold requests back, or
  the generator is late.
- *Refused* is RESOURCE_EXHAUSTED or UNAVAILABLE, timed from when the request was due; *from send*
  leaves out what the generator and the server's limits added before it left.
- *Too late* is all that was neither served in time nor refused: its deadline passed at the client,
  on the way or with the server, which may have answered then.
- *Recovery*: after the flood half the peak is asked; from when on 99 % of that was served.
- *Memory*: most of it in a flood's second half less most of it in the first.
- Targets, at 1.5, 2 and 5 times the peak of the slow model: goodput {goodput.GOODPUT_SHARE} of it,
  refused within {goodput.REFUSED_P99_MS.bound:g} ms (p99), memory within \
{goodput.GROWTH_MIB.bound:g} MiB; of both models, recovery within {goodput.RECOVERY_S.bound:g} s.

### Why to doubt it

- One machine with two cores: the gateway has one for itself; generator, monitor and collector
  share the other. Loopback, no TLS, a few connections. The gateway logs errors only: by default it
  would write up to ten lines a second of sampled and refused calls for each status.
- A refusal costs the server 0.02 to 0.2 ms, depending on the machine, and comes out of the same
  core: of a model whose row costs little more, nobody can serve 90 % at five times its peak. The
  tiny model is here to see that its server stays up, and is well again afterwards: more calls come
  than can even be read, so that most are over before anybody can refuse them
  (docs/performance.md, "What did not help").
- Rounds in which the generator was late or had no core left judge nothing, if the others are most
  of them. Where they are not, the row is marked * and its verdict is "not measured"; but a recovery
  in time counts, if more than the peak was sent: a late generator makes it look longer. On two
  cores no generator may keep up with the tiny model.
""",
    )


def page(overload: Overload, circumstances: str) -> str:
    """Return a page of it alone; `circumstances` say where, when and how it was measured."""
    found = section(overload)
    head = f"{table(found.rows)}\n\n" if found.rows else ""
    judged = overload.judgements
    verdict = ""
    if not judged:
        verdict = "No target was judged.\n\n"
    elif overload.status == 0:
        verdict = "Every target is met.\n\n"
    text = found.text.replace("## Overload\n\n", "", 1).replace("\n### ", "\n## ")
    return f"# Overload\n\n{head}{verdict}{bullets(found.notes)}{circumstances}\n{text}"


def _head_row(sweep: Sweep, one: Judgement) -> list[str]:
    title = f"overload, {sweep.model} model, {one.what} times its peak"
    peak = f"its peak: {median(peak.per_s for peak in sweep.peaks):,.0f}/s"
    digits = 3 if one.cpu_value is not None else 1
    values = [value for value in one.values if not math.isnan(value)]
    between = (
        f" ({_figure(min(values), digits)} to {_figure(max(values), digits)})" if values else ""
    )
    measured = f"{_figure(one.value, digits)}{between}"
    if one.cpu_value is None:
        return [title, one.figure, measured, "-", "-", str(one.target), one.verdict, "-"]
    return [
        *(title, one.figure, "gateway", peak, measured, str(one.target), one.verdict),
        f"per CPU second, {_figure(one.cpu_value, 3)}",
    ]


def _late(sweep: Sweep) -> list[float]:
    return [share for share in sweep.points if sweep.middle(share).is_generator_bottleneck]


def _model(sweep: Sweep, overload: Overload) -> str:
    peaks = [peak.per_s for peak in sweep.peaks]
    cost = f", {overload.row_ms:.1f} ms of processor a row" if sweep.model == SLOW else ""
    rows = [_row(sweep, share) for share in sorted(sweep.points)]
    lines = [SUBHEADS, ["---"] * len(SUBHEADS), *rows]
    return f"""### The {sweep.model} model

Peak {median(peaks):,.0f}/s ({min(peaks):,.0f} to {max(peaks):,.0f}){cost}; each call has \
{1e3 * sweep.deadline_s:g} ms.

{"".join(_lines(lines))}
"""


def _lines(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    for row in rows:
        yield f"| {' | '.join(row)} |\n"


def _row(sweep: Sweep, share: float) -> list[str]:
    middle = sweep.middle(share)
    goodputs = [point.goodput_share for point in sweep.sound(share)]
    mark = " *" if middle.is_generator_bottleneck else ""
    return [
        f"{share:g} ({middle.offered_share:.2f}){mark}",
        f"{middle.offered_per_s:,.0f}",
        f"{middle.achieved_per_s:,.0f}",
        f"{middle.generator_cpu_share:.0%} / {_share(middle.generator_idle_share)}",
        f"{middle.goodput_share:.3f}",
        f"{min(goodputs):.3f} to {max(goodputs):.3f}",
        f"{middle.cpu_goodput_share:.3f}",
        f"{middle.refused_share:.0%}",
        f"{max(0.0, 1 - middle.goodput_share / middle.offered_share - middle.refused_share):.0%}",
        _figure(middle.served_p99_ms, 0),
        f"{_figure(middle.refused_p50_ms, 2)} / {_figure(middle.refused_p99_ms, 1)}",
        _figure(middle.refused_from_send_p99_ms, 1),
        _figure(middle.recovered_s, 1) if share > 1 else "-",
        f"{middle.growth_mib:+.1f}",
    ]


def _share(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.0%}"


def _figure(value: float, digits: int) -> str:
    if math.isnan(value):
        return "-"
    return "never" if math.isinf(value) else f"{value:,.{digits}f}"
