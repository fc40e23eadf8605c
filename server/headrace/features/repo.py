"""Open a Feast feature repository and compile its feature services.

Which services there are, how their plans are compiled, where their values are stored.
"""

import re
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headrace.errors import FeaturePlanError, StartupError, UnknownFeatures
from headrace.features.breaker import patience_of
from headrace.features.feast_import import import_feast
from headrace.features.feast_store import FeastStore
from headrace.features.layout import feature_field
from headrace.features.on_demand_code import OnDemandCode, load_on_demand_code
from headrace.features.on_demand_plan import OnDemandSource, compile_on_demand_plan
from headrace.features.on_demand_store import OnDemandStore
from headrace.features.plan import (
    FeaturePlan,
    FeatureSource,
    ViewSource,
    compile_plan,
)
from headrace.features.redis_sentinel import look_for_master
from headrace.features.redis_store import RedisStore
from headrace.features.redis_topologies import open_redis
from headrace.features.registry_state import RegistryState, read_registry
from headrace.features.registry_views import RegistryViews, StoredView
from headrace.features.store import OnlineStore

if TYPE_CHECKING:  # pandas takes a while to import, and a server does without
    from headrace.features.offline import FeastOffline

_REFERENCE = re.compile(
    r"(?P<view>[^:@]+)(?:@(?:v(?P<version>\d{1,9})|latest)?)?:(?P<feature>.+)", re.IGNORECASE
)

SENTINELS_TIMEOUT_S = 1.0
"""They have nothing to do but to answer: who looks at a store waits for them no longer."""

_CONFIG_FILE = "feature_store.yaml"
_KEY_VERSION = 3


def open_feature_repo(path: Path, on_demand_modules: str = "") -> "FeatureRepo":
    """
    Open an applied feature repository.

    Importing Feast takes seconds, so this does.

    Args:
        path: The folder with the `feature_store.yaml`.
        on_demand_modules: Names of modules whose on-demand views may run, separated by commas.

    Raises:
        StartupError: there is none, Feast refuses it, `feast apply` has not been run, or a module
            cannot be used.
    """
    config_file = path / _CONFIG_FILE
    if not config_file.is_file():
        raise StartupError(f"feature repository {path} has no {_CONFIG_FILE}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Feast's own, at import
        import_feast()
        from feast import FeatureStore  # noqa: PLC0415 - seconds, and not everyone needs it
        from feast.repo_config import load_repo_config  # noqa: PLC0415
    try:
        config = load_repo_config(path, config_file)
        missing = _missing_registry(path, config.registry)
        if missing is None:
            store = FeatureStore(repo_path=str(path))
            state = read_registry(store, config.project, config.registry)
    except Exception as error:
        raise StartupError(
            f"feature repository {path} cannot be opened: {_first_line(error)}"
        ) from error
    if missing is not None:
        raise StartupError(
            f"feature repository {path} has no registry {missing}; run `feast apply` in it"
        )
    _refuse_empty(state, path)
    modules = [name.strip() for name in on_demand_modules.split(",") if name.strip()]
    return FeatureRepo(store, state, path, load_on_demand_code(modules, path))


def reopen(repo: "FeatureRepo") -> "FeatureRepo":
    """
    Read a repository's registry again; its `feature_store.yaml` stays as it was.

    Raises:
        StartupError: it cannot be read, or holds nothing of the project any more.
    """
    try:
        return repo.read_again()
    except StartupError:
        raise
    except Exception as error:
        raise StartupError(f"the registry cannot be read: {_first_line(error)}") from error


class FeatureRepo:
    """
    A feature repository as its registry was when it was read.

    Args:
        store: Feast's client.
        state: What was read.
        path: The repository's folder.
        code: That of on-demand views, by their names.
    """

    def __init__(
        self, store: Any, state: RegistryState, path: Path, code: Mapping[str, OnDemandCode]
    ) -> None:
        self._store = store
        self._path = path
        self._code = code
        self._config = store.config
        self._state = state
        registry, project = state.message, state.project
        self.project: str = project
        self.version = state.version
        """Which state of the registry this is."""
        self._services = {
            message.spec.name: message
            for message in registry.feature_services
            if message.spec.project == project
        }
        self.entity_join_keys: dict[str, str] = {
            message.spec.name: message.spec.join_key
            for message in registry.entities
            if message.spec.project == project
        }
        """Join keys by entity name: Feast takes either from its callers."""
        self._views = RegistryViews(registry, project, store.config.registry, code)

    @property
    def _is_redis(self) -> bool:
        return getattr(self._config.online_store, "type", None) == "redis"

    @property
    def registry_file(self) -> Path | None:
        """The registry's file; None if it is not in one."""
        settings = self._config.registry
        if settings.registry_type != "file" or "://" in str(settings.path):
            return None
        return self._path / str(settings.path)

    @property
    def registry_ttl_s(self) -> float:
        """How long Feast's own clients may use a registry that they have read; 0 is for ever."""
        return float(self._config.registry.cache_ttl_seconds or 0)

    def read_again(self) -> "FeatureRepo":
        """Read the registry anew; see `reopen`."""
        state = read_registry(self._store, self.project, self._config.registry)
        _refuse_empty(state, self._path)
        return FeatureRepo(self._store, state, self._path, self._code)

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
            known = f"there is {', '.join(self.services())}" if self._services else "there is none"
            raise UnknownFeatures(f"there is no feature service '{service}'; {known}")
        if message.spec.precompute_online:
            raise FeaturePlanError(
                f"feature service '{service}' has precompute_online, which is not supported; "
                "Headrace reads its views in one round trip without it"
            )
        sources = [
            self._views.projected(service, projection) for projection in message.spec.features
        ]
        return self._compile(service, sources, (), full_feature_names=full_feature_names)

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
        sources: list[ViewSource | OnDemandSource] = []
        views: dict[tuple[str, int | None], ViewSource | OnDemandSource] = {}
        columns: dict[tuple[str, int | None], dict[str, FeatureSource]] = {}
        for reference in references:
            name, version, feature = _parse_reference(reference)
            view = views.get((name, version))
            if view is None:
                view = views[name, version] = self._views.source(name, version, label=name)
                columns[name, version] = {one.name: one for one in view.features}
            column = columns[name, version].get(feature)
            if column is None:
                raise UnknownFeatures(f"feature view '{name}' has no feature '{feature}'")
            # One source per feature keeps the order that was asked for; the views are merged.
            sources.append(replace(view, features=(column,)))
        return self._compile("", sources, references, full_feature_names=full_feature_names)

    def online_store(
        self, *, cache_rows: int = 0, hears_writes: bool = False, timeout_s: float = 1.0
    ) -> OnlineStore:
        """
        Make the client of the repository's online store.

        Args:
            cache_rows: As `RedisStore` takes it; of no use with other stores.
            hears_writes: Likewise.
            timeout_s: What a read has when none of its callers is in a hurry.

        Raises:
            StartupError: it is a kind of Redis that is not supported, or badly configured.
        """
        patience_s = patience_of(timeout_s)
        store = self._stored_values(cache_rows, hears_writes=hears_writes, patience_s=patience_s)
        return OnDemandStore(store) if self._code else store

    def _stored_values(
        self, cache_rows: int, *, hears_writes: bool, patience_s: float
    ) -> OnlineStore:
        settings = self._config.online_store
        if not self._is_redis:
            return FeastStore(self._config, patience_s=patience_s)
        if self._config.entity_key_serialization_version != _KEY_VERSION:
            raise StartupError(
                "entity_key_serialization_version of the feature repository is "
                f"{self._config.entity_key_serialization_version}; only {_KEY_VERSION} is supported"
            )
        kind = getattr(settings.redis_type, "value", settings.redis_type)
        servers = open_redis(
            kind, settings.connection_string, settings.sentinel_master, patience_s=patience_s
        )
        return RedisStore(
            servers, cache_rows=cache_rows, hears_writes=hears_writes, patience_s=patience_s
        )

    def redis_client(self, timeout_s: float) -> Callable[[], Any] | None:
        """
        Return what makes redis-py's client of the online store; None if that is no Redis.

        For looking at the store, not for serving from it. Calling it raises what redis-py does.

        Args:
            timeout_s: The longest that the client waits, for a connection or an answer; for all
                Sentinels together `SENTINELS_TIMEOUT_S` at most.
        """
        if not self._is_redis:
            return None
        import_feast()
        from feast.infra.online_stores.redis import RedisOnlineStore  # noqa: PLC0415 as above
        from redis.backoff import NoBackoff  # noqa: PLC0415
        from redis.retry import Retry  # noqa: PLC0415

        settings = self._config.online_store
        kind = getattr(settings.redis_type, "value", settings.redis_type)
        sentinels_s = min(timeout_s, SENTINELS_TIMEOUT_S)

        class ImpatientStore(RedisOnlineStore):  # type: ignore[misc] # Feast has no types
            @staticmethod
            def _parse_connection_string(connection_string: str) -> Any:
                parse = RedisOnlineStore._parse_connection_string  # noqa: SLF001
                servers, options = parse(connection_string)
                waits = {"socket_timeout": timeout_s, "socket_connect_timeout": timeout_s}
                options |= {**waits, "retry": Retry(NoBackoff(), 0)}
                if kind == "redis_sentinel":  # a silent one is passed over, before each look
                    share_s = sentinels_s / len(servers)
                    options["sentinel_kwargs"] = {
                        **{name: options[name] for name in options if name.startswith("socket_")},
                        **options.get("sentinel_kwargs", {}),
                        "socket_timeout": share_s,
                        "socket_connect_timeout": share_s,
                        "retry": Retry(NoBackoff(), 0),
                    }
                return servers, options

        def connect() -> Any:
            if kind == "redis_sentinel":  # redis-py asks them late, and tells less
                look_for_master(settings.connection_string, settings.sentinel_master, sentinels_s)
            # Feast's own way of connecting, so that what is looked at is where it writes.
            return ImpatientStore()._get_client(settings)  # noqa: SLF001

        return connect

    def another_store(self) -> Any:
        """Make another of Feast's clients of this repository, for a thread of its own."""
        import_feast()
        from feast import FeatureStore  # noqa: PLC0415 as above

        return FeatureStore(repo_path=str(self._path))

    def stored_views(self) -> list[StoredView]:
        """Return every view that the store may hold, in its current version, by name."""
        return self._views.stored_views()

    def collisions(self) -> list[str]:
        """Name the pairs of features that the store cannot tell apart; Feast does not look."""
        holders: dict[tuple[frozenset[str], bytes], str] = {}
        found = []
        for keys, view, feature in self._views.stored():
            name = f"{view}:{feature}"
            holder = holders.setdefault((frozenset(keys), feature_field(view, feature)), name)
            if holder != name:
                found.append(f"features '{holder}' and '{name}' have the same field name")
        for stored_name, views in self._views.shared_names():
            found.append(f"feature views {', '.join(views)} are all stored as '{stored_name}'")
        return found

    def offline_features(self) -> "FeastOffline":
        """Make the client of the repository's offline store, for slow work beside the requests."""
        from headrace.features.offline import FeastOffline  # noqa: PLC0415 see above

        store = self.another_store()
        store._registry = self._state.offline  # noqa: SLF001 - Feast's own would run its code
        return FeastOffline(
            store,
            has_versions=self._views.has_versions,
            views=self._views.feature_names(),
            ttls_s={view.name: view.ttl_s for view in self.stored_views()},
        )

    def _compile(
        self,
        service: str,
        sources: Sequence[ViewSource | OnDemandSource],
        references: Sequence[str],
        *,
        full_feature_names: bool,
    ) -> FeaturePlan:
        stored = [source for source in sources if isinstance(source, ViewSource)]
        if len(stored) == len(sources):
            plan = compile_plan(
                service,
                self.project,
                self.version,
                stored,
                self._views.stored(),
                references=references,
                full_feature_names=full_feature_names,
            )
            return replace(plan, registry=self._state)
        plan = compile_on_demand_plan(
            service,
            self.project,
            self.version,
            sources,
            self._views.stored(),
            references=references,
            full_feature_names=full_feature_names,
        )
        if not self._is_redis and plan.stored is not None and not plan.stored.references:
            raise FeaturePlanError(
                f"feature service '{service}' has on-demand views and renamed ones; only with "
                "Redis as the online store can it have both"
            )
        if plan.stored is not None:
            plan = replace(plan, stored=replace(plan.stored, registry=self._state))
        return replace(plan, registry=self._state)


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


def _refuse_empty(state: RegistryState, path: Path) -> None:
    if state.is_empty:
        raise StartupError(
            f"feature repository {path} has no feature service in project '{state.project}', and "
            "no feature view; define some and run `feast apply` in it"
        )


def _missing_registry(path: Path, settings: Any) -> str | None:
    """Return the registry file that is not there. Feast would write an empty one instead."""
    if settings.registry_type != "file" or "://" in str(settings.path):
        return None
    return None if (path / settings.path).exists() else str(settings.path)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
