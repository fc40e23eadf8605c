"""Later years, replayed: homes are valued, then sold, and the monitor hears for how much."""

import json
import operator
import time
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from headrace.demo.sales import Sale, request
from headrace.demo.stack import MODEL
from headrace.demo.traffic import CALL_TIMEOUT_S, Predict
from headrace.errors import StartupError
from headrace.v1 import monitor_service_pb2 as pb
from headrace.v1 import monitor_service_pb2_grpc as pb_grpc

HOMES_PER_REQUEST = 250
"""At most, and at least half of it where there are more than that."""

WINDOW_ROWS = HOMES_PER_REQUEST // 2
"""
Fewest rows of the monitor's windows. Any request has them: however slow this machine, and wherever
it tears the sales apart, their last window ends.
"""

OUTCOMES_PER_REQUEST = 5_000
TIMEOUT_S = 30.0
POLL_PERIOD_S = 0.1


@dataclass(frozen=True, slots=True)
class Finding:
    """
    What the monitor says of some sales.

    Where they came to several windows, error and bias are those windows' means, by sales.

    Args:
        sales: How many it knows the price of.
        error: Median relative error.
        bias: Median of valuation / price − 1.
        prediction_drift: Of the valuations; None when it was not judged.
        alarms: Signals that are alarmed now.
    """

    sales: int
    error: float
    bias: float
    prediction_drift: float | None
    alarms: tuple[str, ...]


class Replay:
    """
    Values homes and reports what they were sold for.

    Args:
        predict: The gateway's method.
        monitor: The monitor's service.
        http_address: Of the monitor's report.
    """

    def __init__(
        self, predict: Predict, monitor: pb_grpc.MonitorServiceStub, http_address: str
    ) -> None:
        self._predict = predict
        self._monitor = monitor
        self._http_address = http_address

    def run(self, sales: Sequence[Sale]) -> Finding:
        """
        Replay some sales and wait for the monitor's finding.

        Raises:
            StartupError: the monitor does not come to one.
        """
        outcomes, version = [], 0
        before = self._rows()
        for part in _requests(sales):
            reply = self._predict(request(part), timeout=CALL_TIMEOUT_S)
            version = reply.model_version
            outcomes += [
                pb.Outcome(prediction_id=f"{reply.prediction_id}/{i}", value=sale.price_usd)
                for i, sale in enumerate(part)
            ]
        # Windows with outcomes have ended, all of them: the last finding waited for that.
        known = len(self._windows(version))
        self._wait_for_rows(before + len(sales))
        self._report(outcomes)
        return self._finding(version, known, len(outcomes))

    def report(self) -> dict[str, Any]:
        """Fetch the monitor's report."""
        document: dict[str, Any] = json.loads(self.page("/report.json"))
        return document

    def page(self, path: str) -> bytes:
        """Fetch one of the monitor's pages."""
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(f"http://{self._http_address}{path}", timeout=CALL_TIMEOUT_S) as page:
            return bytes(page.read())

    def _rows(self) -> int:
        return sum(of["rows"] for of in self.report()["versions"])

    def _wait_for_rows(self, rows: int) -> None:
        """Wait for the monitor: a prediction takes a moment to get there."""
        deadline_s = time.monotonic() + TIMEOUT_S
        while self._rows() < rows:
            if time.monotonic() > deadline_s:
                raise StartupError("the monitor did not get the predictions")
            time.sleep(POLL_PERIOD_S)

    def _report(self, outcomes: Sequence[pb.Outcome]) -> None:
        """
        Report outcomes until their predictions are known, all of them.

        Some may not be yet: the rows that were waited for may have been somebody else's.
        """
        deadline_s = time.monotonic() + TIMEOUT_S
        for start in range(0, len(outcomes), OUTCOMES_PER_REQUEST):
            message = pb.ReportOutcomesRequest(
                outcomes=outcomes[start : start + OUTCOMES_PER_REQUEST]
            )
            while self._monitor.ReportOutcomes(message, timeout=CALL_TIMEOUT_S).unknown_count:
                if time.monotonic() > deadline_s:
                    raise StartupError("the monitor did not keep the predictions")
                time.sleep(POLL_PERIOD_S)

    def _finding(self, version: int, known: int, sales: int) -> Finding:
        """Wait until the windows after the `known` first ones have ended with all outcomes."""
        deadline_s = time.monotonic() + TIMEOUT_S
        while time.monotonic() < deadline_s:
            windows = self._windows(version)[known:]
            if sum(window["labelled"] for window in windows) >= sales:
                of = self._version(version)
                return Finding(
                    sales=sum(window["labelled"] for window in windows),
                    error=_mean(windows, "error"),
                    bias=_mean(windows, "bias"),
                    prediction_drift=of["predictions"][0]["statistics"].get("prediction_drift"),
                    alarms=tuple(sorted({alarm["signal"] for alarm in of["alarms"]})),
                )
            time.sleep(POLL_PERIOD_S)
        raise StartupError("the monitor did not come to a finding")

    def _windows(self, version: int) -> list[dict[str, Any]]:
        """Return what is known of the ended windows that have outcomes."""
        of = self._version(version)
        return list(of["performance"]["windows"]) if of else []

    def _version(self, version: int) -> dict[str, Any]:
        for of in self.report()["versions"]:
            if (of["model"], of["version"]) == (MODEL, version):
                return dict(of)
        return {}


def _requests(sales: Sequence[Sale]) -> list[Sequence[Sale]]:
    """Divide sales evenly: no request is left with a few of them."""
    count = -(-len(sales) // HOMES_PER_REQUEST)
    ends = [len(sales) * i // count for i in range(count + 1)]
    return [sales[start:end] for start, end in pairwise(ends)]


def _mean(windows: Sequence[Mapping[str, Any]], name: str) -> float:
    """Return the mean of what windows say, weighted by their outcomes."""
    weights = [window["labelled"] for window in windows]
    found = [window[name] for window in windows]
    return float(sum(map(operator.mul, weights, found)) / sum(weights))
