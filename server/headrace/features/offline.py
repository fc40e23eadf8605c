"""Point-in-time values through Feast's SDK, from whichever offline store a repository has."""

import contextlib
import re
import sys
import warnings
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from headrace.features.skew import OfflineColumn
from headrace.features.values import ValueType

_ROW = "headrace_row"
_TIME = "event_timestamp"  # Feast's own name for it
_VERSIONED = re.compile(r"(.+)_v([0-9]+)")


class FeastOffline:
    """
    The offline store of a feature repository. Slow: seconds for each read.

    Args:
        store: Feast's client, with a registry without code: what is on-demand, stored or not, has
            no values here.
        has_versions: Whether the registry keeps versions of views apart.
        views: By name: the features that each has now.
        ttls_s: By name in the store: how old their rows may be; None is for ever.
    """

    def __init__(
        self,
        store: Any,
        *,
        has_versions: bool,
        views: Mapping[str, frozenset[str]],
        ttls_s: Mapping[str, float | None] = MappingProxyType({}),
    ) -> None:
        self._store = store
        self._has_versions = has_versions
        self._views = views
        self._ttls_s = ttls_s

    def ttl_s(self, view: str) -> float | None:
        """See `skew.OfflineFeatures`."""
        return self._ttls_s.get(view, 0.0)

    def has(self, view: str, feature: str) -> bool:
        """Say whether the registry still has a feature, by its view's name in the store."""
        return feature in self._views.get(self._reference(view).partition("@")[0], ())

    def read(
        self,
        view: str,
        features: Sequence[str],
        keys: Mapping[str, tuple[ValueType, Sequence[Any]]],
        times_us: NDArray[np.int64],
    ) -> dict[str, OfflineColumn]:
        """See `skew.OfflineFeatures`; whatever Feast raises is raised."""
        frame = pd.DataFrame({base: _key_column(*column) for base, column in keys.items()})
        frame[_TIME] = pd.to_datetime(times_us, unit="us", utc=True).astype("datetime64[ns, UTC]")
        # Feast's file store returns one row for two that are alike, so none may be.
        group: NDArray[Any] = (
            frame.groupby([*keys, _TIME], sort=False, dropna=False).ngroup().to_numpy()
        )
        asked = frame.drop_duplicates(ignore_index=True)
        asked = asked.assign(**{_ROW: np.arange(len(asked), dtype=np.int64)})
        reference = self._reference(view)
        references = [f"{reference}:{feature}" for feature in features]
        with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Feast and those below it
            job = self._store.get_historical_features(entity_df=asked, features=references)
            found = job.to_df()
        # A row may be missing, and the others come in any order.
        places = found[_ROW].to_numpy(np.int64)
        return {feature: _column(found[feature], places, len(asked), group) for feature in features}

    def _reference(self, view: str) -> str:
        versioned = _VERSIONED.fullmatch(view) if self._has_versions else None
        if versioned is None or view in self._views:
            return view
        return f"{versioned[1]}@v{versioned[2]}"


def _key_column(value_type: ValueType, values: Sequence[Any]) -> Any:
    if value_type is ValueType.UNIX_TIMESTAMP:
        seconds = pd.to_datetime(pd.Series(values), unit="s", utc=True, errors="coerce")
        return seconds.astype("datetime64[ns, UTC]")
    dtype = {ValueType.INT32: "int32", ValueType.INT64: "int64"}.get(value_type, "object")
    return pd.Series(values, dtype=dtype)


def _column(
    found: Any, places: NDArray[np.int64], count: int, group: NDArray[Any]
) -> OfflineColumn:
    series = found.dt.tz_localize(None) if getattr(found.dtype, "tz", None) is not None else found
    own = series.to_numpy()
    values = np.empty(count, own.dtype)
    if own.dtype.kind != "O":
        values[:] = np.zeros(1, own.dtype)
    values[places] = own
    present = np.zeros(count, np.bool_)
    present[places] = series.notna().to_numpy()
    return OfflineColumn(values[group], present[group])
