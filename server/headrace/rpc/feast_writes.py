"""`GrpcFeatureServer/Push` and `WriteToOnlineStore`: writes through Feast's SDK, if allowed.

Importing this imports Feast, which takes seconds.
"""

import threading
from concurrent import futures
from typing import Any

import grpc
import pandas as pd
import structlog
from feast import FeatureStore
from feast.data_source import PushMode
from feast.errors import FeatureViewNotFoundException, PushSourceNotFoundException
from feast.infra.contrib.grpc_server import parse, parse_typed
from feast.protos.feast.serving import GrpcServer_pb2 as pb

from headrace.errors import (
    FeatureStoreUnavailable,
    InvalidRequest,
    Overloaded,
    PermissionDenied,
    ServingError,
)
from headrace.features.repo import FeatureRepo
from headrace.rpc.oip import unary

SERVICE = "GrpcFeatureServer"
WAITING_MAX = 64
"""Writes that wait for the one under way; one more is refused."""

_MODES = {
    "online": PushMode.ONLINE,
    "offline": PushMode.OFFLINE,
    "online_and_offline": PushMode.ONLINE_AND_OFFLINE,
}
_LOG = structlog.get_logger(__name__)


class FeatureWrites:
    """
    The writing methods of Feast's server. One write at a time, in the order of arrival.

    A write is Feast's whole path, milliseconds at least, on a thread of its own; readers do not
    wait for it.

    Args:
        repo: Where to write.
        is_allowed: Whether to write at all.
    """

    def __init__(self, repo: FeatureRepo, *, is_allowed: bool) -> None:
        self._repo = repo
        self._is_allowed = is_allowed
        self._store: FeatureStore | None = None
        self._places = threading.Semaphore(WAITING_MAX)
        self._thread = futures.ThreadPoolExecutor(1, thread_name_prefix="feature-writes")

    def handler(self) -> "grpc.GenericRpcHandler[Any, Any]":
        """Return the handler to add to a server."""
        return grpc.method_handlers_generic_handler(
            SERVICE,
            {
                "Push": unary(self.push, pb.PushRequest),
                "WriteToOnlineStore": unary(self.write, pb.WriteToOnlineStoreRequest),
            },
        )

    def push(self, request: Any) -> Any:
        """Write one row to the views of a push source."""
        mode = _MODES.get(request.to)
        if mode is None:
            raise InvalidRequest(f"to is '{request.to}'; expected {', '.join(_MODES)}")
        self._write(
            request,
            lambda store, rows: store.push(
                push_source_name=request.stream_feature_view,
                df=rows,
                allow_registry_cache=request.allow_registry_cache,
                to=mode,
            ),
        )
        return pb.PushResponse(status=True)

    def write(self, request: Any) -> Any:
        """Write one row to a feature view."""
        self._write(
            request,
            lambda store, rows: store.write_to_online_store(
                feature_view_name=request.feature_view_name,
                df=rows,
                allow_registry_cache=request.allow_registry_cache,
            ),
        )
        return pb.WriteToOnlineStoreResponse(status=True)

    def _write(self, request: Any, write: Any) -> None:
        if not self._is_allowed:
            raise PermissionDenied("this server only reads features; see --allow-feature-writes")
        if request.features and request.typed_features:
            raise InvalidRequest("features and typed_features are both set; expected one of them")
        if not self._places.acquire(blocking=False):
            raise Overloaded(f"{WAITING_MAX} writes are already waiting")
        try:
            self._thread.submit(self._write_now, request, write).result()
        finally:
            self._places.release()

    def _write_now(self, request: Any, write: Any) -> None:
        try:
            if self._store is None:
                # Of its own: Feast's stores do not promise to be safe for several threads.
                self._store = self._repo.another_store()
            typed = request.typed_features
            rows = parse_typed(typed) if typed else parse(request.features)
            for name in typed:
                if typed[name].WhichOneof("val") == "unix_timestamp_val":
                    # Feast 0.67 would take the seconds for nanoseconds: a row of 1970.
                    rows[name] = pd.to_datetime(rows[name], unit="s", utc=True)
            write(self._store, rows)
        except ServingError:
            raise
        except PushSourceNotFoundException:
            raise InvalidRequest(
                f"there is no push source '{request.stream_feature_view}'"
            ) from None
        except FeatureViewNotFoundException:
            raise InvalidRequest("there is no such feature view") from None
        except (KeyError, ValueError, TypeError) as error:
            _LOG.warning("feature_write_refused", reason=str(error))
            raise InvalidRequest("Feast refuses this row; the log says why") from None
        except OSError as error:
            _LOG.exception("feature_write_failed")
            raise FeatureStoreUnavailable("the online feature store does not answer") from error
