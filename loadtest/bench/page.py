"""The results page: a row for each question, what it was measured on, every round, the doubts."""

import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from importlib.metadata import distributions
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from contest import FIGURES, IDLE_SHARE_MIN, Contest, Interval

ROOT = Path(__file__).parents[2]
PACKAGES = ("grpcio", "protobuf", "onnxruntime", "feast", "redis", "hiredis", "numpy", "uvloop")
PEER_PACKAGES = {".venv-peers": "mlserver", ".venv-triton": "nvidia-pytriton"}
HEADINGS = (
    "what",
    "figure",
    "measured",
    "compared with",
    "ratio",
    "target",
    "verdict",
    "by the other clock",
)

DOUBTS = """\
- One machine with two cores: the server has one for itself, the generator the other. The monitor,
  the collector and, where there are features, the embedded Valkey share the generator's core, for
  both servers of a question alike; the monitor keeps one prediction in a hundred. The floor of
  ranking needs no generator, so that Valkey has that core for itself then.
- On a shared machine single rounds differ by a third and more by the wall clock. Processor time
  is steadier and not free of it: caches and the clock's rate are shared too. Compare within one
  run only.
- An interval holds the median with the probability beside it, if rounds are drawn alike. "barely"
  says that the target lies inside it.
- In questions of a percent or three ("requests per processor second") both servers are started
  anew for each round, in turn, and measured in eight short windows. The processor time is the
  server's own: the monitor's and the collector's are not in it. What the gateway beside itself
  shows is what such a question cannot tell. A design that speaks of a loss of requests/s means the
  wall clock; that stands beside, but a round by it is off by five percent and more on a machine
  like this, so the verdict is that of processor time.
- Processor time is that of a server's windows and of the second after them, so that spans and
  records that are sent after the replies are in it, and in no window of the other one. So is what
  it takes to do nothing in that second: four thousandths of a core of a gateway, more of two
  workers. Requests in flight when a window ends do not count as answered.
- The generator's own time for each request is in both figures of a question, and draws their ratio
  towards 1; most so with one in flight, where the rows' notes say how much of the mean it is.
- The gateways log errors only: by default they would write up to ten lines a second of sampled and
  refused calls for each status.
- Loopback: no network, no TLS. Closed loop: a slow server is asked less often, so no tail is
  shown.
- The model is tiny on purpose. With a model of a millisecond all would be nearly equal.
- The ceiling and the floor check nothing and are no servers that anybody should run.
- The glue and the servicer run one row per request, as such programs do; ones that batch would be
  faster. MLServer batches in its own process; Triton runs the model in its Python backend, which
  is not its fastest: its C++ backend for ONNX Runtime comes in no wheel.
- Two workers share one core here: it says what a second one costs, not what it brings.
- The requests of one client look alike but for their numbers: the gateway recognises them without
  a parser, the others parse each. Those whose parameter is another each time are parsed by all."""


class Section(NamedTuple):
    """
    What another question has for the page.

    Args:
        rows: Of the table at its head, a cell for each of `HEADINGS`.
        notes: Lines under it.
        text: Of its own, in Markdown, below all else; its headings have two signs or more.
    """

    rows: Sequence[Sequence[str]]
    notes: Sequence[str]
    text: str


def write(
    contests: Sequence[Contest],
    command: str,
    rounds: int,
    seconds: float,
    overload: Section | None = None,
) -> str:
    """
    Return the page, in Markdown.

    Args:
        contests: In its order.
        command: What was run.
        rounds: Of each question.
        seconds: For each server in a round.
        overload: What became of more than can be answered, if that was asked.
    """
    rows = [*map(cells, contests), *(overload.rows if overload else ())]
    notes = [line for contest in contests for line in _notes(contest)]
    notes += overload.notes if overload else ()
    return f"""# The gateway beside its ceiling, its floor and its peers

{table(rows)}

{_how(rounds, seconds) if contests else ""}Every reply was compared with its own right answer.

{bullets(notes)}{circumstances(command)}
{overload.text + chr(10) if overload else ""}{_every_round(contests)}## Why to doubt it

{DOUBTS}
"""


def _how(rounds: int, seconds: float) -> str:
    return f"""\
Medians of {rounds} interleaved rounds of {seconds:g} s for each server; where percents are to be
told, of as many rounds between fresh processes, or twice as many, of four times {seconds:g} s for
each. All of them are below. A ratio is the median of the rounds' ratios, with the interval that
holds it, and the verdict is the ratio's. By the other clock: where rates are compared, the
processor time of a request, of the first over the second (below 1 the first one needs less); where
processor time is, the requests/s of the first over those of the second. """


def _every_round(contests: Sequence[Contest]) -> str:
    if not contests:
        return ""
    series = "".join(f"| {' | '.join(line)} |\n" for one in contests for line in _series(one))
    return f"""## Every round

| what | who | rounds |
|---|---|---|
{series}
"""


def cells(contest: Contest) -> list[str]:
    """Return a question's row, a cell for each of `HEADINGS`."""
    question = contest.question
    unit, form = FIGURES[question.figure]
    target = "-" if question.target is None else str(question.target)
    names = [question.first.server, question.second.server]
    if not contest.is_measured:
        return [question.title, unit, *names, "-", target, contest.verdict, "-"]
    measured = [
        f"{name}: {value:{form}}"
        for name, value in zip(names, contest.medians(question.figure), strict=True)
    ]
    cpu = " : ".join(f"{value:,.1f}" for value in contest.medians("cpu_us"))
    by_cpu = f"{cpu} µs, {_with_interval(contest.cpu_ratio, contest.cpu_interval)}"
    by_wall = f"requests/s, {_with_interval(contest.rate_ratio, contest.rate_interval)}"
    return [
        *(question.title, unit, *measured),
        _with_interval(contest.ratio, contest.interval),
        *(target, contest.verdict),
        by_wall if question.figure == "requests_per_cpu_s" else by_cpu,
    ]


def table(rows: Sequence[Sequence[str]]) -> str:
    """Return the table at a page's head."""
    lines = [HEADINGS, ["---"] * len(HEADINGS), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def bullets(lines: Sequence[str]) -> str:
    """Return a list and an empty line; nothing for no lines."""
    return "".join(f"- {line}.\n" for line in lines) + ("\n" if lines else "")


def circumstances(command: str) -> str:
    """Return a table of when, where and how it was measured."""
    return f"""| | |
|---|---|
| when | {datetime.now(UTC):%Y-%m-%d %H:%M} UTC |
| commit | {commit()} |
| command | `{command}` |
| machine | {machine()} |
| Python | {platform.python_version()} |
| packages | {", ".join(_packages())} |
"""


def line(contest: Contest) -> str:
    """Return a question's outcome for a terminal."""
    question = contest.question
    unit, form = FIGURES[question.figure]
    if not contest.is_measured:
        return f"{question.name:<14} {contest.verdict}: {contest.failure or contest.skipped}"
    first, second = (format(value, form) for value in contest.medians(question.figure))
    target = "" if question.target is None else f"  {question.target}"
    return (
        f"{question.name:<14} {question.first.server} {first} : {second} {question.second.server}, "
        f"{unit}  {_with_interval(contest.ratio, contest.interval)}{target}  {contest.verdict}"
    )


def as_json(contest: Contest) -> dict[str, Any]:
    """Return all that is known of a question."""
    question = contest.question
    found: dict[str, Any] = {
        "name": question.name,
        "title": question.title,
        "servers": [question.first.server, question.second.server],
        "figure": question.figure,
        "target": None if question.target is None else str(question.target),
        "verdict": contest.verdict,
        "reason": contest.failure or contest.skipped,
        "notes": contest.notes,
        "rounds": [list(sides) for sides in contest.rounds],
    }
    if contest.is_measured:
        found["ratio"] = contest.ratio
        found["interval"] = contest.interval._asdict()
        found["cpu_ratio"] = contest.cpu_ratio
        found["rate_ratio"] = contest.rate_ratio
        found["generator_idle_shares"] = contest.idle_shares
    return found


def commit() -> str:
    """Return the commit that is checked out, and whether the server differs from it."""

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
        )
        return done.stdout.strip()

    dirty = " with uncommitted changes" if git("status", "--porcelain", "server") else ""
    return f"`{git('rev-parse', '--short', 'HEAD')}`{dirty}"


def machine() -> str:
    """Return what processor this is, how many cores, which system."""
    info = Path("/proc/cpuinfo").read_text()
    names = [line.partition(":")[2].strip() for line in info.splitlines() if "model name" in line]
    return (
        f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores, {platform.system()}"
    )


def _packages() -> Iterator[str]:
    """Return what is installed here, and of whom we have beside us."""
    folders = dict.fromkeys(PACKAGES, sys.path)
    for environment, name in PEER_PACKAGES.items():
        folders[name] = [
            str(path) for path in (ROOT / environment).glob("lib/python*/site-packages")
        ]
    for name, path in folders.items():
        for found in islice(distributions(name=name, path=path), 1):
            yield f"{name} {found.version}"


def _with_interval(ratio: float, interval: Interval) -> str:
    digits = 3 if ratio < 2 else 1
    ends = " to ".join(f"{end:.{digits}f}" for end in interval[:2])
    return f"{ratio:.{digits}f} ({ends}, {interval.coverage:.0%})"


def _notes(contest: Contest) -> Iterator[str]:
    """Yield what is to be known of a row, and of the generator beside it."""
    question = contest.question
    kept = "; ".join(filter(None, [contest.failure or contest.skipped or "", *contest.notes]))
    if kept:
        yield f"{question.title}: {kept}"
    if not contest.is_measured:
        return
    names = (question.first.server, question.second.server)
    full = [
        f"the {name} ({idle:.1%} idle)"
        for name, idle in zip(names, contest.idle_shares, strict=True)
        if idle is not None and idle < IDLE_SHARE_MIN
    ]
    if full:
        yield (
            f"{question.title}: the generator's core was full beside {' and '.join(full)}: the "
            "ratio by the wall clock is drawn towards 1"
        )
    if question.figure == "mean_ms" and None not in contest.generator_ms:
        own = " : ".join(f"{ms:.3f}" for ms in contest.generator_ms)
        yield f"{question.title}: of each mean {own} ms are the generator's own processor time"


def _series(contest: Contest) -> Iterator[list[str]]:
    if not contest.is_measured:
        return
    question = contest.question
    figures = dict.fromkeys([question.figure, "requests_per_s", "cpu_us"])
    for figure in figures:
        unit, form = FIGURES[figure]
        for which, name in enumerate((question.first.server, question.second.server)):
            values = ", ".join(format(sides[which][figure], form) for sides in contest.rounds)
            yield [question.title, f"{name}, {unit}", values]
    idle = [
        f"{name} {share:.0%}"
        for name, share in zip(
            (question.first.server, question.second.server), contest.idle_shares, strict=True
        )
        if share is not None
    ]
    if idle:
        yield [question.title, "the generator's core was idle, median", ", ".join(idle)]
    ratios = ", ".join(f"{ratio:.3f}" for ratio in contest.ratios)
    yield [question.title, "ratio, round by round", ratios]
