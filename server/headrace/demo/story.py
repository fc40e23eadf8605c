"""What the demo shows, in order: valuations, load, decay, alarm, a new version, recovery."""

import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import grpc
import numpy as np
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from rich.table import Table

from headrace.demo import stack
from headrace.demo.replay import WINDOW_ROWS, Finding, Replay
from headrace.demo.sales import Sale, by_half_year, read_sales, request
from headrace.demo.stack import MODEL, Addresses, say
from headrace.demo.traffic import CALL_TIMEOUT_S, IN_FLIGHT, Predict, Trickle, burst
from headrace.errors import StartupError
from headrace.v1 import monitor_service_pb2_grpc, prediction_service_pb2_grpc

HOMES_SHOWN = 8
WINDOW_S = 1.5
REPORT_FILENAME = "demo-report.html"

RETRAIN_CUTOFF = "2016-01-01"
SWAP_TIMEOUT_S = 60.0

_ANY_PORT = ("--grpc-address", "127.0.0.1:0", "--http-address", "127.0.0.1:0")


def demo(root: Path) -> int:
    """
    Show real homes valued through the whole system, and stop.

    Args:
        root: A checkout. Gets the monitor's report as `demo-report.html`; its models stay as they
            are, for the demo serves a copy.

    Returns:
        The exit code.

    Raises:
        StartupError: `root` is no checkout, or a step failed.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stop everything then, too
    started_s = time.perf_counter()
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 100)
    with ExitStack() as exits:
        environment = exits.enter_context(stack.online_store(root, console))
        scratch = Path(exits.enter_context(tempfile.TemporaryDirectory(prefix="headrace-demo-")))
        models = _copy_models(root, scratch / "models")
        windows = ("--window-s", str(WINDOW_S), "--window-rows", str(WINDOW_ROWS))
        command = stack.monitor(models, *_ANY_PORT, *windows, "--state-dir", str(scratch / "state"))
        monitor = exits.enter_context(stack.running("monitor", command, environment))
        command = stack.serve(root, models, *_ANY_PORT, "--monitor-address", monitor.grpc)
        gateway = exits.enter_context(stack.running("gateway", command, environment))
        say(console, "monitor", f"http://{monitor.http}/")
        say(console, "gateway", f"serving on {gateway.grpc}")
        predict, replay = _clients(exits, gateway, monitor)
        _tell(console, root, models, environment, gateway, predict, replay)
    console.print(f"\ndone in {time.perf_counter() - started_s:.0f} s; everything is stopped")
    return 0


def up(root: Path) -> int:
    """
    Serve the same stack until Ctrl-C.

    Args:
        root: A checkout.

    Returns:
        The exit code of the gateway.

    Raises:
        StartupError: `root` is no checkout, or a step failed.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stop everything then, too
    console = Console(highlight=False)
    models = root / "model_repository"
    with stack.online_store(root, console) as environment:
        command = stack.monitor(models, "--state-dir", str(root / ".monitor"))
        with stack.running("monitor", command, environment) as monitor:
            say(console, "monitor", f"http://{monitor.http}/, outcomes to {monitor.grpc}")
            command = stack.serve(root, models, "--monitor-address", monitor.grpc)
            # In a session of its own, so that one Ctrl-C is not two signals to it.
            process = subprocess.Popen(command, env=environment, start_new_session=True)
            try:
                return process.wait()
            except KeyboardInterrupt:
                console.print("\nstopping …")
            finally:
                stack.end(process)
            return process.returncode


def _copy_models(root: Path, models: Path) -> Path:
    """Copy the models: the demo drops a version, and leaves the checkout as it was."""
    (models / MODEL).mkdir(parents=True)
    source = root / "model_repository" / MODEL
    shutil.copy(source / "config.pbtxt", models / MODEL)
    shutil.copytree(source / "1", models / MODEL / "1")
    return models


def _clients(exits: ExitStack, gateway: Addresses, monitor: Addresses) -> tuple[Predict, Replay]:
    # A proxy from the environment has no business on this machine.
    options = [("grpc.enable_http_proxy", 0)]
    to_gateway = exits.enter_context(grpc.insecure_channel(gateway.grpc, options=options))
    to_monitor = exits.enter_context(grpc.insecure_channel(monitor.grpc, options=options))
    predict = prediction_service_pb2_grpc.PredictionServiceStub(to_gateway).Predict
    stub = monitor_service_pb2_grpc.MonitorServiceStub(to_monitor)
    return predict, Replay(predict, stub, monitor.http)


def _tell(
    console: Console,
    root: Path,
    models: Path,
    environment: Mapping[str, str],
    gateway: Addresses,
    predict: Predict,
    replay: Replay,
) -> None:
    data = root / "features" / "data"
    sales = read_sales(data / "evaluation.csv")
    console.print()
    _show_valuations(console, predict, sales)
    latencies_s, took_s = burst(predict, sales)
    _show_load(console, latencies_s, took_s, gateway.http)

    years = by_half_year(read_sales(data / "replay.csv"))
    table = _findings_table("The years go by; each half's homes are valued, then sold")
    before, after = _split(years)
    with console.status("replaying sales …"):
        for name, of in before.items():
            _add_finding(table, name, 1, replay.run(of))
    console.print()
    console.print(table)

    console.print()
    _swap(console, root, models, environment, predict, sales)
    table = _findings_table("The next year, with the new version")
    with console.status("replaying sales …"):
        for name, of in after.items():
            _add_finding(table, name, 2, replay.run(of))
    console.print()
    console.print(table)
    report = root / REPORT_FILENAME
    report.write_bytes(replay.page("/"))
    console.print()
    say(console, "report", f"{report.name}, the monitor's page as it was at the end")


def _split(
    years: Mapping[str, list[Sale]],
) -> tuple[dict[str, list[Sale]], dict[str, list[Sale]]]:
    """Divide half-years into those before the retraining and those after it."""
    first = f"{RETRAIN_CUTOFF[:4]} H1"
    before = {name: of for name, of in years.items() if name < first}
    return before, {name: of for name, of in years.items() if name >= first}


def _swap(
    console: Console,
    root: Path,
    models: Path,
    environment: Mapping[str, str],
    predict: Predict,
    sales: Sequence[Sale],
) -> None:
    """Bring features up to date, train, and drop the new version while somebody keeps asking."""
    with Trickle(predict, sales) as trickle:
        until = stack.materialize(root, "--until", RETRAIN_CUTOFF)
        what = f"Feast materializes what was known on {RETRAIN_CUTOFF}"
        stack.step(console, "new features", what, until, environment)
        train = [
            *(sys.executable, str(root / "model_repository" / MODEL / "train.py")),
            *("--cutoff", RETRAIN_CUTOFF, "--version", "2", "--model-repository", str(models)),
        ]
        what = "trained on all sales until then and dropped into the repository"
        stack.step(console, "new version", what, train, environment)
        deadline_s = time.monotonic() + SWAP_TIMEOUT_S
        while trickle.answers[2] < 100:
            if time.monotonic() > deadline_s:
                raise StartupError("version 2 does not serve; the gateway's lines above say why")
            time.sleep(0.05)
    say(
        console,
        "meanwhile",
        f"{trickle.answers[1]:,} requests answered by version 1, {trickle.answers[2]:,} by "
        f"version 2, {len(trickle.failures)} failed",
    )
    if trickle.failures:
        raise StartupError(f"a request failed during the swap: {trickle.failures[0]}")


def _findings_table(title: str) -> Table:
    table = Table(title=title)
    table.add_column("sold in")
    for heading in ("version", "sales", "median error", "bias", "drift of valuations"):
        table.add_column(heading, justify="right")
    table.add_column("alarms")
    return table


def _add_finding(table: Table, name: str, version: int, finding: Finding) -> None:
    drift = finding.prediction_drift
    table.add_row(
        name,
        str(version),
        f"{finding.sales:,}",
        f"{finding.error:.1%}",
        f"{finding.bias:+.1%}",
        "" if drift is None else f"{drift:.3f}",
        ", ".join(finding.alarms).replace("_", " "),
    )


def _show_valuations(console: Console, predict: Predict, sales: Sequence[Sale]) -> None:
    every = max(1, len(sales) // HOMES_SHOWN)
    shown = sales[::every][:HOMES_SHOWN]
    reply = predict(request(shown, include_features=True), timeout=CALL_TIMEOUT_S)
    features = {feature.name: feature.values.floats.values for feature in reply.features}
    table = Table(title=f"{MODEL} version {reply.model_version}, prediction {reply.prediction_id}")
    for heading in ("home_id", "area_id", "sold on"):
        table.add_column(heading)
    for heading in ("sq ft", "grade", "valuation", "sale price", "off by"):
        table.add_column(heading, justify="right")
    values = reply.outputs[0].values.floats.values
    for i, (sale, value) in enumerate(zip(shown, values, strict=True)):
        table.add_row(
            f"{sale.home_id:010}",
            str(sale.area_id),
            sale.sale_date,
            f"{features['living_area_sqft'][i]:,.0f}",
            f"{features['grade'][i]:.0f}",
            f"${value:,.0f}",
            f"${sale.price_usd:,.0f}",
            f"{value / sale.price_usd - 1:+.0%}",
        )
    console.print(table)


def _show_load(
    console: Console, latencies_s: Sequence[float], took_s: float, http_address: str
) -> None:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"http://{http_address}/metrics", timeout=CALL_TIMEOUT_S) as page:
        text = page.read().decode()
    samples = [s for f in text_string_to_metric_families(text) for s in f.samples]
    totals = {s.name: s.value for s in samples if s.name.startswith("headrace_batch")}
    p50_s, p99_s = np.percentile(latencies_s, [50, 99])
    batches = totals["headrace_batch_rows_count"]
    rows = totals["headrace_batch_rows_sum"]
    statuses = {
        s.labels["status"]: int(s.value)
        for s in samples
        if s.name == "headrace_feature_values_total" and s.value
    }
    console.print()
    say(
        console,
        "requests",
        f"{len(latencies_s):,} single homes, {IN_FLIGHT} in flight, "
        f"{len(latencies_s) / took_s:,.0f}/s from one Python client",
    )
    latency = f"p50 {p50_s * 1e3:.1f} ms, p99 {p99_s * 1e3:.1f} ms, seen by that client"
    say(console, "latency", latency)
    say(console, "batches", f"{batches:,.0f}, {rows / batches:.1f} rows on average")
    values = ", ".join(f"{count:,} {name}" for name, count in statuses.items())
    say(console, "feature values", values)
