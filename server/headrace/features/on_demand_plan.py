"""Plans with computed features: what must be read for them, and where results go."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from headrace.errors import FeaturePlanError
from headrace.features.on_demand_code import OnDemandCode
from headrace.features.plan import (
    NO_GROUP,
    ComputedView,
    FeaturePlan,
    FeatureSource,
    PlannedFeature,
    PlannedView,
    RequestColumn,
    ViewSource,
    compile_plan,
    parse_feature_default,
    refuse_repeated_names,
)
from headrace.features.values import COLUMN_DATATYPES, ValueType


@dataclass(frozen=True, slots=True)
class OnDemandSource:
    """
    An on-demand feature view as a service projects it.

    Args:
        name: As it is registered.
        label: Its name in full feature names.
        features: In declared order.
        inputs: The stored features that it is computed from.
        data: (name, value type) of each request column that it is computed from.
        code: Computes it.
    """

    name: str
    label: str
    features: tuple[FeatureSource, ...]
    inputs: tuple[ViewSource, ...]
    data: tuple[tuple[str, ValueType], ...]
    code: OnDemandCode


def compile_on_demand_plan(
    service: str,
    project: str,
    registry_version: str,
    sources: Sequence[ViewSource | OnDemandSource],
    neighbours: Iterable[tuple[Collection[str], str, str]] = (),
    *,
    references: Sequence[str] = (),
    full_feature_names: bool = False,
) -> FeaturePlan:
    """
    Compile a selection of features, some of them computed.

    Its `stored` plan, read by the store, has full feature names and references of its own; they
    are none where a view is renamed, or its join keys are, which references cannot say.

    Raises:
        FeaturePlanError: as `compile_plan`; or a request column has two types or one that it
            cannot have.
    """
    what = f"feature service '{service}'" if service else "this list of features"
    read = _to_read(sources)
    stored = None
    if read:
        stored = compile_plan(
            service,
            project,
            registry_version,
            read,
            neighbours,
            references=_references(read),
            full_feature_names=True,
        )
    join_keys = () if stored is None else stored.join_keys
    data = _data_columns(what, sources, join_keys)
    places = {} if stored is None else {of.name: i for i, of in enumerate(stored.features)}
    views: dict[int | str, PlannedView] = {}
    features: list[PlannedFeature] = []
    for source in sources:
        label = source.label or source.name
        for feature in source.features:
            if isinstance(source, OnDemandSource):
                of = _computed_feature(what, source, feature)
                views.setdefault(label, PlannedView(source.name, None, NO_GROUP, label, 0, 0.0))
                key: int | str = label
            else:
                assert stored is not None
                of = stored.features[places[f"{label}__{feature.name}"]]
                key = of.view_index
                views.setdefault(key, replace(stored.views[key], group=NO_GROUP))
            name = f"{label}__{feature.name}" if full_feature_names else feature.name
            index = list(views).index(key)
            features.append(replace(of, name=name, view_index=index, group=NO_GROUP))
    columns = (*join_keys, *data)
    refuse_repeated_names(what, features, {column.name for column in columns})
    return FeaturePlan(
        service=service,
        references=tuple(references),
        full_feature_names=full_feature_names,
        project=project,
        registry_version=registry_version,
        join_keys=join_keys,
        features=tuple(features),
        views=tuple(views.values()),
        groups=(),
        data_columns=data,
        computed=_computed(sources, features, list(views.values()), places, columns),
        stored=stored,
    )


def _to_read(sources: Sequence[ViewSource | OnDemandSource]) -> list[ViewSource]:
    """List the stored features, those that are computed from too, each once."""
    own = [source for source in sources if isinstance(source, ViewSource)]
    inputs = [
        one for source in sources if isinstance(source, OnDemandSource) for one in source.inputs
    ]
    single = {
        (source.label or source.name, source.join_keys, feature.name): replace(
            source, features=(feature,)
        )
        for source in reversed([*own, *inputs])
        for feature in reversed(source.features)
    }
    return list(reversed(single.values()))


def _references(read: Sequence[ViewSource]) -> Sequence[str]:
    is_plain = all(
        (source.label or source.name).partition("@")[0] == (source.registered or source.name)
        and all(base == name for base, name, _ in source.join_keys)
        for source in read
    )
    if not is_plain:
        return ()
    return [f"{source.label or source.name}:{source.features[0].name}" for source in read]


def _data_columns(
    what: str,
    sources: Sequence[ViewSource | OnDemandSource],
    join_keys: Sequence[RequestColumn],
) -> tuple[RequestColumn, ...]:
    types = {key.name: key.value_type for key in join_keys}
    found = {}
    for source in sources:
        if not isinstance(source, OnDemandSource):
            continue
        for name, value_type in source.data:
            if value_type not in COLUMN_DATATYPES:
                allowed = ", ".join(sorted(one.name for one in COLUMN_DATATYPES))
                raise FeaturePlanError(
                    f"request column '{name}' of {what} is {value_type.name}; "
                    f"a request column is one of {allowed}"
                )
            if types.setdefault(name, value_type) is not value_type:
                raise FeaturePlanError(
                    f"request column '{name}' of {what} is {types[name].name} in one place and "
                    f"{value_type.name} in '{source.name}'; rename one"
                )
            found[name] = RequestColumn(name, value_type, is_key=False)
    keys = {key.name for key in join_keys}
    return tuple(column for name, column in found.items() if name not in keys)


def _computed_feature(what: str, source: OnDemandSource, feature: FeatureSource) -> PlannedFeature:
    return PlannedFeature(
        name=feature.name,
        view=source.name,
        feature=feature.name,
        value_type=feature.value_type,
        ttl_s=None,
        default=parse_feature_default(what, feature),
        view_index=0,
        group=NO_GROUP,
    )


def _computed(
    sources: Sequence[ViewSource | OnDemandSource],
    features: Sequence[PlannedFeature],
    views: Sequence[PlannedView],
    places: Mapping[str, int],
    columns: Sequence[RequestColumn],
) -> tuple[ComputedView, ...]:
    by_label = {source.label: source for source in sources if isinstance(source, OnDemandSource)}
    found = []
    for index, view in enumerate(views):
        source = by_label.get(view.label)
        if source is None or view.name != source.name:
            continue
        inputs = []
        for one in source.inputs:
            label = one.label or one.name
            for feature in one.features:
                place = places[f"{label}__{feature.name}"]
                # Feast gives its code both, whichever the caller asked for.
                full = f"{one.registered or one.name}__{feature.name}"
                inputs += [(feature.name, place), (full, place)]
        found.append(
            ComputedView(
                name=source.name,
                code=source.code,
                inputs=tuple(inputs),
                columns=tuple(column.name for column in columns),
                features=tuple(i for i, of in enumerate(features) if of.view_index == index),
            )
        )
    return tuple(found)
