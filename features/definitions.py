"""
The demo's features: homes, the markets of their areas, and what the home valuation model takes.

The tables come from `model_repository/home_valuation/home_sales.py`, which says how each value is
made. Every feature is a Float32, as the model's columns are, and all are missing where unknown.

The sales are history: against today's clock each would be years too old. So no view has a TTL
(0 is for ever in Feast); a live repository would give the market a few days and homes a year.
"""

from datetime import timedelta

from feast import Entity, FeatureService, FeatureView, Field, FileSource, ValueType
from feast.types import Float32, Int64

FOR_EVER = timedelta(0)

home = Entity(
    name="home",
    join_keys=["home_id"],
    value_type=ValueType.INT64,
    description="A parcel with a single-family home or townhouse, by its assessor's number.",
)

area = Entity(
    name="area",
    join_keys=["area_id"],
    value_type=ValueType.INT64,
    description="A residential area, as the assessor draws them.",
)


def feature(name: str, description: str, default: str | None = None) -> Field:
    """Return a Float32 feature; `default` is what Headrace may use where it is missing."""
    tags = {} if default is None else {"headrace.default": default}
    return Field(name=name, dtype=Float32, description=description, tags=tags)


home_attributes = FeatureView(
    name="home_attributes",
    description="The assessor's roll of the year.",
    entities=[home],
    ttl=FOR_EVER,
    schema=[
        Field(name="home_id", dtype=Int64),
        feature("lot_size_sqft", "Lot, in square feet."),
        feature("waterfront", "1 on the waterfront, 0 elsewhere.", default="0"),
        feature("grade", "Quality of construction, from 1 to 13."),
        feature("living_area_sqft", "Living area, in square feet."),
        feature("bedrooms", "Number of bedrooms."),
        feature("bathrooms", "Number of bathrooms, in quarters."),
        feature("age_years", "Years since it was built."),
        feature("effective_age_years", "Years since it was built or renewed."),
        feature("longitude", "Degrees east."),
        feature("latitude", "Degrees north."),
    ],
    source=FileSource(
        name="home_attributes",
        path="data/home_attributes.parquet",
        timestamp_field="event_timestamp",
    ),
)

area_market = FeatureView(
    name="area_market",
    description="Sales in the area, over the days before the row's day.",
    entities=[area],
    ttl=FOR_EVER,
    schema=[
        Field(name="area_id", dtype=Int64),
        feature("median_price_90d_usd", "Median price of 90 days."),
        feature("median_price_365d_usd", "Median price of 365 days."),
        feature("median_price_per_sqft_90d_usd", "Median price per square foot of 90 days."),
        feature("median_price_per_sqft_365d_usd", "Median price per square foot of 365 days."),
        feature("sales_count_90d", "Sales in 90 days.", default="0"),
        feature("sales_count_365d", "Sales in 365 days.", default="0"),
    ],
    source=FileSource(
        name="area_market",
        path="data/area_market.parquet",
        timestamp_field="event_timestamp",
    ),
)

home_valuation = FeatureService(
    name="home_valuation",
    description="The 16 columns of the home valuation model, in order.",
    features=[home_attributes, area_market],
)
