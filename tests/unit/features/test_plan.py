"""Compiling a feature service: groups, order, names and what is refused."""

from dataclasses import replace

import pytest

from headrace.errors import ModelLoadError
from headrace.features.layout import feature_field, time_field
from headrace.features.on_demand_plan import OnDemandSource, compile_on_demand_plan
from headrace.features.plan import FeatureSource, ViewSource, compile_plan
from headrace.features.values import ValueType

DRIVER = ("driver_id", "driver_id", ValueType.INT64)
CUSTOMER = ("customer_id", "customer_id", ValueType.STRING)


def view(name, *keys, ttl_s=None, **features):
    sources = tuple(
        FeatureSource(feature, *(spec if isinstance(spec, tuple) else (spec,)))
        for feature, spec in features.items()
    )
    return ViewSource(name, keys, sources, ttl_s)


def compiled(*views, neighbours=()):
    return compile_plan("service", "demo", "1", views, neighbours)


def test_views_of_the_same_join_keys_share_one_command():
    plan = compiled(
        view("stats", DRIVER, a=ValueType.FLOAT),
        view("pairs", CUSTOMER, DRIVER, b=ValueType.FLOAT),
        view("profile", DRIVER, c=ValueType.FLOAT),
        view("mixed", DRIVER, CUSTOMER, d=ValueType.FLOAT),
    )
    assert [[plan.views[i].name for i in group.views] for group in plan.groups] == [
        ["stats", "profile"],
        ["pairs", "mixed"],
    ]
    assert plan.groups[1].base_names == ("customer_id", "driver_id")


def test_a_renamed_join_key_is_another_group():
    rival = ("driver_id", "rival_id", ValueType.INT64)
    plan = compiled(
        view("stats", DRIVER, a=ValueType.FLOAT), view("stats", rival, b=ValueType.FLOAT)
    )
    assert [key.name for key in plan.join_keys] == ["driver_id", "rival_id"]
    assert [group.base_names for group in plan.groups] == [("driver_id",), ("driver_id",)]


def test_features_keep_the_services_order_and_fields_are_ordered_by_kind():
    plan = compiled(
        view("v", DRIVER, text=ValueType.STRING, whole=ValueType.INT64, real=ValueType.FLOAT),
        view("w", DRIVER, flag=ValueType.BOOL, wide=ValueType.DOUBLE),
    )
    assert [feature.name for feature in plan.features] == ["text", "whole", "real", "flag", "wide"]
    assert plan.groups[0].fields == (
        feature_field("v", "real"),
        feature_field("w", "wide"),
        feature_field("w", "flag"),
        feature_field("v", "whole"),
        time_field("v"),
        time_field("w"),
        feature_field("v", "text"),
    )


def test_two_projections_of_one_view_are_one_view():
    plan = compiled(view("v", DRIVER, a=ValueType.FLOAT), view("v", DRIVER, b=ValueType.FLOAT))
    assert len(plan.views) == 1
    assert [feature.view_index for feature in plan.features] == [0, 0]


@pytest.mark.parametrize(
    ("value_type", "datatype"),
    [
        (ValueType.INT64, "INT64"),
        (ValueType.INT32, "INT32"),
        (ValueType.STRING, "BYTES"),
        (ValueType.BYTES, "BYTES"),
        (ValueType.UNIX_TIMESTAMP, "INT64"),
    ],
)
def test_join_keys_have_the_tensor_datatype_of_their_value_type(value_type, datatype):
    plan = compiled(view("v", ("key", "key", value_type), a=ValueType.FLOAT))
    assert plan.join_keys[0].datatype == datatype


def test_ttl_and_default_come_with_the_feature():
    plan = compiled(view("v", DRIVER, ttl_s=60.0, a=(ValueType.FLOAT, "1.5"), b=ValueType.INT64))
    assert [(f.ttl_s, f.default) for f in plan.features] == [(60.0, 1.5), (60.0, None)]


def test_a_plan_of_floats_is_one_matrix_and_any_other_is_not():
    assert compiled(view("v", DRIVER, a=ValueType.FLOAT)).is_float32
    assert not compiled(view("v", DRIVER, a=ValueType.FLOAT, b=ValueType.BOOL)).is_float32


def test_a_view_without_features_is_not_read_and_asks_for_no_key():
    plan = compiled(view("v", DRIVER, a=ValueType.FLOAT), view("none", CUSTOMER))

    assert [planned.name for planned in plan.views] == ["v"]
    assert [key.name for key in plan.join_keys] == ["driver_id"]


@pytest.mark.parametrize(
    ("views", "message"),
    [
        ([view("v", DRIVER)], "has no features"),
        (
            [view("v", DRIVER, a=ValueType.FLOAT), view("w", DRIVER, a=ValueType.FLOAT)],
            "two features called 'a', in views 'v' and 'w'; select one",
        ),
        ([view("v", DRIVER, driver_id=ValueType.INT64)], "a feature and a request column called"),
        (
            [
                view("v", DRIVER, a=ValueType.FLOAT),
                view("w", ("driver_id", "driver_id", ValueType.STRING), b=ValueType.FLOAT),
            ],
            "'driver_id' of feature service 'service' is INT64 in one view and STRING in 'w'",
        ),
        (
            [view("v", ("key", "key", ValueType.DOUBLE), a=ValueType.FLOAT)],
            "is DOUBLE; a join key is one of BYTES, INT32, INT64, STRING, UNIX_TIMESTAMP",
        ),
        (
            [view("v", DRIVER, a=(ValueType.INT32, "many"))],
            "headrace.default of feature 'a' in feature service 'service' is 'many'",
        ),
    ],
)
def test_a_service_that_cannot_be_read_is_refused_with_what_to_do(views, message):
    with pytest.raises(ModelLoadError, match=message):
        compiled(*views)


# Found by search: murmur3("v:f37660") == murmur3("v:f43618").
COLLIDING = ("f37660", "f43618")


def test_features_whose_hashes_collide_are_refused():
    first, second = COLLIDING
    with pytest.raises(ModelLoadError, match="same 32-bit field name"):
        compiled(view("v", DRIVER, **{first: ValueType.FLOAT, second: ValueType.FLOAT}))


def test_features_of_two_views_in_one_command_whose_hashes_collide_are_refused():
    assert feature_field("a", "f7545") == feature_field("b", "g14446")  # found by search
    views = [view("a", DRIVER, f7545=ValueType.FLOAT), view("b", DRIVER, g14446=ValueType.FLOAT)]
    with pytest.raises(ModelLoadError, match="'a:f7545' and 'b:g14446' have the same 32-bit"):
        compiled(*views)
    views[1] = view("b", CUSTOMER, g14446=ValueType.FLOAT)  # not in that hash
    assert len(compiled(*views).groups) == 2


def test_a_collision_with_a_feature_that_is_only_stored_beside_it_is_refused():
    first, second = COLLIDING
    with pytest.raises(ModelLoadError, match="same 32-bit field name"):
        compiled(
            view("v", DRIVER, **{first: ValueType.FLOAT}), neighbours=[(["driver_id"], "v", second)]
        )


def test_a_collision_in_another_entitys_hash_is_none_of_this_services_business():
    first, second = COLLIDING
    compiled(
        view("v", DRIVER, **{first: ValueType.FLOAT}), neighbours=[(["customer_id"], "v", second)]
    )


def located(*pairs, name="loc", label=""):
    keys = tuple((base, key, ValueType.INT64) for base, key in pairs)
    return ViewSource(name, keys, (FeatureSource(f"f_{label}", ValueType.FLOAT),), label=label)


def test_a_digest_changes_with_the_columns_that_a_view_is_joined_by():
    both = located(("origin", "origin"), ("goal", "goal"), name="pair", label="p")

    def ends(one, other):
        return [both, located(("loc", one), label="o"), located(("loc", other), label="d")]

    before = compile_plan("s", "p", "1", ends("origin", "goal"))
    again = compile_plan("s", "p", "2", ends("origin", "goal"))
    swapped = compile_plan("s", "p", "2", ends("goal", "origin"))

    assert before.digest == again.digest
    assert before.digest != swapped.digest


def test_a_digest_changes_with_a_join_keys_own_name():
    plans = [compile_plan("s", "p", "1", [located((base, "id"))]) for base in ("id", "driver")]

    assert plans[0].groups[0].key_prefix != plans[1].groups[0].key_prefix
    assert plans[0].digest != plans[1].digest


def test_a_digest_changes_with_what_computed_features_are_given():
    def plan(*names):
        source = ViewSource(
            "v", (("k", "k", ValueType.INT64),), (FeatureSource("a", ValueType.FLOAT),)
        )
        data = (("x", ValueType.INT64),)
        computed = OnDemandSource(
            "c", "c", (FeatureSource("z", ValueType.FLOAT),), (source,), data, None
        )
        made = compile_on_demand_plan("s", "p", "1", [computed])
        inputs = tuple((name, 0) for name in names)
        return replace(made, computed=(replace(made.computed[0], inputs=inputs),))

    assert plan("a", "v__a").digest == plan("a", "v__a").digest
    assert plan("a", "v__a").digest != plan("a", "w__a").digest
