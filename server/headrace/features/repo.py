"""Open a Feast feature repository and compile its feature services.

Plans are compiled from the registry's protobuf messages and never from Feast's objects: making one
of an on-demand or stream view unpickles code that the registry holds.
"""

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headrace.errors import ModelLoadError, StartupError
from headrace.features.feast_store import FeastStore
from headrace.features.layout import DUMMY_JOIN_KEY
from headrace.features.plan import (
    FeaturePlan,
    FeatureSource,
    ViewSource,
    compile_plan,
)
from headrace.features.redis_connection import RedisOptions
from headrace.features.redis_store import RedisStore
from headrace.features.store import OnlineStore
from headrace.features.values import ValueType

if TYPE_CHECKING:  # pandas takes a while to import, and a server does without
    from headrace.features.offline import FeastOffline

DEFAULT_TAG = "headrace.default"
"""The tag of a Feast `Field` whose text is the value used where the feature is missing."""

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
    if all(service.spec.project != config.project for service in registry.feature_services):
        raise StartupError(
            f"feature repository {path} has no feature service in project '{config.project}'; "
            "define one and run `feast apply` in it"
        )
    return FeatureRepo(store, registry)


class FeatureRepo:
    """
    A feature repository as its registry was when it was opened. The registry is not read again.

    Args:
        store: Feast's client.
        registry: The `feast.core.Registry` message.
    """

    def __init__(self, store: Any, registry: Any) -> None:
        self._store = store
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
        self._has_versions = bool(store.config.registry.enable_online_feature_view_versioning)

    def services(self) -> tuple[str, ...]:
        """Return the names of the project's feature services, sorted."""
        return tuple(sorted(self._services))

    def compile(self, service: str) -> FeaturePlan:
        """
        Compile a feature service.

        Raises:
            ModelLoadError: there is none of that name, or it has something that cannot be served:
                an on-demand view, a precomputed vector, a disabled view, a type of value that is
                not known here, or what `compile_plan` refuses.
        """
        message = self._services.get(service)
        if message is None:
            raise ModelLoadError(
                f"there is no feature service '{service}'; there is {', '.join(self.services())}"
            )
        if message.spec.precompute_online:
            raise ModelLoadError(
                f"feature service '{service}' has precompute_online, which is not supported; "
                "Headrace reads its views in one round trip without it"
            )
        sources = [self._source(service, projection) for projection in message.spec.features]
        return compile_plan(service, self.project, self.version, sources, self._stored())

    def online_store(self) -> OnlineStore:
        """
        Make the client of the repository's online store.

        Raises:
            StartupError: it is a kind of Redis that is not supported, or badly configured.
        """
        settings = self._config.online_store
        if getattr(settings, "type", None) != "redis":
            return FeastStore(self._store)
        kind = getattr(settings.redis_type, "value", settings.redis_type)
        if kind != "redis":
            raise StartupError(
                f"online store of redis_type {kind} is not supported yet; use a standalone server"
            )
        if self._config.entity_key_serialization_version != _KEY_VERSION:
            raise StartupError(
                "entity_key_serialization_version of the feature repository is "
                f"{self._config.entity_key_serialization_version}; only {_KEY_VERSION} is supported"
            )
        return RedisStore(RedisOptions.parse(settings.connection_string))

    def offline_features(self) -> "FeastOffline":
        """Make the client of the repository's offline store, for slow work beside the requests."""
        from headrace.features.offline import FeastOffline  # noqa: PLC0415 see above

        features = {
            name: frozenset(column.name for column in view.spec.features)
            for name, view in self._views.items()
        }
        return FeastOffline(self._store, has_versions=self._has_versions, views=features)

    def _source(self, service: str, projection: Any) -> ViewSource:
        name = projection.feature_view_name
        if name in self._on_demand:
            raise ModelLoadError(
                f"feature service '{service}' has the on-demand feature view '{name}'; Headrace "
                "runs no code from a registry: compute it in the model or write it to a view"
            )
        view = self._views.get(name)
        if view is None:
            raise ModelLoadError(
                f"feature service '{service}' has '{name}', which is no feature view of project "
                f"'{self.project}'"
            )
        if view.spec.disabled:
            raise ModelLoadError(f"feature view '{name}' of service '{service}' is disabled")
        version = projection.version_tag if projection.HasField("version_tag") else None
        if version is not None:
            view = self._snapshot(view, version)
        return ViewSource(
            name=self._stored_name(view, version),
            join_keys=tuple(
                (
                    column.name,
                    projection.join_key_map.get(column.name, column.name),
                    self._value_type(column, name),
                )
                for column in _join_keys(view)
            ),
            features=tuple(
                FeatureSource(
                    column.name, self._value_type(column, name), column.tags.get(DEFAULT_TAG)
                )
                for column in projection.feature_columns
            ),
            # Feast's 0 is for ever.
            ttl_s=view.spec.ttl.ToTimedelta().total_seconds() or None,
        )

    def _snapshot(self, view: Any, version: int) -> Any:
        """Return the view as it was at the version that a projection is pinned to."""
        name = view.spec.name
        if not self._has_versions:
            raise ModelLoadError(
                f"feature view '{name}' is pinned to version {version}, but the registry has "
                "enable_online_feature_view_versioning off"
            )
        for record in self._history:
            if record.feature_view_name == name and record.version_number == version:
                return type(view).FromString(record.feature_view_proto)
        if version == view.meta.current_version_number:
            return view
        raise ModelLoadError(f"feature view '{name}' has no version {version}")

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

            raise ModelLoadError(
                f"'{column.name}' of feature view '{view}' is a "
                f"{FeastValueType(column.value_type).name}, which is not supported"
            ) from None

    def _stored(self) -> Iterator[tuple[tuple[str, ...], str, str]]:
        for view in self._views.values():
            keys = tuple(column.name for column in _join_keys(view))
            for column in view.spec.features:
                yield keys, self._stored_name(view, None), column.name


def _missing_registry(path: Path, settings: Any) -> str | None:
    """Return the registry file that is not there. Feast would write an empty one instead."""
    if settings.registry_type != "file" or "://" in str(settings.path):
        return None
    return None if (path / settings.path).exists() else str(settings.path)


def _join_keys(view: Any) -> list[Any]:
    return [column for column in view.spec.entity_columns if column.name != DUMMY_JOIN_KEY]


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
