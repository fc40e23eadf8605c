"""Open a Feast feature repository and compile its feature services.

Plans are compiled from the registry's protobuf messages and never from Feast's objects: making one
of an on-demand or stream view unpickles code that the registry holds.
"""

import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from headrace.errors import FeaturePlanError, StartupError, UnknownFeatures
from headrace.features.feast_store import FeastStore
from headrace.features.layout import DUMMY_JOIN_KEY, feature_field
from headrace.features.plan import (
    FeaturePlan,
    FeatureSource,
    ViewSource,
    compile_plan,
)
from headrace.features.redis_store import RedisStore
from headrace.features.redis_topologies import open_redis
from headrace.features.store import OnlineStore
from headrace.features.values import ValueType

if TYPE_CHECKING:  # pandas takes a while to import, and a server does without
    from headrace.features.offline import FeastOffline

DEFAULT_TAG = "headrace.default"
CACHE_TAG = "headrace.cache_max_age_s"
"""The tag of a Feast `Field` whose text is the value used where the feature is missing."""

# Source: feast 0.67 `FeatureView.proto`, FeatureViewState. A view that is written is
# AVAILABLE_ONLINE, and those of before there were states are unspecified.
_UNSPECIFIED, _MATERIALIZING, _AVAILABLE_ONLINE = 0, 3, 4

_REFERENCE = re.compile(
    r"(?P<view>[^:@]+)(?:@(?:v(?P<version>\d{1,9})|latest)?)?:(?P<feature>.+)", re.IGNORECASE
)

_CONFIG_FILE = "feature_store.yaml"
_KEY_VERSION = 3


def open_feature_repo(path: Path) -> "FeatureRepo":
    """
    Open an applied feature repository.

    Importing Feast takes seconds, so this does.

    Args:
        path: The folder with the `feature_store.yaml`.

    Raises:
        StartupError: there is none, Feast refuses it, or `feast apply` has not been run.
    """
    config_file = path / _CONFIG_FILE
    if not config_file.is_file():
        raise StartupError(f"feature repository {path} has no {_CONFIG_FILE}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Feast's own, at import
        from feast import FeatureStore  # noqa: PLC0415 - seconds, and not everyone needs it
        from feast.repo_config import load_repo_config  # noqa: PLC0415
    try:
        config = load_repo_config(path, config_file)
        missing = _missing_registry(path, config.registry)
        if missing is None:
            store = FeatureStore(repo_path=str(path))
            registry = store.registry.proto()
    except Exception as error:
        raise StartupError(
            f"feature repository {path} cannot be opened: {_first_line(error)}"
        ) from error
    if missing is not None:
        raise StartupError(
            f"feature repository {path} has no registry {missing}; run `feast apply` in it"
        )
    _refuse_empty(registry, config.project, path)
    return FeatureRepo(store, registry, path)


def reopen(repo: "FeatureRepo") -> "FeatureRepo":
    """
    Read a repository's registry again; its `feature_store.yaml` stays as it was.

    Raises:
        StartupError: it cannot be read, or holds no feature service of the project any more.
    """
    try:
        return repo.read_again()
    except StartupError:
        raise
    except Exception as error:
        raise StartupError(f"the registry cannot be read: {_first_line(error)}") from error


@dataclass(frozen=True, slots=True)
class StoredView:
    """
    A feature view as the store holds it.

    Args:
        name: Under which it is stored.
        join_keys: Base names; none for a view without entities.
        ttl_s: None is for ever.
    """

    name: str
    join_keys: frozenset[str]
    ttl_s: float | None


class FeatureRepo:
    """
    A feature repository as its registry was when it was read.

    Args:
        store: Feast's client.
        registry: The `feast.core.Registry` message.
        path: The repository's folder.
    """

    def __init__(self, store: Any, registry: Any, path: Path) -> None:
        self._store = store
        self._path = path
        self._config = store.config
        project = store.config.project
        self.project: str = project
        self.version: str = registry.version_id or registry.last_updated.ToJsonString()
        """Which state of the registry this is."""
        self._services = {
            message.spec.name: message
            for message in registry.feature_services
            if message.spec.project == project
        }
        self._views = {
            message.spec.name: message
            for messages in (registry.feature_views, registry.stream_feature_views)
            for message in messages
            if message.spec.project == project
        }
        self._on_demand = {
            message.spec.name
            for message in registry.on_demand_feature_views
            if message.spec.project == project
        }
        self._history = [
            record
            for record in registry.feature_view_version_history.records
            if record.project_id == project
        ]
        self._servable_states = {_UNSPECIFIED, _AVAILABLE_ONLINE}
        if getattr(store.config.registry, "serve_features_while_materializing", False):
            self._servable_states.add(_MATERIALIZING)
        self.entity_join_keys: dict[str, str] = {
            message.spec.name: message.spec.join_key
            for message in registry.entities
            if message.spec.project == project
        }
        """Join keys by entity name: Feast takes either from its callers."""
        self._has_versions = bool(store.config.registry.enable_online_feature_view_versioning)

    @property
    def registry_file(self) -> Path | None:
        """The registry's file; None if it is not in one."""
        settings = self._config.registry
        if settings.registry_type != "file" or "://" in str(settings.path):
            return None
        return self._path / str(settings.path)

    @property
    def registry_ttl_s(self) -> float:
        """How long Feast's own clients may use a registry that they have read."""
        return float(self._config.registry.cache_ttl_seconds)

    def read_again(self) -> "FeatureRepo":
        """Read the registry anew; see `reopen`."""
        self._store.refresh_registry()
        registry = self._store.registry.proto()
        _refuse_empty(registry, self.project, self._path)
        return FeatureRepo(self._store, registry, self._path)

    def services(self) -> tuple[str, ...]:
        """Return the names of the project's feature services, sorted."""
        return tuple(sorted(self._services))

    def compile(self, service: str, *, full_feature_names: bool = False) -> FeaturePlan:
        """
        Compile a feature service.

        Raises:
            UnknownFeatures: there is none of that name.
            FeaturePlanError: it has something that cannot be served: an on-demand view, a
                precomputed vector, a view that is disabled or not available yet, a type of value
                that is not known here, or what `compile_plan` refuses.
        """
        message = self._services.get(service)
        if message is None:
            raise UnknownFeatures(
                f"there is no feature service '{service}'; there is {', '.join(self.services())}"
            )
        if message.spec.precompute_online:
            raise FeaturePlanError(
                f"feature service '{service}' has precompute_online, which is not supported; "
                "Headrace reads its views in one round trip without it"
            )
        sources = [self._projected(service, projection) for projection in message.spec.features]
        return compile_plan(
            service,
            self.project,
            self.version,
            sources,
            self._stored(),
            full_feature_names=full_feature_names,
        )

    def compile_references(
        self, references: Sequence[str], *, full_feature_names: bool = False
    ) -> FeaturePlan:
        """
        Compile a list of features.

        Args:
            references: `view:feature`, `view@v2:feature` or `view@latest:feature` each.
            full_feature_names: Name the results `view__feature` instead of `feature`.

        Raises:
            UnknownFeatures: there is no such view, or it has no such feature.
            FeaturePlanError: a reference is not one or is there twice; else as `compile`.
        """
        if repeated := next((one for one, n in Counter(references).items() if n > 1), None):
            raise FeaturePlanError(f"feature '{repeated}' is there twice")
        sources: list[ViewSource] = []
        views: dict[tuple[str, int | None], ViewSource] = {}
        for reference in references:
            name, version, feature = _parse_reference(reference)
            view = views.get((name, version))
            if view is None:
                view = views[name, version] = self._source(name, version, label=name)
            column = next((one for one in view.features if one.name == feature), None)
            if column is None:
                raise UnknownFeatures(f"feature view '{name}' has no feature '{feature}'")
            # One source per feature keeps the order that was asked for; the views are merged.
            sources.append(replace(view, features=(column,)))
        return compile_plan(
            "",
            self.project,
            self.version,
            sources,
            self._stored(),
            references=references,
            full_feature_names=full_feature_names,
        )

    def online_store(self, *, cache_rows: int = 0) -> OnlineStore:
        """
        Make the client of the repository's online store.

        Args:
            cache_rows: As `RedisStore` takes it; of no use with other stores.

        Raises:
            StartupError: it is a kind of Redis that is not supported, or badly configured.
        """
        settings = self._config.online_store
        if getattr(settings, "type", None) != "redis":
            return FeastStore(self._store)
        if self._config.entity_key_serialization_version != _KEY_VERSION:
            raise StartupError(
                "entity_key_serialization_version of the feature repository is "
                f"{self._config.entity_key_serialization_version}; only {_KEY_VERSION} is supported"
            )
        kind = getattr(settings.redis_type, "value", settings.redis_type)
        servers = open_redis(kind, settings.connection_string, settings.sentinel_master)
        return RedisStore(servers, cache_rows=cache_rows)

    def redis_client(self) -> Any:
        """
        Make redis-py's client of the online store, whatever its topology; None if it is no Redis.

        For looking at the store, not for serving from it.
        """
        settings = self._config.online_store
        if getattr(settings, "type", None) != "redis":
            return None
        from feast.infra.online_stores.redis import RedisOnlineStore  # noqa: PLC0415 as above

        # Feast's own way of connecting, so that what is looked at is where it writes.
        return RedisOnlineStore()._get_client(settings)  # noqa: SLF001

    def another_store(self) -> Any:
        """Make another of Feast's clients of this repository, for a thread of its own."""
        from feast import FeatureStore  # noqa: PLC0415 as above

        return FeatureStore(repo_path=str(self._path))

    def stored_views(self) -> list["StoredView"]:
        """Return every view that the store may hold, in its current version, by name."""
        return [
            StoredView(
                self._stored_name(view, None),
                frozenset(column.name for column in _join_keys(view)),
                view.spec.ttl.ToTimedelta().total_seconds() or None,
            )
            for _, view in sorted(self._views.items())
        ]

    def collisions(self) -> list[str]:
        """Name the pairs of features that the store cannot tell apart; Feast does not look."""
        holders: dict[tuple[frozenset[str], bytes], str] = {}
        found = []
        for keys, view, feature in self._stored():
            name = f"{view}:{feature}"
            holder = holders.setdefault((frozenset(keys), feature_field(view, feature)), name)
            if holder != name:
                found.append(f"features '{holder}' and '{name}' have the same field name")
        return found

    def offline_features(self) -> "FeastOffline":
        """Make the client of the repository's offline store, for slow work beside the requests."""
        from headrace.features.offline import FeastOffline  # noqa: PLC0415 see above

        features = {
            name: frozenset(column.name for column in view.spec.features)
            for name, view in self._views.items()
        }
        return FeastOffline(self._store, has_versions=self._has_versions, views=features)

    def _projected(self, service: str, projection: Any) -> ViewSource:
        """Return a view as a feature service projects it."""
        name = projection.feature_view_name
        version = projection.version_tag if projection.HasField("version_tag") else None
        try:
            return self._source(
                name,
                version,
                label=projection.feature_view_name_alias or name,
                join_key_map=projection.join_key_map,
                columns=projection.feature_columns,
            )
        except FeaturePlanError as error:
            raise FeaturePlanError(f"feature service '{service}': {error}") from None

    def _source(
        self,
        name: str,
        version: int | None,
        *,
        label: str,
        join_key_map: Mapping[str, str] = MappingProxyType({}),
        columns: Sequence[Any] | None = None,
    ) -> ViewSource:
        """Return a view with some of its columns; with all of them when None are named."""
        if name in self._on_demand:
            raise FeaturePlanError(
                f"'{name}' is an on-demand feature view; Headrace runs no code from a registry: "
                "compute it in the model or write it to a view"
            )
        view = self._views.get(name)
        if view is None:
            raise UnknownFeatures(f"'{name}' is no feature view of project '{self.project}'")
        if view.spec.disabled:
            raise FeaturePlanError(f"feature view '{name}' is disabled")
        if view.meta.state not in self._servable_states:
            raise FeaturePlanError(
                f"feature view '{name}' is not available online yet: its state is "
                f"{_enum_name(view.meta, 'state')}"
            )
        if version is not None:
            view = self._snapshot(view, version)
        return ViewSource(
            name=self._stored_name(view, version),
            join_keys=tuple(
                (
                    column.name,
                    join_key_map.get(column.name, column.name),
                    self._value_type(column, name),
                )
                for column in _join_keys(view)
            ),
            features=tuple(
                FeatureSource(
                    column.name, self._value_type(column, name), column.tags.get(DEFAULT_TAG)
                )
                for column in (view.spec.features if columns is None else columns)
            ),
            # Feast's 0 is for ever.
            ttl_s=view.spec.ttl.ToTimedelta().total_seconds() or None,
            # Source: feast 0.67 `FeatureViewProjection.name_to_use`.
            label=label if version is None else f"{label}@v{version}",
            version=view.meta.current_version_number if version is None else version,
            cache_max_age_s=view.spec.tags.get(CACHE_TAG),
        )

    def _snapshot(self, view: Any, version: int) -> Any:
        """Return the view as it was at the version that a projection is pinned to."""
        name = view.spec.name
        if not self._has_versions:
            raise FeaturePlanError(
                f"feature view '{name}' is pinned to version {version}, but the registry has "
                "enable_online_feature_view_versioning off"
            )
        for record in self._history:
            if record.feature_view_name == name and record.version_number == version:
                return type(view).FromString(record.feature_view_proto)
        if version == view.meta.current_version_number:
            return view
        raise FeaturePlanError(f"feature view '{name}' has no version {version}")

    def _stored_name(self, view: Any, version: int | None) -> str:
        # Source: feast 0.67 `infra/online_stores/helpers.py`, `compute_versioned_name`.
        number = view.meta.current_version_number if version is None else version
        suffix = f"_v{number}" if self._has_versions and number > 0 else ""
        return f"{view.spec.name}{suffix}"

    def _value_type(self, column: Any, view: str) -> ValueType:
        try:
            return ValueType(column.value_type)
        except ValueError:
            from feast.value_type import ValueType as FeastValueType  # noqa: PLC0415 - as above

            raise FeaturePlanError(
                f"'{column.name}' of feature view '{view}' is a "
                f"{FeastValueType(column.value_type).name}, which is not supported"
            ) from None

    def _stored(self) -> Iterator[tuple[tuple[str, ...], str, str]]:
        for view in self._views.values():
            keys = tuple(column.name for column in _join_keys(view))
            for column in view.spec.features:
                yield keys, self._stored_name(view, None), column.name


def _parse_reference(reference: str) -> tuple[str, int | None, str]:
    """
    Read `view[@version]:feature`.

    Source: feast 0.67 `utils._parse_feature_ref`; `@latest` and a bare `@` pin nothing.
    """
    match = _REFERENCE.fullmatch(reference)
    if match is None:
        raise FeaturePlanError(f"'{reference}' is no feature; expected view:feature")
    version = match["version"]
    return match["view"], None if version is None else int(version), match["feature"]


def _enum_name(message: Any, field: str) -> str:
    values = message.DESCRIPTOR.fields_by_name[field].enum_type.values_by_number
    number = getattr(message, field)
    return values[number].name if number in values else str(number)


def _refuse_empty(registry: Any, project: str, path: Path) -> None:
    if all(service.spec.project != project for service in registry.feature_services):
        raise StartupError(
            f"feature repository {path} has no feature service in project '{project}'; "
            "define one and run `feast apply` in it"
        )


def _missing_registry(path: Path, settings: Any) -> str | None:
    """Return the registry file that is not there. Feast would write an empty one instead."""
    if settings.registry_type != "file" or "://" in str(settings.path):
        return None
    return None if (path / settings.path).exists() else str(settings.path)


def _join_keys(view: Any) -> list[Any]:
    return [column for column in view.spec.entity_columns if column.name != DUMMY_JOIN_KEY]


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
