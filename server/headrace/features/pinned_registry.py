"""One state of a feature registry as Feast's own clients take it, without the code that it holds.

Feast makes its objects of a registry's messages, and runs what they hold while it does: pickled
functions (`dill.loads`), their text (`exec`). So its clients are given messages made anew of what
reading takes, field by field. What is not copied cannot run.

Importing this imports Feast, which takes seconds.

Source: feast 0.67 `feature_view.py`, `stream_feature_view.py`, `on_demand_feature_view.py` and
`feature_service.py`, each `from_proto`; `transformation/udf_rehydrate.py`.
"""

import itertools
import uuid
from datetime import UTC, datetime, timedelta
from typing import Any

from feast.base_feature_view import BaseFeatureView
from feast.entity import Entity
from feast.infra.registry.registry import Registry
from feast.protos.feast.core.FeatureView_pb2 import FeatureView as FeatureViewProto
from feast.protos.feast.core.Registry_pb2 import Registry as RegistryProto

from headrace.features.registry_views import parse_version, stored_views

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_NUMBERS = itertools.count()


class PinnedRegistry(Registry):  # type: ignore[misc]
    """
    A registry that stays as it is: nothing is read again, and nothing can be written.

    It has the entities, the services and every stored view of one project, old versions included;
    on-demand views are not in it unless they are stored. All views are plain feature views.

    Args:
        message: The `feast.core.Registry` message.
        project: The project's name.
        settings: Feast's settings of the registry.
        with_sources: Whether views keep their batch sources, which only an offline store reads.
            Feast imports the classes that they name, which are of installed packages.
    """

    def __init__(self, message: Any, project: str, settings: Any, *, with_sources: bool) -> None:
        super().__init__(project, None, None)
        self.enable_online_versioning = bool(settings.enable_online_feature_view_versioning)
        # What state a view is in was looked at when the plan was compiled (`registry_views`).
        self.serve_features_while_materializing = True
        self.cached_registry_proto = _without_code(message, project, with_sources=with_sources)
        self.cached_registry_proto_ttl = timedelta(0)  # for ever
        # Feast keeps what it looked up in the last registry, which it tells from others by this
        # time alone: no two may have the same.
        self.cached_registry_proto_created = _EPOCH + timedelta(microseconds=next(_NUMBERS))

    def refresh(self, project: str | None = None) -> None:
        """Do nothing."""

    def _get_registry_proto(self, project: str | None, allow_cache: bool = False) -> Any:  # noqa: ARG002, FBT001, FBT002 - Feast's signature
        return self.cached_registry_proto

    # Feast's own of these share one cache between all registries, which is not safe for threads.

    def get_any_feature_view(
        self,
        name: str,
        project: str,
        allow_cache: bool = False,  # noqa: ARG002, FBT001, FBT002 - Feast's signature
    ) -> BaseFeatureView:
        """Make the view of that name."""
        return self.get_feature_view(name, project)

    def list_entities(
        self,
        project: str,  # noqa: ARG002 - there is but one
        allow_cache: bool = False,  # noqa: ARG002, FBT001, FBT002 - Feast's signature
        tags: dict[str, str] | None = None,  # noqa: ARG002 - nobody asks by tags
    ) -> list[Entity]:
        """Make all the entities."""
        return [Entity.from_proto(entity) for entity in self.cached_registry_proto.entities]


def _without_code(message: Any, project: str, *, with_sources: bool) -> Any:
    made = RegistryProto(
        registry_schema_version=message.registry_schema_version,
        version_id=str(uuid.uuid4()),  # Feast tells registries from each other by it
    )
    made.last_updated.CopyFrom(message.last_updated)
    made.entities.extend(one for one in message.entities if one.spec.project == project)
    made.feature_views.extend(
        _plain(view, with_source=with_sources) for view in stored_views(message, project)
    )
    for service in message.feature_services:
        if service.spec.project == project:
            own = made.feature_services.add()
            own.CopyFrom(service)
            own.spec.ClearField("logging_config")  # it names a class to import
            for projection in own.spec.features:  # so may its source; views have their own
                projection.ClearField("batch_source")
                projection.ClearField("stream_source")
    for record in message.feature_view_version_history.records:
        if record.project_id == project:
            old = made.feature_view_version_history.records.add()
            old.CopyFrom(record)
            old.feature_view_type = "feature_view"
            view = parse_version(record)
            old.feature_view_proto = _plain(view, with_source=with_sources).SerializeToString()
    return made


def _plain(view: Any, *, with_source: bool) -> Any:
    """Make a plain feature view of a view of any kind."""
    made, spec = FeatureViewProto(), view.spec
    made.spec.name, made.spec.project = spec.name, spec.project
    made.spec.entities.extend(spec.entities)
    made.spec.features.extend(spec.features)
    made.spec.entity_columns.extend(spec.entity_columns)
    made.spec.tags.update(spec.tags)
    made.spec.online = True
    known = spec.DESCRIPTOR.fields_by_name
    if "ttl" in known:
        made.spec.ttl.CopyFrom(spec.ttl)
    if "disabled" in known:
        made.spec.disabled = spec.disabled
    for name in ("current_version_number", "version_id", "state"):
        if name in view.meta.DESCRIPTOR.fields_by_name:
            setattr(made.meta, name, getattr(view.meta, name))
    if with_source:
        for name in ("batch_source", "source"):  # a label view's has the second name
            if name in known and spec.HasField(name):
                made.spec.batch_source.CopyFrom(getattr(spec, name))
    return made
