"""Homes that were sold after everything the model and the features know."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from headrace.demo.stack import MODEL
from headrace.v1 import prediction_service_pb2 as pb


@dataclass(frozen=True, slots=True)
class Sale:
    """A home, when it was sold and for how much."""

    home_id: int
    area_id: int
    sale_date: str
    price_usd: float

    @property
    def half_year(self) -> str:
        """As `2014 H1`."""
        return f"{self.sale_date[:4]} H{1 if self.sale_date[5:7] <= '06' else 2}"


def read_sales(path: Path) -> list[Sale]:
    """Read one of the sales files beside the feature tables."""
    with path.open(newline="") as file:
        return [
            Sale(
                int(row["home_id"]), int(row["area_id"]), row["sale_date"], float(row["price_usd"])
            )
            for row in csv.DictReader(file)
        ]


def by_half_year(sales: Sequence[Sale]) -> dict[str, list[Sale]]:
    """Group sales, which are sorted by date."""
    return {name: list(group) for name, group in groupby(sales, lambda sale: sale.half_year)}


def request(sales: Sequence[Sale], *, include_features: bool = False) -> pb.PredictRequest:
    """Ask what homes are worth."""
    message = pb.PredictRequest(model_name=MODEL, include_features=include_features)
    homes = message.columns.add(name="home_id").values.int64s.values
    areas = message.columns.add(name="area_id").values.int64s.values
    homes.extend(sale.home_id for sale in sales)
    areas.extend(sale.area_id for sale in sales)
    return message
