"""A selection of features, compiled once into the plain data that a read needs.

Nothing here is Feast: `repo` reads the registry and hands over `ViewSource`s. Whatever can be known
before a request is worked out now: the columns of the result, the key groups (every view whose join
keys come from the same request columns is in the same Redis hash, so one HMGET per entity reads
them all) and the bytes of the commands around the entity's own values.
"""

import hashlib
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING, Any

import numpy as np

from headrace.errors import FeaturePlanError
from headrace.features import layout
from headrace.features.values import COLUMN_DATATYPES, KEY_DATATYPES, TAGS, ValueType, parse_default

if TYPE_CHECKING:
    from headrace.features.on_demand_code import OnDemandCode
    from headrace.features.registry_state import RegistryState

CACHE_AGE_LIMIT_S = 86_400.0
"""Of the tag `headrace.cache_max_age_s`: what may be older should be in the store with that age."""

NO_GROUP = -1
"""Of what is in a plan with computed features."""


class FeatureStatus(IntEnum):
    """How a value was found; names and numbers are Feast's `FieldStatus`."""

    PRESENT = 1
    NULL_VALUE = 2
    NOT_FOUND = 3
    OUTSIDE_MAX_AGE = 4


@dataclass(frozen=True, slots=True)
class RequestColumn:
    """
    A column that requests carry: a join key, or data for an on-demand feature view.

    Args:
        name: As the service's projections name it (their `join_key_map` applied).
        value_type: A key of `KEY_DATATYPES`; for data, of `COLUMN_DATATYPES`.
        is_key: Whether it says which entity a row is about.
    """

    name: str
    value_type: ValueType
    is_key: bool = True

    @property
    def datatype(self) -> str:
        """Its tensor datatype. Timestamps are INT64 seconds, text is BYTES."""
        return COLUMN_DATATYPES[self.value_type]


@dataclass(frozen=True, slots=True)
class PlannedFeature:
    """
    One column of the result.

    Args:
        name: As returned.
        view: The name under which the store holds the view.
        feature: The feature's name in that view.
        value_type: As the registry declares it.
        ttl_s: Age above which a value is OUTSIDE_MAX_AGE; None is for ever.
        default: What the field's `headrace.default` tag says, or None.
        view_index: Its view's place in `FeaturePlan.views`.
        group: Its key group's place in `FeaturePlan.groups`, or `NO_GROUP`.
    """

    name: str
    view: str
    feature: str
    value_type: ValueType
    ttl_s: float | None
    default: Any
    view_index: int
    group: int

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.value_type.dtype


@dataclass(frozen=True, slots=True)
class PlannedView:
    """
    A feature view as one group of join keys reads it.

    Args:
        name: The name under which the store holds it.
        ttl_s: None is for ever.
        group: Its key group's place in `FeaturePlan.groups`, or `NO_GROUP`.
        label: Its name in full feature names: alias and pinned version included.
        version: Its version's number; 0 where views have none.
        cache_max_age_s: How long its rows may be served after they were read; 0 is not at all.
    """

    name: str
    ttl_s: float | None
    group: int
    label: str
    version: int
    cache_max_age_s: float


@dataclass(frozen=True, slots=True)
class KeyGroup:
    """
    The views that one entity key reads, and the command that reads them.

    An entity key is `key_prefix`, then per join key its type, length and value, then `key_suffix`.

    Args:
        join_keys: Places in `FeaturePlan.join_keys`, in the order of the entity key.
        base_names: The join keys' names in the views, in that order.
        views: Places in `FeaturePlan.views`.
        features: Places in `FeaturePlan.features`, in the order of `fields`: floats, doubles,
            booleans, integers, then the rest, so that each kind decodes at once.
        object_count: How many of `features`, at the end, decode one by one.
        fields: Hash fields: those of `features` up to the last `object_count`, those of the
            event times of `views`, the last `object_count`.
        key_prefix: See above.
        key_suffix: See above.
        command_head: Of an HMGET of `fields`, in RESP, up to the key.
        command_tail: The same command after the key.
        cache_max_age_s: The smallest of `views`: one key holds them all.
    """

    join_keys: tuple[int, ...]
    base_names: tuple[str, ...]
    views: tuple[int, ...]
    features: tuple[int, ...]
    object_count: int
    fields: tuple[bytes, ...]
    key_prefix: bytes
    key_suffix: bytes
    command_head: bytes
    command_tail: bytes
    cache_max_age_s: float


@dataclass(frozen=True, slots=True)
class ComputedView:
    """
    An on-demand feature view: what its code is given, and what is taken of its results.

    Args:
        name: As it is registered.
        code: Computes it.
        inputs: (name that the code knows, place in `FeaturePlan.stored`'s features) each; a feature
            may have several names.
        columns: Names of the request columns that it is given besides.
        features: Places in `FeaturePlan.features`.
    """

    name: str
    code: "OnDemandCode"
    inputs: tuple[tuple[str, int], ...]
    columns: tuple[str, ...]
    features: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class FeaturePlan:
    """
    All that reading a selection of features takes. Immutable, and equal only to itself.

    Args:
        service: The feature service's name; empty for a selection by references.
        references: The references selected, `view:feature`; none for a service.
        full_feature_names: Whether features are named `view__feature`.
        project: The Feast project.
        registry_version: Which state of the registry it was compiled from.
        join_keys: In the order in which the selected views first name them.
        features: In the selection's order.
        views: In that order too.
        groups: One per distinct set of join keys; none in a plan with computed features.
        data_columns: What requests carry besides the join keys.
        computed: The on-demand views among `views`.
        stored: What is read for a plan with computed features, its own stored ones included; None
            where nothing is computed, or nothing is read for it.
        registry: The state of the registry that it was compiled from, for stores that are read
            through Feast: plans outlive it.

    Attributes:
        request_columns: `join_keys`, then `data_columns`.
        view_names: Under which the store holds `views`.
        view_of_feature: Each feature's place in `views`.
        ttls_s: Of each view; infinite for ever.
        has_ttl: Whether any view has one.
        block_widths: How many features there are of each dtype.
        block_columns: Each feature's dtype, and its place among those of that dtype.
        is_float32: Whether the whole result is one float32 matrix.
    """

    service: str
    references: tuple[str, ...]
    full_feature_names: bool
    project: str
    registry_version: str
    join_keys: tuple[RequestColumn, ...]
    features: tuple[PlannedFeature, ...]
    views: tuple[PlannedView, ...]
    groups: tuple[KeyGroup, ...]
    data_columns: tuple[RequestColumn, ...] = ()
    computed: tuple[ComputedView, ...] = ()
    stored: "FeaturePlan | None" = None
    registry: "RegistryState | None" = field(default=None, repr=False)
    request_columns: tuple[RequestColumn, ...] = field(init=False, repr=False)
    view_names: tuple[str, ...] = field(init=False, repr=False)
    view_of_feature: np.ndarray[Any, np.dtype[np.intp]] = field(init=False, repr=False)
    ttls_s: np.ndarray[Any, np.dtype[np.float64]] = field(init=False, repr=False)
    has_ttl: bool = field(init=False)
    block_widths: Mapping[np.dtype[Any], int] = field(init=False, repr=False)
    block_columns: tuple[tuple[np.dtype[Any], int], ...] = field(init=False, repr=False)
    is_float32: bool = field(init=False)

    @property
    def digest(self) -> str:
        """What reading takes, as hexadecimal text: equal for plans that read the same."""
        stored = None if self.stored is None else self.stored.digest
        computed = [(of.name, of.inputs, of.columns, of.features) for of in self.computed]
        content = (
            *(self.project, self.request_columns, self.features, self.views),
            *(self.groups, computed, stored),
        )
        return hashlib.sha256(repr(content).encode()).hexdigest()

    def __post_init__(self) -> None:
        widths: dict[np.dtype[Any], int] = {}
        columns = []
        for feature in self.features:
            columns.append((feature.dtype, widths.get(feature.dtype, 0)))
            widths[feature.dtype] = columns[-1][1] + 1
        ttls = [np.inf if view.ttl_s is None else view.ttl_s for view in self.views]
        indices = [feature.view_index for feature in self.features]
        object.__setattr__(self, "request_columns", self.join_keys + self.data_columns)
        object.__setattr__(self, "view_names", tuple(view.name for view in self.views))
        object.__setattr__(self, "view_of_feature", np.array(indices, np.intp))
        object.__setattr__(self, "ttls_s", np.array(ttls, np.float64))
        object.__setattr__(self, "has_ttl", min(ttls, default=np.inf) < np.inf)
        object.__setattr__(self, "block_widths", widths)
        object.__setattr__(self, "block_columns", tuple(columns))
        object.__setattr__(self, "is_float32", list(widths) == [np.dtype(np.float32)])


@dataclass(frozen=True, slots=True)
class FeatureSource:
    """A feature as a service's projection declares it; `default` is the tag's text or None."""

    name: str
    value_type: ValueType
    default: str | None = None


@dataclass(frozen=True, slots=True)
class ViewSource:
    """
    A feature view as a service projects it.

    Args:
        name: The name under which the store holds it.
        join_keys: (name in the view, name in the request, value type) each; none for a view
            without entities.
        features: In declared order.
        ttl_s: None is for ever.
        label: Its name in full feature names; `name` when empty.
        version: Its version's number; 0 where views have none.
        cache_max_age_s: What its `headrace.cache_max_age_s` tag says; None without one.
        registered: Its name in the registry; `name` when empty.
    """

    name: str
    join_keys: tuple[tuple[str, str, ValueType], ...]
    features: tuple[FeatureSource, ...]
    ttl_s: float | None = None
    label: str = ""
    version: int = 0
    cache_max_age_s: str | None = None
    registered: str = ""


def compile_plan(
    service: str,
    project: str,
    registry_version: str,
    sources: Sequence[ViewSource],
    neighbours: Iterable[tuple[Collection[str], str, str]] = (),
    *,
    references: Sequence[str] = (),
    full_feature_names: bool = False,
) -> FeaturePlan:
    """
    Compile a selection of features.

    Args:
        service: The feature service's name; empty for a selection by references.
        project: The Feast project.
        registry_version: Which state of the registry this is.
        sources: The selected projections in order; several may be of one view.
        neighbours: What else the project stores: (join keys, view, feature) each.
        references: The references that `sources` were made of, if they were.
        full_feature_names: Name features `view__feature`, as Feast does.

    Raises:
        FeaturePlanError: two columns of one name, one request column of two types, a join key of a
            type that cannot be one, a tag that is unusable, or two fields of one hash that collide.
    """
    what = f"feature service '{service}'" if service else "this list of features"
    sources = [source for source in sources if source.features]  # Feast allows `view[[]]`
    if not sources:
        raise FeaturePlanError(f"{what} has no features")
    join_keys = _join_keys(what, sources)
    positions = {key.name: i for i, key in enumerate(join_keys)}
    signatures = [tuple(sorted(source.join_keys)) for source in sources]
    group_of = {signature: i for i, signature in enumerate(dict.fromkeys(signatures))}
    view_of: dict[tuple[str, int, str], int] = {}
    views: list[PlannedView] = []
    features: list[PlannedFeature] = []
    for source, signature in zip(sources, signatures, strict=True):
        group = group_of[signature]
        label = source.label or source.name
        view = view_of.setdefault((source.name, group, label), len(views))
        if view == len(views):
            cache_max_age_s = _cache_max_age_s(source)
            views.append(
                PlannedView(
                    source.name, source.ttl_s, group, label, source.version, cache_max_age_s
                )
            )
        features += [
            PlannedFeature(
                name=f"{label}__{feature.name}" if full_feature_names else feature.name,
                view=source.name,
                feature=feature.name,
                value_type=feature.value_type,
                ttl_s=source.ttl_s,
                default=parse_feature_default(what, feature),
                view_index=view,
                group=group,
            )
            for feature in source.features
        ]
    refuse_repeated_names(what, features, positions)
    _refuse_colliding_fields(what, sources, neighbours)
    groups = tuple(
        _group(index, signature, project, positions, views, features)
        for signature, index in group_of.items()
    )
    return FeaturePlan(
        service=service,
        references=tuple(references),
        full_feature_names=full_feature_names,
        project=project,
        registry_version=registry_version,
        join_keys=join_keys,
        features=tuple(features),
        views=tuple(views),
        groups=groups,
    )


def _join_keys(what: str, sources: Sequence[ViewSource]) -> tuple[RequestColumn, ...]:
    types: dict[str, ValueType] = {}
    for source in sources:
        for _, name, value_type in source.join_keys:
            if value_type not in KEY_DATATYPES:
                allowed = ", ".join(sorted(t.name for t in KEY_DATATYPES))
                raise FeaturePlanError(
                    f"join key '{name}' of {what} is {value_type.name}; "
                    f"a join key is one of {allowed}"
                )
            if types.setdefault(name, value_type) is not value_type:
                raise FeaturePlanError(
                    f"join key '{name}' of {what} is {types[name].name} in "
                    f"one view and {value_type.name} in '{source.name}'; rename one with "
                    "`with_join_key_map`"
                )
    return tuple(RequestColumn(name, value_type) for name, value_type in types.items())


def _cache_max_age_s(source: ViewSource) -> float:
    if source.cache_max_age_s is None:
        return 0.0
    try:
        age_s = float(source.cache_max_age_s)
    except ValueError:
        age_s = math.nan
    if not 0 <= age_s <= CACHE_AGE_LIMIT_S:
        raise FeaturePlanError(
            f"tag headrace.cache_max_age_s of feature view '{source.name}' is not a number of "
            f"seconds from 0 to {CACHE_AGE_LIMIT_S:g}"
        )
    return age_s


def parse_feature_default(what: str, feature: FeatureSource) -> Any:
    """
    Return the default of a feature; None without one.

    Raises:
        FeaturePlanError: its tag is no value of its type.
    """
    if feature.default is None:
        return None
    try:
        return parse_default(feature.default, feature.value_type)
    except ValueError as error:
        raise FeaturePlanError(
            f"tag headrace.default of feature '{feature.name}' in {what} is "
            f"'{feature.default}', which is no {feature.value_type.name}: {error}"
        ) from None


def refuse_repeated_names(
    what: str, features: Sequence[PlannedFeature], columns: Collection[str]
) -> None:
    """
    Check that what a reply holds has a name of its own.

    Args:
        what: Whose features they are, for messages.
        features: The features.
        columns: Names of the request's columns.

    Raises:
        FeaturePlanError: it has not.
    """
    views: dict[str, str] = {}
    for feature in features:
        if feature.name in columns:
            raise FeaturePlanError(
                f"{what} has a feature and a request column called '{feature.name}'; rename the "
                "feature"
            )
        if feature.name in views:
            raise FeaturePlanError(
                f"{what} has two features called '{feature.name}', in views "
                f"'{views[feature.name]}' and '{feature.view}'; select one of them "
                "(`view[[...]]`), rename one, split the service, or ask for full feature names"
            )
        views[feature.name] = feature.view


def _refuse_colliding_fields(
    what: str,
    sources: Sequence[ViewSource],
    neighbours: Iterable[tuple[Collection[str], str, str]],
) -> None:
    # Feast does not look: two features whose names hash alike overwrite each other's values.
    own = {
        (frozenset(base for base, _, _ in source.join_keys), source.name, feature.name)
        for source in sources
        for feature in source.features
    }
    others = {(frozenset(keys), view, feature) for keys, view, feature in neighbours}
    holders: dict[tuple[frozenset[str], bytes], tuple[str, str]] = {}
    for entity, view, feature in [*sorted(own, key=_by_name), *sorted(others, key=_by_name)]:
        at = (entity, layout.feature_field(view, feature))
        holder = holders.get(at)
        if holder is None and (entity, view, feature) in own:
            holders[at] = (view, feature)
        elif holder is not None and holder != (view, feature):
            raise FeaturePlanError(
                f"features '{holder[0]}:{holder[1]}' and '{view}:{feature}' have the same 32-bit "
                f"field name in the store, so {what} would read one for the "
                "other; rename one"
            )


def _by_name(named: tuple[frozenset[str], str, str]) -> tuple[str, str]:
    return named[1:]


def _group(
    index: int,
    signature: tuple[tuple[str, str, ValueType], ...],
    project: str,
    positions: Mapping[str, int],
    views: Sequence[PlannedView],
    features: Sequence[PlannedFeature],
) -> KeyGroup:
    own_views = [i for i, view in enumerate(views) if view.group == index]
    own = sorted(
        (i for i, feature in enumerate(features) if feature.group == index),
        key=lambda i: _KIND_ORDER.get(features[i].value_type, len(_KIND_ORDER)),
    )
    objects = sum(features[i].dtype == np.object_ for i in own)
    names = [layout.feature_field(features[i].view, features[i].feature) for i in own]
    times = [layout.time_field(views[i].name) for i in own_views]
    fields = [*names[: len(own) - objects], *times, *names[len(own) - objects :]]
    return KeyGroup(
        join_keys=tuple(positions[name] for _, name, _ in signature),
        base_names=tuple(base for base, _, _ in signature),
        views=tuple(own_views),
        features=tuple(own),
        object_count=objects,
        fields=tuple(fields),
        key_prefix=layout.key_prefix([base for base, _, _ in signature]),
        key_suffix=project.encode(),
        command_head=b"*%d\r\n$5\r\nHMGET\r\n" % (2 + len(fields)),
        command_tail=b"\r\n" + b"".join(b"$%d\r\n%s\r\n" % (len(name), name) for name in fields),
        cache_max_age_s=min(views[i].cache_max_age_s for i in own_views),
    )


_KIND_ORDER = {
    value_type: i
    for i, value_type in enumerate(
        [
            ValueType.FLOAT,
            ValueType.DOUBLE,
            ValueType.BOOL,
            ValueType.INT32,
            ValueType.INT64,
            ValueType.UNIX_TIMESTAMP,
        ]
    )
}
assert set(_KIND_ORDER) == set(TAGS) - {ValueType.BYTES, ValueType.STRING}
