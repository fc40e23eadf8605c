"""Rows written to a feature repository's stores through Feast's provider, without registry code.

Feast's own way (`FeatureStore.write_to_online_store`) first makes an object of every view in the
registry, which runs the code that it holds of on-demand, stream and batch views. Here the one view
that is written is made anew, of nothing but what a write needs: names, types and time columns.

Importing this imports Feast, which takes seconds.
"""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from typing import Any, NamedTuple

import pandas as pd
import pyarrow as pa
import redis
import structlog
from feast import FeatureView
from feast.infra.passthrough_provider import PassthroughProvider
from feast.protos.feast.core.DataSource_pb2 import DataSource
from feast.protos.feast.core.FeatureView_pb2 import FeatureView as FeatureViewMessage
from redis.backoff import NoBackoff
from redis.retry import Retry

from headrace.errors import (
    DependencyUnavailable,
    FeaturesNotServable,
    FeatureStoreUnavailable,
    InvalidRequest,
)
from headrace.features.layout import DUMMY_JOIN_KEY
from headrace.features.repo import FeatureRepo
from headrace.features.values import TAGS, ValueType

SOCKET_TIMEOUT_S = 2.0
"""Of Redis, where its connection string names none; Feast's default is for ever."""

TIME_MAX_S = 253_402_300_800
"""The year 10000: seconds from then on are milliseconds, or worse."""

_SOURCE_MODULES = "feast."
_log = structlog.get_logger(__name__)


class PushTo(Enum):
    """Where a pushed row goes; values are those of Feast's `PushRequest.to`."""

    ONLINE = "online"
    OFFLINE = "offline"
    ONLINE_AND_OFFLINE = "online_and_offline"


class _Prepared(NamedTuple):
    """A row of one view, ready for the stores; None for a store that does not get it."""

    view: FeatureView
    online: Sequence[Any] | None
    offline: pa.Table | None


def moment(name: str, seconds: float) -> pd.Timestamp:
    """
    Return a moment as pandas takes it.

    Raises:
        InvalidRequest: there is no such moment; the column is named in it.
    """
    try:
        if -TIME_MAX_S < seconds < TIME_MAX_S:
            return pd.Timestamp(seconds, unit="s", tz="UTC")
    except (ValueError, OverflowError):
        pass
    raise InvalidRequest(f"'{name}' is {seconds}; expected Unix seconds")


class FeastWriter:
    """
    Writes rows. For one thread: Feast's stores do not promise to be safe for several.

    Everything that can be wrong with a row is found before any store is written.

    Args:
        repo: Where to write.
    """

    def __init__(self, repo: FeatureRepo) -> None:
        self._store = repo.another_store()
        self._config = self._store.config
        self._project = self._config.project
        self._ttl_s = repo.registry_ttl_s
        _bound_waits(self._config.online_store)
        self._provider = self._store._get_provider()  # noqa: SLF001 there is no other way to it
        self._is_bounded = False
        self._registry: Any = None
        self._read_s = -math.inf

    def write(self, view: str, row: Mapping[str, Any], *, allow_registry_cache: bool) -> None:
        """
        Write one row of a view to the online store.

        Args:
            view: Its name.
            row: By column. Event times are datetimes, texts in ISO 8601, or Unix seconds.
            allow_registry_cache: Whether the registry may be as old as its TTL allows.

        Raises:
            InvalidRequest: there is no such view, or the row does not fit it.
            FeaturesNotServable: the view cannot be written without code from the registry.
            FeatureStoreUnavailable: the store did not take the row.
            DependencyUnavailable: the registry cannot be read.
        """
        self._look(allow_registry_cache=allow_registry_cache)
        self._send([self._prepare(self._view(view), row, PushTo.ONLINE)])

    def push(
        self, source: str, row: Mapping[str, Any], to: PushTo, *, allow_registry_cache: bool
    ) -> None:
        """
        Write one row to every view of a push source; else as `write`.

        Raises:
            DependencyUnavailable: also if the offline store cannot be read or written.
        """
        self._look(allow_registry_cache=allow_registry_cache)
        messages = [message for message in self._messages() if _push_source(message) == source]
        if not messages:
            raise InvalidRequest(f"there is no push source '{source}'")
        if to is not PushTo.OFFLINE:
            self._refuse_precomputed({message.spec.name for message in messages})
        self._send([self._prepare(_without_code(message), row, to) for message in messages])

    def _look(self, *, allow_registry_cache: bool) -> None:
        """Read the registry, if the one at hand is too old. Only messages: no object, no code."""
        age_s = time.monotonic() - self._read_s
        is_young = not self._ttl_s or age_s < self._ttl_s  # 0 is for ever, as in Feast
        if self._registry is not None and allow_registry_cache and is_young:
            return
        try:
            self._store.refresh_registry()
            self._registry = self._store.registry.proto()
        except Exception as error:
            _log.exception("registry_unreadable")
            raise DependencyUnavailable("the feature registry cannot be read") from error
        self._read_s = time.monotonic()

    def _messages(self) -> Iterator[Any]:
        """Yield the registry's messages of the views that are stored."""
        for messages in (self._registry.feature_views, self._registry.stream_feature_views):
            for message in messages:
                if message.spec.project == self._project:
                    yield message

    def _view(self, name: str) -> FeatureView:
        for message in self._messages():
            if message.spec.name == name:
                return _without_code(message)
        for message in self._registry.on_demand_feature_views:
            if message.spec.project == self._project and message.spec.name == name:
                raise FeaturesNotServable(
                    f"'{name}' is an on-demand feature view: writing it runs its code, and "
                    "Headrace runs no code from a registry; write it with Feast's SDK"
                )
        raise InvalidRequest(f"there is no feature view '{name}' that can be written")

    def _refuse_precomputed(self, views: set[str]) -> None:
        """Feast computes such vectors anew after a push, with whatever code the registry has."""
        for message in self._registry.feature_services:
            spec = message.spec
            if spec.project != self._project or not spec.precompute_online:
                continue
            if views & {projection.feature_view_name for projection in spec.features}:
                raise FeaturesNotServable(
                    f"feature service '{spec.name}' has precompute_online, and its vectors would "
                    "be out of date after this push; push with Feast's SDK"
                )

    def _prepare(self, view: FeatureView, row: Mapping[str, Any], to: PushTo) -> _Prepared:
        source = view.batch_source
        if source is None:
            raise FeaturesNotServable(f"feature view '{view.name}' has no batch source")
        mapping = source.field_mapping or {}
        times = {source.timestamp_field, source.created_timestamp_column}
        values = {
            name: moment(name, value)
            if isinstance(value, int | float) and times & {name, mapping.get(name, name)}
            else value
            for name, value in row.items()
        }
        online = offline = None
        if to is not PushTo.OFFLINE:
            online = _online_rows(view, values)
        if to is not PushTo.ONLINE:
            offline = self._offline_table(view, values)
        return _Prepared(view, online, offline)

    def _offline_table(self, view: FeatureView, values: Mapping[str, Any]) -> pa.Table:
        try:
            columns = self._provider.get_table_column_names_and_types_from_data_source(
                self._config, view.batch_source
            )
            names = [name for name, _ in columns]
        except Exception as error:
            _log.exception("offline_store_unreadable", view=view.name)
            raise DependencyUnavailable(
                f"the offline store of feature view '{view.name}' cannot be read; nothing was "
                "written"
            ) from error
        if set(names) != set(values):
            raise InvalidRequest(
                f"the offline store of feature view '{view.name}' has other columns: missing "
                f"{_listed(set(names) - set(values))}; unknown {_listed(set(values) - set(names))}"
            )
        try:
            return pa.Table.from_pandas(_frame(values)[names])
        except Exception as error:  # noqa: BLE001 whatever it is, the row is to blame
            raise _refusal(view, error) from None

    def _send(self, rows: Sequence[_Prepared]) -> None:
        for row in rows:
            if row.online is not None:
                try:
                    self._bound_retries()
                    self._provider.online_write_batch(
                        self._config, row.view, row.online, progress=None
                    )
                except Exception as error:
                    _log.exception("online_write_failed", view=row.view.name)
                    raise FeatureStoreUnavailable(
                        "the online feature store did not take the row"
                    ) from error
        for row in rows:
            if row.offline is not None:
                try:
                    self._provider.ingest_df_to_offline_store(row.view, row.offline)
                except Exception as error:
                    _log.exception("offline_write_failed", view=row.view.name)
                    has_it = "" if row.online is None else "; the online store has it"
                    raise DependencyUnavailable(
                        f"the offline store did not take the row{has_it}"
                    ) from error

    def _bound_retries(self) -> None:
        """Retry once, at once; redis-py would try four times, and take ten seconds."""
        if self._is_bounded or getattr(self._config.online_store, "type", None) != "redis":
            return
        client = self._provider.online_store._get_client(self._config.online_store)  # noqa: SLF001 Feast's, kept by it
        if isinstance(client, redis.Redis):
            client.set_retry(Retry(NoBackoff(), 1))
        self._is_bounded = True


def _bound_waits(settings: Any) -> None:
    if getattr(settings, "type", None) != "redis":
        return
    for option in ("socket_timeout", "socket_connect_timeout"):
        if f"{option}=" not in settings.connection_string:
            settings.connection_string += f",{option}={SOCKET_TIMEOUT_S:g}"


def _push_source(message: Any) -> str | None:
    source = message.spec.stream_source
    return str(source.name) if source.type == DataSource.PUSH_SOURCE else None


def _without_code(message: Any) -> FeatureView:
    """
    Make Feast's object of a view, a stream view included, of what a write needs and no more.

    Source: feast 0.67 `utils._convert_arrow_fv_to_proto`, `helpers.compute_versioned_name`.
    """
    spec = message.spec
    source = spec.batch_source
    if source.data_source_class_type and not source.data_source_class_type.startswith(
        _SOURCE_MODULES
    ):
        raise FeaturesNotServable(
            f"the batch source of feature view '{spec.name}' is of a class that is not Feast's"
        )
    own = FeatureViewMessage()
    for field in ("name", "project", "online", "version"):
        setattr(own.spec, field, getattr(spec, field))
    for field in ("entities", "features", "entity_columns"):
        getattr(own.spec, field).extend(getattr(spec, field))
    own.spec.tags.update(spec.tags)
    own.spec.ttl.CopyFrom(spec.ttl)
    if spec.HasField("batch_source"):
        own.spec.batch_source.CopyFrom(source)
    own.meta.current_version_number = message.meta.current_version_number
    return FeatureView.from_proto(own)


def _online_rows(view: FeatureView, values: Mapping[str, Any]) -> Sequence[Any]:
    """Turn a row into what online stores take. Whatever goes wrong is the row's fault."""
    source = view.batch_source
    mapping = source.field_mapping or {}
    given = {mapping.get(name, name): value for name, value in values.items()}
    names = [column.name for column in (*view.entity_columns, *view.features)]
    names += filter(None, (source.timestamp_field, source.created_timestamp_column))
    if DUMMY_JOIN_KEY in names:
        values = {DUMMY_JOIN_KEY: "", **values}
        given.setdefault(DUMMY_JOIN_KEY, "")
    if missing := [name for name in names if name not in given]:
        raise InvalidRequest(
            f"the row has no {_listed(missing)}, which feature view '{view.name}' has"
        )
    if _is_null(given[source.timestamp_field]):
        raise InvalidRequest(f"'{source.timestamp_field}' is null; expected when it was observed")
    for column in view.entity_columns:
        if _is_null(given[column.name]):
            raise InvalidRequest(f"join key '{column.name}' is null")
    for column in (*view.entity_columns, *view.features):
        _refuse_misfit(column, given[column.name])
    if all(_is_null(given[feature.name]) for feature in view.features):
        raise InvalidRequest(f"the row has no value for any feature of view '{view.name}'")
    try:
        rows: Sequence[Any] = PassthroughProvider._prep_rows_to_write_for_ingestion(  # noqa: SLF001 the half of `ingest_df` that looks at the row
            view, _frame(values)
        )
    except Exception as error:  # noqa: BLE001 whatever it is, the row is to blame
        raise _refusal(view, error) from None
    return rows


def _refuse_misfit(column: Any, value: Any) -> None:
    """Refuse what Feast 0.67 would write as another value, or as none."""
    declared = column.dtype.to_value_type().name
    is_list = isinstance(value, list | dict)
    is_cut = isinstance(value, float) and declared in {"INT32", "INT64"} and value % 1 != 0
    if is_cut or (is_list and declared in ValueType.__members__ and ValueType[declared] in TAGS):
        found = "a list" if is_list else value
        raise InvalidRequest(f"'{column.name}' is {found}; expected {declared}")


def _frame(values: Mapping[str, Any]) -> pd.DataFrame:
    return pd.DataFrame({name: [value] for name, value in values.items()})


def _is_null(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _refusal(view: FeatureView, error: Exception) -> InvalidRequest:
    _log.warning("feature_write_refused", view=view.name, reason=f"{type(error).__name__}: {error}")
    return InvalidRequest(
        f"the row does not fit feature view '{view.name}'; the server's log says why"
    )


def _listed(names: Any) -> str:
    return ", ".join(f"'{name}'" for name in sorted(names)[:16]) or "none"
