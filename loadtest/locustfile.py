"""What users of the demo do: ask what a home is worth, and sometimes what a list of them is."""

import csv
import json
import os
import random
from pathlib import Path
from typing import Any

from grpc_user import GrpcUser
from locust import constant_throughput, events, task
from shapes import *  # noqa: F403 Locust looks for a shape among this file's names

from headrace.v1 import prediction_service_pb2 as pb
from headrace.v1 import prediction_service_pb2_grpc as pb_grpc

SALES_FILE = "HEADRACE_SALES_FILE"
"""Where the homes are that are asked about, if not where `make demo` and `make up` leave them."""

SALES = Path(
    os.environ.get(SALES_FILE) or Path(__file__).parents[1] / "features" / "data" / "evaluation.csv"
)
REQUESTS_PER_S = 10
VERSIONS_FILE = "HEADRACE_VERSIONS_FILE"
"""Where to write which model versions answered, and how often."""

versions: dict[int, int] = {}


def read_homes() -> list[tuple[int, int]]:
    """Read (home_id, area_id) of the demo's evaluation sales."""
    if not SALES.is_file():
        raise SystemExit(f"{SALES} is not there: `headrace up` makes it; see also {SALES_FILE}")
    with SALES.open(newline="") as file:
        return [(int(row["home_id"]), int(row["area_id"])) for row in csv.DictReader(file)]


class Buyer(GrpcUser):
    """Someone who looks at homes, ten times a second."""

    wait_time = constant_throughput(REQUESTS_PER_S)
    homes = read_homes()

    def on_start(self) -> None:
        self.predict = pb_grpc.PredictionServiceStub(self.channel).Predict

    @task(9)
    def value_one_home(self) -> None:
        self.note(self.timed("one home", self.predict, self.request(1)))

    @task(1)
    def value_a_list(self) -> None:
        self.note(self.timed("50 homes", self.predict, self.request(50)))

    def note(self, reply: Any) -> None:
        """Count who answered."""
        if reply is not None:
            versions[reply.model_version] = versions.get(reply.model_version, 0) + 1

    def request(self, count: int) -> pb.PredictRequest:
        """Name `count` homes."""
        homes = random.choices(self.homes, k=count)
        request = pb.PredictRequest(model_name="home_valuation")
        request.columns.add(name="home_id").values.int64s.values.extend(h for h, _ in homes)
        request.columns.add(name="area_id").values.int64s.values.extend(a for _, a in homes)
        return request


@events.quitting.add_listener
def write_versions(**_: Any) -> None:
    """Tell `run.py` who answered."""
    if VERSIONS_FILE in os.environ:
        Path(os.environ[VERSIONS_FILE]).write_text(json.dumps(versions))
