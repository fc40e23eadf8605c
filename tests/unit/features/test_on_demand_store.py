"""Computed features: what one caller gets does not depend on who else is in the batch."""

import numpy as np
import pandas as pd
import pytest
from feast import Field, RequestSource
from feast.on_demand_feature_view import on_demand_feature_view
from feast.types import Float64, Int64, String, UnixTimestamp
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.errors import ComputationFailed, InvalidRequest
from headrace.features.memory_store import MemoryStore
from headrace.features.on_demand_code import OnDemandCode
from headrace.features.on_demand_plan import OnDemandSource, compile_on_demand_plan
from headrace.features.on_demand_store import OnDemandStore
from headrace.features.plan import FeatureSource, FeatureStatus, ViewSource
from headrace.features.values import ValueType as V

REQUEST = RequestSource(name="request", schema=[Field(name="when", dtype=UnixTimestamp)])
STORED = ViewSource(
    "stats",
    (("id", "id", V.INT64),),
    (
        *(FeatureSource("trips", V.INT64), FeatureSource("active", V.BOOL)),
        *(FeatureSource("rating", V.FLOAT), FeatureSource("seen", V.UNIX_TIMESTAMP)),
        *(FeatureSource("city", V.STRING), FeatureSource("scores", V.DOUBLE_LIST)),
    ),
)
LARGE = 2**53 + 1  # which no double is


@on_demand_feature_view(
    sources=[REQUEST],
    schema=[
        *(Field(name="text", dtype=String), Field(name="next", dtype=Int64)),
        *(Field(name="half", dtype=Float64), Field(name="year", dtype=Int64)),
        *(Field(name="parity", dtype=Int64), Field(name="best", dtype=Float64)),
    ],
    mode="pandas",
)
def shown(inputs: pd.DataFrame) -> pd.DataFrame:
    frame = pd.DataFrame()
    columns = ("trips", "active", "rating", "seen", "city")
    frame["text"] = inputs[columns[0]].astype(str).str.cat([inputs[c].astype(str) for c in columns])
    frame["next"] = inputs["trips"] + 1
    frame["half"] = inputs["rating"] / 2
    frame["year"] = inputs["seen"].dt.year
    odd = [None if pd.isna(trips) or trips % 2 else int(trips) for trips in inputs["trips"]]
    frame["parity"] = pd.Series(odd, dtype="object")
    frame["best"] = [
        None if scores is None or not len(scores) else max(scores) for scores in inputs["scores"]
    ]
    return frame


@on_demand_feature_view(sources=[REQUEST], schema=[Field(name="year", dtype=Int64)], mode="python")
def year(inputs):
    moments = inputs["when"] if "when" in inputs else inputs["seen"]
    return {"year": [None if at is None else at.year for at in moments]}


def plan_of(view, *, stored=(), data=()):
    features = tuple(FeatureSource(f.name, V(f.dtype.to_value_type().value)) for f in view.features)
    source = OnDemandSource(view.name, view.name, features, stored, data, OnDemandCode(view))
    return compile_on_demand_plan("s", "p", "1", [source])


def computed(plan, rows):
    """Each row's values, None where there is none; `rows` are of `STORED`, None is not stored."""
    memory = MemoryStore()
    for i, row in enumerate(rows):
        if row is not None:
            names = [feature.name for feature in STORED.features]
            memory.put("stats", {"id": i}, dict(zip(names, row, strict=True)), 1.0)
    store = OnDemandStore(memory)

    def read(*ids):
        found = store.read(plan, {"id": np.array(ids)}, now_s=2.0, timeout_s=1.0)
        return [
            [
                column.tolist()[place] if statuses[place] == FeatureStatus.PRESENT else None
                for column, statuses in zip(found.values, found.statuses, strict=True)
            ]
            for place in range(len(ids))
        ]

    return read, store


ROWS = st.none() | st.tuples(
    st.none() | st.sampled_from([0, 7, -3, LARGE]),
    st.none() | st.booleans(),
    st.none() | st.sampled_from([0.5, -2.0]),
    st.none() | st.sampled_from([0, 1_700_000_000]),
    st.none() | st.sampled_from(["", "Zürich"]),
    st.none() | st.lists(st.sampled_from([0.5, 3.0]), max_size=2),
)


@settings(deadline=None, max_examples=60)
@given(rows=st.lists(ROWS, min_size=1, max_size=5))
def test_a_row_gets_in_a_batch_what_it_gets_alone(rows):
    read, _ = computed(plan_of(shown, stored=(STORED,)), rows)

    together = read(*range(len(rows)))

    assert together == [read(i)[0] for i in range(len(rows))]


def test_a_large_integer_beside_a_missing_one_keeps_its_digits():
    row = (LARGE, True, 0.5, 0, "", [])
    read, _ = computed(plan_of(shown, stored=(STORED,)), [row, None])

    text, following, *_ = read(0, 1)[0]

    assert text.startswith(f"{LARGE}{LARGE}True")
    assert following == LARGE + 1


@pytest.mark.parametrize("seconds", [2**62, -(2**62), 253_402_300_800])
def test_a_moment_that_python_has_not_is_its_callers_mistake(seconds):
    plan = plan_of(year, data=(("when", V.UNIX_TIMESTAMP),))
    store = OnDemandStore(MemoryStore())

    def read(*moments):
        return store.read(plan, {"when": np.array(moments)}, now_s=2.0, timeout_s=1.0)

    with pytest.raises(InvalidRequest, match=f"'when' is {seconds}; expected seconds") as caught:
        read(0, seconds)
    # So that whoever shares a batch is computed alone, as where code fails.
    assert isinstance(caught.value, ComputationFailed)
    assert read(0, 1_700_000_000).values[0].tolist() == [1970, 2023]


def test_a_stored_moment_that_python_has_not_is_null_to_the_code_and_counted():
    row = (1, True, 0.5, 2**62, "", [])
    read, store = computed(
        plan_of(year, stored=(STORED,)), [row, (1, True, 0.5, 1_700_000_000, "", [])]
    )

    assert read(0, 1) == [[None], [2023]]
    assert store.mismatches > 0
