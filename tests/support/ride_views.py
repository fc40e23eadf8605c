"""On-demand feature views of several kinds, as an operator's own module would define them."""

from datetime import timedelta

import pandas as pd
from feast import Entity, FeatureView, Field, FileSource, RequestSource, ValueType
from feast.on_demand_feature_view import on_demand_feature_view
from feast.types import Array, Bool, Float32, Float64, Int64, String, UnixTimestamp

driver = Entity(name="driver", join_keys=["driver_id"], value_type=ValueType.INT64)
_source = FileSource(name="unread", path="unread.parquet", timestamp_field="event_timestamp")

stats = FeatureView(
    name="stats",
    entities=[driver],
    ttl=timedelta(hours=1),
    schema=[
        Field(name="driver_id", dtype=Int64),
        Field(name="rating", dtype=Float32),
        Field(name="trips", dtype=Int64),
        Field(name="city", dtype=String),
        Field(name="joined", dtype=UnixTimestamp),
        Field(name="scores", dtype=Array(Float64)),
    ],
    source=_source,
)
ride = RequestSource(
    name="ride",
    schema=[
        Field(name="distance", dtype=Float64),
        Field(name="is_night", dtype=Bool),
        Field(name="note", dtype=String),
    ],
)


@on_demand_feature_view(
    sources=[stats, ride],
    schema=[
        Field(name="fare", dtype=Float64),
        Field(name="greeting", dtype=String),
        Field(name="is_busy", dtype=Bool),
        Field(name="total", dtype=Float64),
        Field(name="days", dtype=Int64),
        Field(name="twice", dtype=Array(Float64)),
    ],
    mode="python",
)
def quote(inputs):
    # Feast 0.67 runs what is between `def` and the end, in a namespace of its own.
    from datetime import UTC, datetime

    rows = range(len(inputs["rating"]))
    start = datetime(2023, 11, 14, tzinfo=UTC)
    scores = inputs["stats__scores"]
    return {
        "fare": [
            None if inputs["rating"][i] is None else inputs["rating"][i] * inputs["distance"][i]
            for i in rows
        ],
        "greeting": [f"{inputs['city'][i]}/{inputs['note'][i]}" for i in rows],
        "is_busy": [bool((inputs["trips"][i] or 0) > 5) or inputs["is_night"][i] for i in rows],
        "total": [None if one is None else float(sum(one)) for one in scores],
        "days": [None if at is None else (at - start).days for at in inputs["joined"]],
        "twice": [None if one is None else [2 * score for score in one] for one in scores],
    }


@on_demand_feature_view(
    sources=[stats],
    schema=[Field(name="half", dtype=Float64), Field(name="more_trips", dtype=Int64)],
    mode="pandas",
)
def halved(inputs: pd.DataFrame) -> pd.DataFrame:
    frame = pd.DataFrame()
    frame["half"] = inputs["rating"] / 2
    frame["more_trips"] = inputs["stats__trips"].fillna(-2).astype("int64") + 1
    return frame


@on_demand_feature_view(
    sources=[stats],
    schema=[Field(name="longer", dtype=String)],
    mode="python",
    singleton=True,
)
def one_by_one(inputs):
    return {"longer": None if inputs["city"] is None else inputs["city"] * 2}


@on_demand_feature_view(sources=[ride], schema=[Field(name="metres", dtype=Float64)], mode="python")
def metres(inputs):
    if -1.0 in inputs["distance"]:
        raise ValueError("no way is that long")
    return {"metres": [1000 * kilometres for kilometres in inputs["distance"]]}


@on_demand_feature_view(
    entities=[driver],
    sources=[stats],
    schema=[Field(name="is_known", dtype=Bool)],
    mode="pandas",
    write_to_online_store=True,
)
def known(inputs: pd.DataFrame) -> pd.DataFrame:
    frame = pd.DataFrame()
    frame["is_known"] = inputs["trips"] > 0
    return frame
