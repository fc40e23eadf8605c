"""One state of a feature registry: its messages, and what tells it from another state."""

import hashlib
from functools import cached_property
from typing import TYPE_CHECKING, Any

from headrace.features.feast_import import import_feast
from headrace.features.registry_views import stored_views, unservable_state

if TYPE_CHECKING:  # Feast takes seconds to import
    from headrace.features.pinned_registry import PinnedRegistry

_PARTS = (
    *("entities", "feature_views", "stream_feature_views", "on_demand_feature_views"),
    *("label_views", "feature_services"),
)
_ORIGINS = (
    *("batch_source", "stream_source", "source", "source_views"),
    *("user_defined_function", "feature_transformation"),
)
"""Where the rows of a stored view come from: nothing of it is read or run here."""


class RegistryState:
    """
    The registry of one project as it was when it was read.

    Args:
        message: The `feast.core.Registry` message.
        project: The project's name.
        settings: Feast's settings of the registry.

    Attributes:
        version: Equal for states that are served alike. Feast's own changes twice with every
            materialization, which only notes what it writes and when.
    """

    def __init__(self, message: Any, project: str, settings: Any) -> None:
        self.message = message
        self.project = project
        self.settings = settings
        self.version: str = _digest(message, project)

    @property
    def is_empty(self) -> bool:
        """Whether the project has no feature service and no view."""
        services = any(one.spec.project == self.project for one in self.message.feature_services)
        views = [*stored_views(self.message, self.project), *self.message.on_demand_feature_views]
        return not services and all(view.spec.project != self.project for view in views)

    @cached_property
    def online(self) -> "PinnedRegistry":
        """What Feast's client of an online store is to be given."""
        return self._pinned(with_sources=False)

    @cached_property
    def offline(self) -> "PinnedRegistry":
        """What Feast's client of an offline store is to be given."""
        return self._pinned(with_sources=True)

    def _pinned(self, *, with_sources: bool) -> "PinnedRegistry":
        from headrace.features.pinned_registry import PinnedRegistry  # noqa: PLC0415 - seconds

        return PinnedRegistry(self.message, self.project, self.settings, with_sources=with_sources)


def read_registry(store: Any, project: str, settings: Any) -> RegistryState:
    """
    Read the registry of one of Feast's clients anew; it makes no objects of what is in it.

    Args:
        store: The client.
        project: The project's name.
        settings: Feast's settings of the registry.

    Raises:
        Exception: whatever Feast raises.
    """
    store.refresh_registry()
    message = store.registry.proto()
    if settings.registry_type == "sql" and settings.enable_online_feature_view_versioning:
        # Feast 0.67 leaves them out of a SQL registry's message.
        message.feature_view_version_history.records.extend(
            _versions_in_sql(store.registry, project)
        )
    return RegistryState(message, project, settings)


def _versions_in_sql(registry: Any, project: str) -> list[Any]:
    import_feast()
    from feast.infra.registry.sql import feature_view_version_history as table  # noqa: PLC0415
    from feast.protos.feast.core.FeatureViewVersion_pb2 import (  # noqa: PLC0415 - seconds
        FeatureViewVersionRecord,
    )

    with registry.read_engine.connect() as connection:
        rows = connection.execute(table.select().where(table.c.project_id == project)).mappings()
        return [
            FeatureViewVersionRecord(
                feature_view_name=row["feature_view_name"],
                project_id=project,
                version_number=row["version_number"],
                feature_view_type=row["feature_view_type"],
                feature_view_proto=row["feature_view_proto"],
                version_id=row["version_id"],
            )
            for row in rows
        ]


def _digest(message: Any, project: str) -> str:
    """Hash what is served by: not the times, the origins, or whether a view is being written."""
    parts = []
    for name in _PARTS:
        for one in getattr(message, name):
            if one.spec.project == project:
                state = unservable_state(one), getattr(one.meta, "current_version_number", 0)
                # Of an on-demand view they are how it is computed when it is asked for.
                rest = one.spec if name == "on_demand_feature_views" else _without_origins(one.spec)
                spec = rest.SerializeToString(deterministic=True)
                parts.append(repr((name, one.spec.name, state, spec)))
    parts += [
        repr((record.feature_view_name, record.version_number, record.feature_view_proto))
        for record in message.feature_view_version_history.records
        if record.project_id == project
    ]
    return hashlib.sha256("\n".join(sorted(parts)).encode()).hexdigest()[:32]


def _without_origins(spec: Any) -> Any:
    """Return what is served of a spec: Feast writes an origin otherwise while it materializes."""
    known = spec.DESCRIPTOR.fields_by_name
    origins = [name for name in _ORIGINS if name in known]
    if not origins:
        return spec
    rest = type(spec)()
    rest.CopyFrom(spec)
    for name in origins:
        rest.ClearField(name)
    return rest
