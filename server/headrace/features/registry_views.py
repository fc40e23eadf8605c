"""The feature views of a project, as its registry describes them.

Read from the registry's protobuf messages and never from Feast's objects: making one of an
on-demand or stream view runs code that the registry holds.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from headrace.errors import FeaturePlanError, UnknownFeatures
from headrace.features.feast_import import import_feast
from headrace.features.layout import DUMMY_JOIN_KEY
from headrace.features.on_demand_code import OnDemandCode
from headrace.features.on_demand_plan import OnDemandSource
from headrace.features.plan import FeatureSource, ViewSource
from headrace.features.values import ValueType, declared_type

DEFAULT_TAG = "headrace.default"
"""The tag of a Feast `Field` whose text is the value used where the feature is missing."""

CACHE_TAG = "headrace.cache_max_age_s"
"""The tag of a feature view whose text is how long its rows may be served after they were read."""

# Source: feast 0.67 `FeatureView.proto`, FeatureViewState. A view that is written is
# AVAILABLE_ONLINE, those of before there were states are unspecified, and one that
# `feast materialize` is writing anew is MATERIALIZING for as long as that takes, although the
# store has all that it had. Feast's own client refuses that one, unless it is told otherwise. One
# that is written for the first time is in that state, too, and has had no interval yet: they are
# noted when a materialization has succeeded, and outlast a view that is applied anew.
_UNSPECIFIED, _MATERIALIZING, _AVAILABLE_ONLINE = 0, 3, 4
_SERVABLE_STATES = frozenset({_UNSPECIFIED, _MATERIALIZING, _AVAILABLE_ONLINE})


@dataclass(frozen=True, slots=True)
class StoredView:
    """
    A feature view as the store holds it.

    Args:
        name: Under which it is stored.
        join_keys: By base name, the number of the value type; none for a view without entities.
        ttl_s: None is for ever.
        is_written: Whether it is to have values: it is neither disabled nor kept offline.
    """

    name: str
    join_keys: Mapping[str, int]
    ttl_s: float | None
    is_written: bool


def stored_views(registry: Any, project: str) -> list[Any]:
    """Return the messages of a project's views that a store holds, of whichever kind they are."""
    kinds = (registry.feature_views, registry.stream_feature_views, registry.label_views)
    views = [view for kind in kinds for view in kind if view.spec.project == project]
    # These are stored as any other view is: nothing is left to compute when they are read.
    return views + [
        view
        for view in registry.on_demand_feature_views
        if view.spec.project == project and view.spec.write_to_online_store
    ]


def unservable_state(view: Any) -> int:
    """Return the number of the state that keeps a view from being served; 0 if it is served."""
    state = int(_field(view.meta, "state"))
    if state == _MATERIALIZING and not _field(view.meta, "materialization_intervals", default=True):
        return state
    return 0 if state in _SERVABLE_STATES else state


def parse_version(record: Any) -> Any:
    """Return the message of a view as it was, from a record of the registry's version history."""
    import_feast()
    from feast.protos.feast.core import (  # noqa: PLC0415 - seconds to import
        FeatureView_pb2,
        LabelView_pb2,
        OnDemandFeatureView_pb2,
        StreamFeatureView_pb2,
    )

    kinds: dict[str, Any] = {
        "stream_feature_view": StreamFeatureView_pb2.StreamFeatureView,
        "on_demand_feature_view": OnDemandFeatureView_pb2.OnDemandFeatureView,
        "label_view": LabelView_pb2.LabelView,
    }
    kind = kinds.get(record.feature_view_type, FeatureView_pb2.FeatureView)
    return kind.FromString(record.feature_view_proto)


class RegistryViews:
    """
    Every feature view of a project.

    Args:
        registry: The `feast.core.Registry` message.
        project: The project's name.
        settings: Feast's settings of the registry.
        code: That of on-demand views, by their names.
    """

    def __init__(
        self, registry: Any, project: str, settings: Any, code: Mapping[str, OnDemandCode]
    ) -> None:
        self._project = project
        self._code = code
        self.has_versions = bool(settings.enable_online_feature_view_versioning)
        """Whether the store holds each version under a name of its own."""
        self._views = {view.spec.name: view for view in stored_views(registry, project)}
        self._on_demand = {
            message.spec.name: message
            for message in registry.on_demand_feature_views
            if message.spec.project == project
        }
        self._history = {
            (record.feature_view_name, record.version_number): parse_version(record)
            for record in registry.feature_view_version_history.records
            if record.project_id == project and record.feature_view_name in self._views
        }
        self._knows_versions = bool(self._history) or settings.registry_type in {"file", "sql"}
        self._holders = self._find_holders()

    def projected(self, service: str, projection: Any) -> ViewSource | OnDemandSource:
        """Return a view as a feature service projects it; errors as `source`."""
        try:
            return self._projected_source(projection)
        except FeaturePlanError as error:
            raise FeaturePlanError(f"feature service '{service}': {error}") from None

    def _projected_source(self, projection: Any) -> ViewSource | OnDemandSource:
        name = projection.feature_view_name
        return self.source(
            name,
            projection.version_tag if projection.HasField("version_tag") else None,
            label=projection.feature_view_name_alias or name,
            join_key_map=projection.join_key_map,
            columns=projection.feature_columns,
        )

    def _features(self, columns: Iterable[Any], view: str) -> tuple[FeatureSource, ...]:
        return tuple(
            FeatureSource(column.name, self._value_type(column, view), column.tags.get(DEFAULT_TAG))
            for column in columns
        )

    def source(
        self,
        name: str,
        version: int | None,
        *,
        label: str,
        join_key_map: Mapping[str, str] = MappingProxyType({}),
        columns: Sequence[Any] | None = None,
    ) -> ViewSource | OnDemandSource:
        """
        Return a view with some of its columns; with all of them when None are named.

        Args:
            name: The view's.
            version: Which it is pinned to, if it is.
            label: Its name in full feature names.
            join_key_map: Names of request columns by join key, where they differ.
            columns: The `Feature` messages of those that are selected.

        Raises:
            UnknownFeatures: there is no such view.
            FeaturePlanError: it cannot be served.
        """
        view = self._views.get(name)
        if view is None and name in self._on_demand:
            return self._on_demand_source(name, version, label=label, columns=columns)
        if view is None:
            raise UnknownFeatures(f"'{name}' is no feature view of project '{self._project}'")
        if version is not None:
            view = self._snapshot(view, version)
        # Of a version it is the snapshot's state that counts, as it is to Feast.
        if _field(view.spec, "disabled"):
            raise FeaturePlanError(f"feature view '{name}' is disabled")
        if unservable_state(view):
            raise FeaturePlanError(
                f"feature view '{name}' is not available online yet: its state is "
                f"{_enum_name(view.meta, 'state')}"
            )
        stored_name = self._stored_name(view, version)
        for rival in self._holders[_key_names(view), stored_name]:
            if rival != name:
                raise FeaturePlanError(
                    f"feature views '{name}' and '{rival}' are both stored as '{stored_name}', "
                    "so that one would be read for the other; rename one"
                )
        return ViewSource(
            name=stored_name,
            join_keys=tuple(
                (
                    column.name,
                    join_key_map.get(column.name, column.name),
                    self._value_type(column, name),
                )
                for column in _join_keys(view)
            ),
            features=self._features(view.spec.features if columns is None else columns, name),
            ttl_s=_ttl_s(view),
            # Source: feast 0.67 `FeatureViewProjection.name_to_use`.
            label=label if version is None else f"{label}@v{version}",
            version=_number(view) if version is None else version,
            cache_max_age_s=view.spec.tags.get(CACHE_TAG),
            registered=name,
        )

    def _on_demand_source(
        self, name: str, version: int | None, *, label: str, columns: Sequence[Any] | None
    ) -> OnDemandSource:
        spec = self._on_demand[name].spec
        what = f"on-demand feature view '{name}'"
        if spec.disabled:
            raise FeaturePlanError(f"{what} is disabled")
        if version is not None:
            raise FeaturePlanError(f"{what} is pinned to a version, which is not supported")
        if spec.aggregations:
            raise FeaturePlanError(f"{what} has aggregations, which is not supported")
        code = self._code.get(name)
        if code is None:
            raise FeaturePlanError(
                f"'{name}' is an on-demand feature view; Headrace runs no code from a registry: "
                "name the module that defines it in --on-demand-modules, compute it in the model "
                "or write it to a view"
            )
        code.check(spec.mode, spec.feature_transformation.user_defined_function.body_text)
        inputs: list[ViewSource] = []
        data: list[tuple[str, ValueType]] = []
        for source in spec.sources.values():
            if source.HasField("request_data_source"):
                schema = source.request_data_source.request_data_options.schema
                data += [(column.name, self._value_type(column, name)) for column in schema]
                continue
            if source.HasField("feature_view"):
                view = source.feature_view.spec.name
                own = self.source(view, None, label=view)
            else:
                own = self._projected_source(source.feature_view_projection)
            if not isinstance(own, ViewSource):
                raise FeaturePlanError(f"{what} is computed from another one")
            inputs.append(own)
        return OnDemandSource(
            name=name,
            label=label,
            features=self._features(spec.features if columns is None else columns, name),
            inputs=tuple(inputs),
            data=tuple(data),
            code=code,
        )

    def _snapshot(self, view: Any, version: int) -> Any:
        """Return the view as it was at the version that a projection is pinned to."""
        name = view.spec.name
        if not self.has_versions:
            raise FeaturePlanError(
                f"feature view '{name}' is pinned to version {version}, but the registry has "
                "enable_online_feature_view_versioning off"
            )
        snapshot = self._history.get((name, version))
        if snapshot is None and version == _number(view):
            return view
        if snapshot is None and not self._knows_versions:
            raise FeaturePlanError(
                f"feature view '{name}' is pinned to version {version}, and this kind of registry "
                "does not tell of any but the latest"
            )
        if snapshot is None:
            raise FeaturePlanError(f"feature view '{name}' has no version {version}")
        if not _field(snapshot.spec, "write_to_online_store", default=True):
            raise FeaturePlanError(f"feature view '{name}' was not stored at version {version}")
        return snapshot

    def _stored_name(self, view: Any, version: int | None) -> str:
        # Source: feast 0.67 `infra/online_stores/helpers.py`, `compute_versioned_name`.
        number = _number(view) if version is None else version
        suffix = f"_v{number}" if self.has_versions and number > 0 else ""
        return f"{view.spec.name}{suffix}"

    def _value_type(self, column: Any, view: str) -> ValueType:
        try:
            return declared_type(column.value_type)
        except ValueError:
            import_feast()
            from feast.value_type import ValueType as FeastValueType  # noqa: PLC0415 - seconds to import

            raise FeaturePlanError(
                f"'{column.name}' of feature view '{view}' is a "
                f"{FeastValueType(column.value_type).name}, which is not supported"
            ) from None

    def _states(self) -> Iterator[tuple[str, Any]]:
        """Yield (name in the store, message) of every view, its old versions included."""
        for view in self._views.values():
            yield self._stored_name(view, None), view
        for (_, version), view in self._history.items():
            yield self._stored_name(view, version), view

    def _find_holders(self) -> dict[tuple[frozenset[str], str], set[str]]:
        holders: dict[tuple[frozenset[str], str], set[str]] = {}
        for stored_name, view in self._states():
            holders.setdefault((_key_names(view), stored_name), set()).add(view.spec.name)
        return holders

    def shared_names(self) -> Iterator[tuple[str, list[str]]]:
        """Yield (name in the store, views) where several views of one entity have that name."""
        for (_, stored_name), names in self._holders.items():
            if len(names) > 1:
                yield stored_name, sorted(names)

    def stored(self) -> Iterator[tuple[tuple[str, ...], str, str]]:
        """Yield (join keys, name in the store, feature) of all that the store may hold."""
        for stored_name, view in self._states():
            keys = tuple(column.name for column in _join_keys(view))
            for column in view.spec.features:
                yield keys, stored_name, column.name

    def stored_views(self) -> list[StoredView]:
        """Return every view that the store may hold, in its current version, by name."""
        return [
            StoredView(
                self._stored_name(view, None),
                {column.name: column.value_type for column in _join_keys(view)},
                _ttl_s(view),
                not getattr(view.spec, "disabled", False) and getattr(view.spec, "online", True),
            )
            for _, view in sorted(self._views.items())
        ]

    def feature_names(self) -> dict[str, frozenset[str]]:
        """Return the names of the features that an offline store may have, by view."""
        return {
            name: frozenset(column.name for column in view.spec.features)
            for name, view in self._views.items()
            if name not in self._on_demand
        }


def _field(message: Any, name: str, *, default: Any = 0) -> Any:
    """Return a field that views of some kinds do not have."""
    return getattr(message, name) if name in message.DESCRIPTOR.fields_by_name else default


def _number(view: Any) -> int:
    return int(_field(view.meta, "current_version_number"))


def _enum_name(message: Any, field: str) -> str:
    values = message.DESCRIPTOR.fields_by_name[field].enum_type.values_by_number
    number = getattr(message, field)
    return values[number].name if number in values else str(number)


def _ttl_s(view: Any) -> float | None:
    if "ttl" not in view.spec.DESCRIPTOR.fields_by_name:  # a stored on-demand view
        return None
    return view.spec.ttl.ToTimedelta().total_seconds() or None  # Feast's 0 is for ever


def _key_names(view: Any) -> frozenset[str]:
    return frozenset(column.name for column in _join_keys(view))


def _join_keys(view: Any) -> list[Any]:
    return [column for column in view.spec.entity_columns if column.name != DUMMY_JOIN_KEY]
