"""Run Locust's scenarios against `headrace up`, and fail when a target of `slo.yaml` is missed.

    python loadtest/run.py [--scenario NAME] [--json] [--no-page] [--inject-delay-ms 50]
    python loadtest/run.py --ui

Writes a page, loadtest/results/<date>-loadtest.md, unless options make it another test; and
Locust's own reports beside it (not kept in git). The server works on a copy of features and
models, on free ports. Exit codes: 0 every target met, 1 one was missed, 2 it could not be run.
`--inject-delay-ms` puts a slow stage in between: the check of the check. `--ui` opens Locust's
page instead, and goes on until Ctrl-C.
"""

import argparse
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import slo
import stages
from delay import DelayingProxy
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "loadtest" / "results"
START_TIMEOUT_S = 120
REQUESTS_PER_USER_S = 10  # locustfile.REQUESTS_PER_S; importing it would start gevent here
MODEL = "home_valuation"
UI_PORT = 8089


@dataclass(frozen=True, slots=True)
class Outcome:
    """
    What one scenario came to.

    Args:
        name: Its name.
        scenario: Its targets.
        found: By kind of request.
        achieved_per_s: Requests a second.
        offered_per_s: As many as the users would have sent to a server that answers at once.
        versions: Requests answered, by model version.
        dropped: Versions that were dropped into the repository while it ran.
        missed: Targets that were missed.
    """

    name: str
    scenario: slo.Scenario
    found: list[slo.Requests]
    achieved_per_s: float
    offered_per_s: float
    versions: dict[int, int]
    dropped: int
    missed: list[str]


class CannotRun(Exception):
    """The test could not be run; the message says why."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Return 0 when every target is met, 1 when one is missed, 2 when it could not be run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--scenario", action="append", metavar="NAME", help="only this one")
    parser.add_argument("--seconds", type=float, help="instead of each scenario's own")
    parser.add_argument("--inject-delay-ms", type=float, default=0.0, metavar="MS")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.add_argument("--no-page", action="store_true", help="write no results page")
    parser.add_argument("--ui", action="store_true", help="open Locust's page")
    options = parser.parse_args(arguments)
    console = Console(stderr=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stop the server then, too
    try:
        return _ui(console) if options.ui else _run(options, console)
    # All that is no verdict: 1 would say that the server missed a target.
    except (CannotRun, ValueError, OSError, subprocess.SubprocessError) as error:
        print(f"loadtest: {error}", file=sys.stderr)
        return 2


def _run(options: argparse.Namespace, console: Console) -> int:
    scenarios = slo.read_targets().scenarios
    wanted = options.scenario or list(scenarios)
    if unknown := set(wanted) - set(scenarios):
        raise CannotRun(f"no scenario {sorted(unknown)}; slo.yaml has {sorted(scenarios)}")
    if options.seconds is not None and not 1 <= options.seconds <= 3_600:
        raise CannotRun(f"--seconds {options.seconds:g}: expected 1 to 3600")
    if not 0 <= options.inject_delay_ms <= 10_000:
        raise CannotRun(f"--inject-delay-ms {options.inject_delay_ms:g}: expected 0 to 10000")
    outcomes = []
    for name in wanted:
        scenario = scenarios[name]
        if options.seconds is not None:
            scenario = scenario.model_copy(update={"seconds": options.seconds})
        with ExitStack() as exits:
            root = _copy(exits)
            console.print(f"{name}: starting the server …")
            address = exits.enter_context(_server(root))
            if options.inject_delay_ms:
                proxy = DelayingProxy(address, options.inject_delay_ms / 1e3)
                address = exits.enter_context(proxy).address
            what = f"{scenario.users} users for {scenario.seconds:g} s"
            with console.status(f"{name}: {what} …"):
                outcomes.append(_locust(name, scenario, root, address))
    if options.json:
        print(json.dumps([_as_json(outcome) for outcome in outcomes]))
    else:
        Console().print(_table(outcomes))
    # What is kept is the whole test: no part of it, no other length, no stage that was put in.
    is_whole = not (options.scenario or options.seconds or options.inject_delay_ms)
    if is_whole and not options.no_page:
        page = RESULTS / f"{datetime.now(UTC):%Y-%m-%d}-loadtest.md"
        page.write_text(_page(outcomes))
        console.print(f"written: {page.relative_to(ROOT)}")
    for outcome in outcomes:
        for fault in outcome.missed:
            print(f"missed: {outcome.name}: {fault}", file=sys.stderr)
    return 1 if any(outcome.missed for outcome in outcomes) else 0


def _ui(console: Console) -> int:
    with ExitStack() as exits:
        console.print("starting the server …")
        root = _copy(exits)
        address = exits.enter_context(_server(root))
        console.print(f"Locust's page: http://127.0.0.1:{UI_PORT}/  (Ctrl-C ends it)")
        command = [*_locust_command(address), "--web-host", "127.0.0.1"]
        command += ["--web-port", str(UI_PORT)]
        try:
            return subprocess.run(command, env=_environment(root), check=False).returncode
        except KeyboardInterrupt:
            return 0


def _copy(exits: ExitStack) -> Path:
    """Copy what the server reads: versions are dropped, and the checkout stays as it is."""
    root = Path(exits.enter_context(tempfile.TemporaryDirectory(prefix="headrace-loadtest-")))
    for name in ("features", "model_repository"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    for folder in (root / "model_repository" / MODEL).glob("[0-9]*"):
        if folder.name != "1":
            shutil.rmtree(folder)
    return root


@contextmanager
def _server(root: Path) -> Iterator[str]:
    """Run `headrace up` on free ports; yield the gateway's address."""
    free = {
        f"HEADRACE_{part}{port}_ADDRESS": "127.0.0.1:0"
        for part in ("", "MONITOR_")
        for port in ("GRPC", "HTTP")
    }
    up = subprocess.Popen(
        [sys.executable, "-m", "headrace", "up", "--root", str(root)],
        env={**os.environ, **free},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield _serving(up)
    finally:
        up.terminate()
        try:
            up.wait(START_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            up.kill()
            up.wait()
        assert up.stdout is not None
        up.stdout.close()


def _serving(up: "subprocess.Popen[str]") -> str:
    alarm = threading.Timer(START_TIMEOUT_S, up.kill)
    alarm.start()
    assert up.stdout is not None
    said = ""
    try:
        for line in up.stdout:
            if line.startswith('{"event": "serving"'):
                return str(json.loads(line)["grpc_address"])
            said = line
    finally:
        alarm.cancel()
    raise CannotRun(f"`headrace up` did not start; it said last: {said.strip()}")


def _locust_command(address: str) -> list[str]:
    locustfile = str(ROOT / "loadtest" / "locustfile.py")
    return [sys.executable, "-m", "locust", "-f", locustfile, "--host", f"grpc://{address}"]


def _environment(root: Path) -> dict[str, str]:
    """Return Locust's: it asks about the homes that this server has."""
    return {**os.environ, "HEADRACE_SALES_FILE": str(root / "features/data/evaluation.csv")}


def _locust(name: str, scenario: slo.Scenario, root: Path, address: str) -> Outcome:
    planned = stages.plan(scenario.shape, scenario.users, scenario.seconds)
    versions_file = root / "versions.json"
    command = [
        *_locust_command(address),
        *("--headless", "--json", "--skip-log", "--html", str(RESULTS / f"locust-{name}.html")),
    ]
    environment = {
        **_environment(root),
        stages.SHAPE: scenario.shape,
        stages.USERS: str(scenario.users),
        stages.SECONDS: str(scenario.seconds),
        "HEADRACE_VERSIONS_FILE": str(versions_file),
    }
    with ExitStack() as exits:
        dropped = [1]
        if scenario.reload_every_s:
            dropped = exits.enter_context(_dropping(root, scenario.reload_every_s))
        done = subprocess.run(
            command,
            env=environment,
            capture_output=True,
            text=True,
            timeout=scenario.seconds + 60,
            check=False,
        )
    if not done.stdout.strip():
        raise CannotRun(f"Locust failed: {done.stderr.strip()[-500:]}")
    if not versions_file.is_file():
        raise CannotRun(f"Locust did not end as it should: {done.stderr.strip()[-500:]}")
    found = slo.read_statistics(json.loads(done.stdout))
    offered_per_s = REQUESTS_PER_USER_S * stages.user_seconds(planned) / scenario.seconds
    achieved_per_s = sum(requests.count for requests in found) / scenario.seconds
    versions = {int(number): n for number, n in json.loads(versions_file.read_text()).items()}
    missed = slo.missed(scenario, found, achieved_per_s=achieved_per_s, offered_per_s=offered_per_s)
    if strange := set(versions) - set(dropped):
        missed.append(f"versions {sorted(strange)} answered, which never existed")
    # The last one or two may still be on their way in at the end.
    if scenario.reload_every_s and len(versions) < max(2, len(dropped) - 2):
        missed.append(f"{len(versions)} versions answered of {len(dropped)} that were there")
    return Outcome(
        *(name, scenario, found, achieved_per_s, offered_per_s, versions), len(dropped) - 1, missed
    )


@contextmanager
def _dropping(root: Path, every_s: float) -> Iterator[list[int]]:
    """Drop a new version again and again; yield the list of all there were."""
    models = root / "model_repository" / MODEL
    numbers, stopping = [1], threading.Event()

    failures: list[OSError] = []

    def drop() -> None:
        try:
            while not stopping.wait(every_s):
                number = numbers[-1] + 1
                new = models / f".new-{number}"  # a server ignores names that are no numbers
                shutil.copytree(models / "1", new)
                numbers.append(number)
                new.rename(models / str(number))
                if number > 3:  # the one before is still on its way out
                    shutil.rmtree(models / str(number - 2))
        except OSError as error:
            failures.append(error)

    thread = threading.Thread(target=drop, name="dropping")
    thread.start()
    try:
        yield numbers
    finally:
        stopping.set()
        thread.join(30)
    if failures:
        raise CannotRun(f"versions could not be dropped: {failures[0]}")


def _as_json(outcome: Outcome) -> dict[str, object]:
    return {
        "scenario": outcome.name,
        "requests": {
            of.name: {
                "count": of.count,
                "failures": of.failures,
                **{f"{p}_ms": of.percentile_ms(p) for p in ("p50", "p95", "p99")},
            }
            for of in outcome.found
        },
        "achieved_per_s": outcome.achieved_per_s,
        "offered_per_s": outcome.offered_per_s,
        "versions": outcome.versions,
        "missed": outcome.missed,
    }


HEADINGS = ("scenario", "requests", "count", "failed", "p50 ms", "p95 ms", "p99 ms", "met")


def _rows(outcomes: Sequence[Outcome]) -> Iterator[tuple[str, ...]]:
    for outcome in outcomes:
        for of in outcome.found:
            limits = outcome.scenario.latency_ms.get(of.name, {})
            shown = []
            for percentile in ("p50", "p95", "p99"):
                limit = limits.get(percentile)  # type: ignore[call-overload]
                ms = f"{of.percentile_ms(percentile):g}"
                shown.append(ms if limit is None else f"{ms} (≤ {limit:g})")
            is_met = not any(fault.startswith(f"{of.name}:") for fault in outcome.missed)
            met = "yes" if is_met else "NO"
            yield (outcome.name, of.name, f"{of.count:,}", str(of.failures), *shown, met)


def _table(outcomes: Sequence[Outcome]) -> Table:
    rates = "; ".join(
        f"{o.name}: {o.achieved_per_s:.0f} of {o.offered_per_s:.0f} offered requests/s, "
        f"{len(o.versions)} of {o.dropped + 1} versions answered"
        for o in outcomes
    )
    table = Table(caption=rates)
    for heading in HEADINGS:
        table.add_column(heading, justify="left" if heading in HEADINGS[:2] else "right")
    for row in _rows(outcomes):
        table.add_row(*row)
    return table


def _page(outcomes: Sequence[Outcome]) -> str:
    rows = "\n".join(f"| {' | '.join(row)} |" for row in _rows(outcomes))
    rates = "\n".join(
        f"| {o.name} | {o.scenario.shape}, {o.scenario.users} users, {o.scenario.seconds:g} s "
        f"| {o.achieved_per_s:.0f} of {o.offered_per_s:.0f} | {o.dropped} | {len(o.versions)} "
        f"| {'; '.join(o.missed) or 'all met'} |"
        for o in outcomes
    )
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    return f"""# Load test

| {" | ".join(HEADINGS)} |
|---|---|---:|---:|---:|---:|---:|---|
{rows}

| scenario | offered | requests/s | versions dropped | versions that answered | verdict |
|---|---|---|---|---|---|
{rates}

| | |
|---|---|
| when | {datetime.now(UTC):%Y-%m-%d %H:%M} UTC |
| commit | `{commit}` |
| command | `python loadtest/run.py` |
| machine | {platform.machine()}, {os.cpu_count()} cores, {platform.system()} |
| Python | {platform.python_version()} |
| packages | Locust {version("locust")}, grpcio {version("grpcio")} |

## Why to doubt it

- Server, store, monitor and Locust share the machine; Locust is Python and takes most of a core.
- Each user waits for a reply before the next request. A server that stalls is asked less meanwhile,
  so a stall counts once per user, not once per request that would have come: look at the requests
  achieved of those offered.
- Locust rounds times to two figures.
- This proves that targets are met at this rate; how much the server can do is `make bench`'s
  question.
"""


if __name__ == "__main__":
    sys.exit(main())
