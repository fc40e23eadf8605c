"""The page about overload. Pure: what was measured comes in, Markdown goes out."""

import math
from collections.abc import Sequence
from statistics import median
from typing import NamedTuple

import goodput
from goodput import Sweep

FLOODED = 1.0


class Circumstances(NamedTuple):
    """Where, when and how it was measured."""

    when: str
    commit: str
    command: str
    machine: str
    packages: str
    rounds: int
    seconds: float
    row_ms: float
    curve: str | None


def page(sweeps: Sequence[Sweep], found: Sequence[str], about: Circumstances) -> str:
    """
    Return the page.

    Args:
        sweeps: The slow model's first.
        found: Targets missed, and faults.
        about: The rest.
    """
    curve = f"![goodput over offered load]({about.curve})\n\n" if about.curve else ""
    least, growth = f"{goodput.GOODPUT_SHARE_MIN:.0%}", f"{goodput.GROWTH_MIB_MAX:g} MiB"
    verdict = "\n".join(f"- {text}" for text in found) or "- every target is met"
    return f"""# Overload

What is still served, right and in time, when more is asked than can be: open loop, requests due at
random (Poisson), latencies from when they were due, every reply compared with its own answer.

{curve}{verdict}

{"".join(_model(sweep, about) for sweep in sweeps)}| | |
|---|---|
| when | {about.when} |
| commit | {about.commit} |
| command | `{about.command}` |
| machine | {about.machine} |
| packages | {about.packages} |

## How to read it

- A share is of the peak: what the same gateway served in a closed loop in the same round. Figures
  are medians of {about.rounds} interleaved rounds of {about.seconds:g} s; recovery and memory the
  worst of them. *Per CPU second* divides by the processor time that the gateway used.
- *Refused* is RESOURCE_EXHAUSTED or UNAVAILABLE, timed from when the request was due; *from send*
  leaves out what the generator and the server's limits added before it left.
- *Recovery*: after the flood half the peak is asked; from when on 99 % of that was served.
- *Memory*: most of it in a run's second half less most of it in the first.
- Targets, at 1.5, 2 and 5 times the peak of the slow model: goodput at least {least},
  refused within {goodput.REFUSED_P99_MS_MAX:g} ms (p99), memory within {growth}; for all models,
  recovery within {goodput.RECOVERY_S_MAX:g} s.

## Why to doubt it

- One machine with two cores: the gateway has one for itself, the generator the other. Loopback, no
  TLS, a few connections.
- A refusal costs the server 0.02 to 0.2 ms, depending on the machine, and comes out of the same
  core: of a model whose row costs little more, nobody can serve 90 % at five times its peak. The
  tiny model is here to see that it refuses, and is well again afterwards.
- Rows marked * were measured by a generator that was late itself, or had no core left.
"""


def _model(sweep: Sweep, about: Circumstances) -> str:
    peaks = [peak.per_s for peak in sweep.peaks]
    cost = f", {about.row_ms:.1f} ms of processor a row" if sweep.model == "slow" else ""
    rows = "".join(_row(sweep, share) for share in sorted(sweep.points))
    return f"""## The {sweep.model} model

Peak {median(peaks):,.0f}/s ({min(peaks):,.0f} to {max(peaks):,.0f}){cost}; each call has \
{1e3 * sweep.deadline_s:g} ms.

| offered, of peak | goodput, of peak | in rounds | per CPU second | refused | served p99 ms \
| refused p50 / p99 ms | from send p99 ms | recovery s | memory MiB |
|---|---|---|---|---|---|---|---|---|---|
{rows}
"""


def _row(sweep: Sweep, share: float) -> str:
    middle = sweep.middle(share)
    goodputs = [point.goodput_share for point in sweep.points[share]]
    mark = " *" if middle.is_generator_bottleneck else ""
    recovery = _figure(middle.recovered_s, 1) if share > FLOODED else "-"
    cells = [
        f"{share:g} ({middle.offered_share:.2f}){mark}",
        f"{middle.goodput_share:.3f}",
        f"{min(goodputs):.3f} to {max(goodputs):.3f}",
        f"{middle.cpu_goodput_share:.3f}",
        f"{middle.refused_share:.0%}",
        _figure(middle.served_p99_ms, 0),
        f"{_figure(middle.refused_p50_ms, 2)} / {_figure(middle.refused_p99_ms, 1)}",
        _figure(middle.refused_from_send_p99_ms, 1),
        recovery,
        f"{middle.growth_mib:+.1f}",
    ]
    return f"| {' | '.join(cells)} |\n"


def _figure(value: float, digits: int) -> str:
    if math.isnan(value):
        return "-"
    return "never" if math.isinf(value) else f"{value:,.{digits}f}"
