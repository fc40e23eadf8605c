"""Later years, replayed: homes are valued, then sold, and the monitor hears for how much."""

import json
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from headrace.demo.sales import Sale, request
from headrace.demo.stack import MODEL
from headrace.demo.traffic import CALL_TIMEOUT_S, Predict
from headrace.errors import StartupError
from headrace.v1 import monitor_service_pb2 as pb
from headrace.v1 import monitor_service_pb2_grpc as pb_grpc

HOMES_PER_REQUEST = 50
OUTCOMES_PER_REQUEST = 5_000
TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class Finding:
    """
    What the monitor says of some sales.

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
        for start in range(0, len(sales), HOMES_PER_REQUEST):
            part = sales[start : start + HOMES_PER_REQUEST]
            reply = self._predict(request(part), timeout=CALL_TIMEOUT_S)
            version = reply.model_version
            outcomes += [
                pb.Outcome(prediction_id=f"{reply.prediction_id}/{i}", value=sale.price_usd)
                for i, sale in enumerate(part)
            ]
        known = sum(window["labelled"] for window in self._windows(version))
        self._wait_for_rows(before + len(sales))
        self._report(outcomes)
        return self._finding(version, known + len(outcomes))

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
            time.sleep(0.05)

    def _report(self, outcomes: Sequence[pb.Outcome]) -> None:
        for start in range(0, len(outcomes), OUTCOMES_PER_REQUEST):
            part = outcomes[start : start + OUTCOMES_PER_REQUEST]
            self._monitor.ReportOutcomes(
                pb.ReportOutcomesRequest(outcomes=part), timeout=CALL_TIMEOUT_S
            )

    def _finding(self, version: int, labelled: int) -> Finding:
        """Wait until the window with these outcomes has ended."""
        deadline_s = time.monotonic() + TIMEOUT_S
        while time.monotonic() < deadline_s:
            windows = self._windows(version)
            if sum(window["labelled"] for window in windows) >= labelled:
                performance = windows[-1]
                count = performance["labelled"]
                of = self._version(version)
                return Finding(
                    sales=count,
                    error=performance["error"],
                    bias=performance["bias"],
                    prediction_drift=of["predictions"][0]["statistics"].get("prediction_drift"),
                    alarms=tuple(sorted({alarm["signal"] for alarm in of["alarms"]})),
                )
            time.sleep(0.1)
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
