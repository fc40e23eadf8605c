"""What the demo's features promise: nothing in them is known too early."""

import numpy as np
import pandas as pd
import pytest
from home_sales import (
    AREA_MARKET,
    FEATURES,
    HOME_ATTRIBUTES,
    WINDOWS_DAYS,
    _installed_sales,
    area_market,
    as_of,
    evaluation_requests,
    features_at_sale,
    home_attributes,
    read_sales,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.errors import StartupError

DAY_0 = pd.Timestamp("2010-01-01", tz="UTC")

# (home, area, day, price, living area, age, years since it was renewed): homes sold again and
# several sales of a day are common.
SALES = st.lists(
    st.tuples(
        st.integers(1, 6),
        st.integers(1, 2),
        st.one_of(st.integers(0, 3), st.integers(360, 370), st.integers(0, 900)),
        st.integers(150_000, 900_000),
        st.integers(500, 4000),
        st.integers(0, 5),
        st.integers(0, 5),
    ),
    min_size=1,
    max_size=30,
)


def to_sales(rows):
    home, area, day, price, living, age, renewed = (
        np.array(column) for column in zip(*rows, strict=True)
    )
    sales = pd.DataFrame(dict.fromkeys(HOME_ATTRIBUTES, np.zeros(len(rows), np.float32)))
    sales["home_id"] = home.astype(np.int64)
    sales["area_id"] = area.astype(np.int64)
    sales["sale_date"] = DAY_0 + pd.to_timedelta(day, unit="D")
    sales["price_usd"] = price.astype(np.float64)
    sales["living_area_sqft"] = living.astype(np.float32)
    sales["age_years"] = age.astype(np.float32)
    sales["effective_age_years"] = np.minimum(age, renewed).astype(np.float32)
    return sales.sort_values("sale_date", kind="stable", ignore_index=True)


def slow_market(sales, area_id, day, window):
    """Return the median price, that per square foot, and the count, or NaN, one sale at a time."""
    start = day - pd.Timedelta(days=window)
    if start < sales["sale_date"].min():
        return np.nan, np.nan, np.nan
    found = [
        (sale.price_usd, sale.price_usd / sale.living_area_sqft)
        for sale in sales.itertuples()
        if sale.area_id == area_id and start <= sale.sale_date < day
    ]
    if not found:
        return np.nan, np.nan, 0
    prices, per_sqft = zip(*found, strict=True)
    return np.median(prices), np.median(per_sqft), len(found)


class TestReadSales:
    def test_the_installed_file_has_every_sale_of_seven_years(self, sales):
        assert len(sales) == 43_313
        assert sales["sale_date"].min() == pd.Timestamp("2010-01-02", tz="UTC")
        assert sales["sale_date"].dt.year.max() == 2016
        assert sales["sale_date"].is_monotonic_increasing
        assert sales["home_id"].dtype == sales["area_id"].dtype == np.int64
        assert not sales.isna().any(axis=None)

    def test_a_sale_reads_as_the_file_has_it(self, sales):
        of_home = sales[sales["home_id"] == 1_800_010]  # "..0001800010"
        assert len(of_home) == 1
        sale = of_home.iloc[0]
        assert (sale["area_id"], sale["price_usd"], sale["grade"]) == (79, 289_000, 7)
        assert sale["sale_date"] == pd.Timestamp("2013-02-06", tz="UTC")
        assert (sale["age_years"], sale["effective_age_years"]) == (98, 6)

    def test_a_file_that_differs_by_one_byte_is_refused(self, tmp_path):
        data = bytearray(_installed_sales().read_bytes())
        copy = tmp_path / "sales.csv"
        copy.write_bytes(data)
        assert len(read_sales(copy)) == 43_313
        data[-3] ^= 1
        copy.write_bytes(data)
        with pytest.raises(StartupError, match="make setup"):
            read_sales(copy)

    def test_without_the_package_the_error_says_what_to_run(self, monkeypatch):
        monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
        with pytest.raises(StartupError, match="make setup"):
            read_sales()


class TestHomeAttributes:
    def test_what_a_home_was_at_its_sale_is_in_the_roll_of_that_year(self, frame, sales):
        columns = list(HOME_ATTRIBUTES)
        pd.testing.assert_frame_equal(frame[columns], sales[columns])

    def test_a_home_ages_by_a_year_each_year(self, attributes):
        ages = attributes.sort_values(["home_id", "event_timestamp"])
        of_home = ages[ages["home_id"] == 1_800_010]  # built in 1915, renewed in 2007
        assert of_home["age_years"].tolist() == [95, 96, 97, 98, 99, 100, 101]
        assert of_home["effective_age_years"].tolist() == [3, 4, 5, 6, 7, 8, 9]

    def test_a_renovation_does_not_show_before_its_year(self):
        rows = [(1, 1, 0, 200_000, 1000, 5, 5), (1, 1, 900, 400_000, 1000, 7, 1)]
        table = home_attributes(to_sales(rows))  # sold in 2010 and 2012, renewed in 2011
        assert table["age_years"].tolist() == [5, 6, 7]
        assert table["effective_age_years"].tolist() == [5, 0, 1]

    def test_a_home_has_no_row_before_it_is_built(self):
        rows = [(1, 1, 0, 200_000, 1000, 5, 5), (2, 1, 900, 400_000, 1000, 0, 0)]
        table = home_attributes(to_sales(rows))  # home 2 was built and sold in 2012
        of_home = table[table["home_id"] == 2]
        assert of_home["event_timestamp"].dt.year.tolist() == [2012]

    @given(SALES)
    @settings(deadline=None, max_examples=50)
    def test_a_home_has_one_row_a_year_and_no_negative_age(self, rows):
        table = home_attributes(to_sales(rows))
        assert not table.duplicated(["home_id", "event_timestamp"]).any()
        assert (table[["age_years", "effective_age_years"]] >= 0).all(axis=None)
        assert (table["effective_age_years"] <= table["age_years"]).all()


class TestAreaMarket:
    @given(SALES)
    @settings(deadline=None, max_examples=25)
    def test_a_day_has_the_sales_before_it_and_no_other(self, rows):
        sales = to_sales(rows)
        market = area_market(sales)
        # The days on which a window's content changes, and their neighbours.
        edges = {
            sale + pd.Timedelta(days=window + shift)
            for sale in sales["sale_date"]
            for window in (0, *WINDOWS_DAYS)
            for shift in (-1, 0, 1)
        }
        checked = market[market["event_timestamp"].isin(list(edges))]
        assert len(checked) > 0
        for row in checked.itertuples():
            for window in WINDOWS_DAYS:
                got = (
                    getattr(row, f"median_price_{window}d_usd"),
                    getattr(row, f"median_price_per_sqft_{window}d_usd"),
                    getattr(row, f"sales_count_{window}d"),
                )
                expected = slow_market(sales, row.area_id, row.event_timestamp, window)
                np.testing.assert_allclose(got, expected, rtol=1e-6)

    @given(SALES, st.integers(0, 900))
    @settings(deadline=None, max_examples=25)
    def test_the_future_changes_nothing_of_the_past(self, rows, day):
        sales = to_sales(rows)
        today = sales["sale_date"].min() + pd.Timedelta(days=day)
        revised = sales.copy()
        revised.loc[revised["sale_date"] >= today, "price_usd"] *= 10
        before, after = area_market(sales), area_market(revised)
        is_past = before["event_timestamp"] <= today
        pd.testing.assert_frame_equal(before[is_past], after[is_past])

    def test_every_area_has_every_day_until_the_day_after_the_last_sale(self, market, sales):
        days = market.groupby("area_id")["event_timestamp"].agg(["min", "max", "size"])
        assert set(days.index) == set(sales["area_id"])
        assert (days["min"] == sales["sale_date"].min()).all()
        assert (days["max"] == sales["sale_date"].max() + pd.Timedelta(days=1)).all()
        assert (days["size"] == (days["max"] - days["min"]).dt.days + 1).all()


class TestAsOf:
    @given(
        st.lists(st.tuples(st.integers(1, 3), st.integers(0, 9)), min_size=1, max_size=12),
        st.sets(st.tuples(st.integers(1, 3), st.integers(0, 9)), min_size=1, max_size=12),
    )
    @settings(deadline=None)
    def test_each_row_gets_the_newest_value_that_is_not_younger(self, asked, known):
        rows = pd.DataFrame(asked, columns=["key", "day"])
        rows["at"] = DAY_0 + pd.to_timedelta(rows["day"], unit="D")
        rows.index = rows.index[::-1]
        table = pd.DataFrame(sorted(known), columns=["key", "day"])
        table["event_timestamp"] = DAY_0 + pd.to_timedelta(table["day"], unit="D")
        table["value"] = np.arange(len(table), dtype=np.float32)
        values = {pair: float(i) for i, pair in enumerate(sorted(known))}

        joined = as_of(rows, table.drop(columns="day"), on="key", at="at")

        assert joined.index.equals(rows.index)
        for (key, day), got in zip(asked, joined["value"], strict=True):
            older = [pair for pair in values if pair[0] == key and pair[1] <= day]
            np.testing.assert_equal(float(got), values[max(older)] if older else np.nan)


class TestFeaturesAtSale:
    def test_a_sale_does_not_see_its_own_price(self, sales, attributes, market, frame):
        day = pd.Timestamp("2012-03-05", tz="UTC")
        revised = sales.copy()
        revised.loc[revised["sale_date"] >= day, "price_usd"] = 1.0
        again = features_at_sale(sales, attributes, area_market(revised))
        until = frame["sale_date"] <= day
        assert (frame["sale_date"] == day).sum() > 1
        pd.testing.assert_frame_equal(
            frame.loc[until, list(AREA_MARKET)], again.loc[until, list(AREA_MARKET)]
        )
        later = frame["sale_date"] > day
        assert not frame.loc[later, "median_price_90d_usd"].equals(
            again.loc[later, "median_price_90d_usd"]
        )

    def test_features_are_float32_in_the_order_of_the_sales(self, frame, sales):
        assert (frame[list(FEATURES)].dtypes == np.float32).all()
        columns = ["home_id", "area_id", "sale_date", "price_usd"]
        pd.testing.assert_frame_equal(frame[columns], sales[columns])


class TestEvaluationRequests:
    def test_requests_are_real_sales_of_the_days_from_the_cutoff_on(self, sales, cutoff):
        requests = evaluation_requests(sales, cutoff=cutoff, count=200, days=30)
        assert len(requests) == 200
        assert (requests["sale_date"] >= cutoff).all()
        assert (requests["sale_date"] < cutoff + pd.Timedelta(days=30)).all()
        assert requests.index.is_unique
        pd.testing.assert_frame_equal(requests, sales.loc[requests.index, requests.columns])

    def test_a_seed_draws_the_same_sales_again(self, sales, cutoff):
        first = evaluation_requests(sales, cutoff=cutoff, count=50, seed=1)
        again = evaluation_requests(sales, cutoff=cutoff, count=50, seed=1)
        other = evaluation_requests(sales, cutoff=cutoff, count=50, seed=2)
        assert first.equals(again)
        assert not first.equals(other)
