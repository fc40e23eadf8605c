"""The code of on-demand feature views, from Python modules that the operator allows.

A registry holds such code too, as source and as a pickle; neither is ever run.
"""

import importlib
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from headrace.errors import FeaturePlanError, StartupError

if TYPE_CHECKING:
    from feast.on_demand_feature_view import OnDemandFeatureView

_MODULE_NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", re.ASCII)
_MODES = ("python", "pandas")


class OnDemandCode:
    """
    The code of one on-demand feature view.

    Args:
        view: What Feast's decorator made of it.
    """

    def __init__(self, view: "OnDemandFeatureView") -> None:
        self._view = view

    def check(self, mode: str, source: str) -> None:
        """
        Check that this is what has been applied to the registry.

        Args:
            mode: What the registry says of it.
            source: Likewise, its text; empty if the registry has none.

        Raises:
            FeaturePlanError: it is not, or is of a kind that cannot be run.
        """
        name, transformation = self._view.name, self._view.feature_transformation
        if mode not in _MODES or self._view.mode != mode or transformation is None:
            raise FeaturePlanError(
                f"on-demand feature view '{name}' is of mode '{mode}'; "
                f"{' and '.join(_MODES)} can be run"
            )
        if source and source != transformation.udf_string:
            raise FeaturePlanError(
                f"the code of on-demand feature view '{name}' is not that in the registry; run "
                "`feast apply` with it, or restart this server with the code that was applied"
            )

    def run(self, columns: Mapping[str, list[Any]], rows: int) -> Mapping[str, list[Any]]:
        """
        Compute all the features of some rows.

        Args:
            columns: Of n Python values each, as Feast gives them to its code; None is missing.
            rows: n.

        Returns:
            n values each, by the features' names in the view, and whatever else the code returns.

        Raises:
            Exception: whatever the code raises.
            ValueError: a result has not one value per row.
        """
        transformation = self._view.feature_transformation
        assert transformation is not None
        if self._view.mode == "pandas":
            results = self._run_pandas(transformation, columns)
        elif self._view.singleton:
            # Feast 0.67 computes only the first row of a request; here each has its turn.
            each = [
                transformation.udf({name: values[row] for name, values in columns.items()})
                for row in range(rows)
            ]
            results = {name: [_only(one[name]) for one in each] for name in each[0]}
        else:
            results = transformation.udf({name: list(own) for name, own in columns.items()})
        own = {feature.name for feature in self._view.features}
        found = {}
        for name, values in results.items():
            short = name.removeprefix(f"{self._view.name}__")
            found[short] = list(values) if isinstance(values, list | tuple) else [values]
            if short in own and len(found[short]) != rows:
                raise ValueError(f"{len(found[short])} values of '{short}' for {rows} rows")
        return found

    @staticmethod
    def _run_pandas(
        transformation: Any, columns: Mapping[str, list[Any]]
    ) -> Mapping[str, list[Any]]:
        import pyarrow as pa  # noqa: PLC0415 - nobody else needs it
        from feast.online_response import _convert_uuids_for_arrow  # noqa: PLC0415

        # By way of Arrow, as Feast does: that is where the frame's dtypes come from.
        table = pa.Table.from_pydict(_convert_uuids_for_arrow(dict(columns)))
        results = transformation.udf(table.to_pandas())
        table = pa.Table.from_pandas(results)
        return {name: list(table[name].to_numpy()) for name in table.column_names}


def load_on_demand_code(modules: Sequence[str], folder: Path) -> Mapping[str, OnDemandCode]:
    """
    Import modules that define on-demand feature views. Whatever is in them runs.

    Args:
        modules: Their names, dotted.
        folder: Where they are looked for when Python's path does not have them.

    Returns:
        By the view's name.

    Raises:
        StartupError: a module cannot be imported or defines no such view, or two views have one
            name.
    """
    if not modules:
        return MappingProxyType({})
    from feast.on_demand_feature_view import OnDemandFeatureView  # noqa: PLC0415 - seconds

    if str(folder) not in sys.path:
        sys.path.append(str(folder))  # at the end: it must not hide anybody's modules
    views: dict[str, OnDemandFeatureView] = {}
    for name in modules:
        if not _MODULE_NAME.fullmatch(name):
            raise StartupError(f"on-demand module '{name}' is no module's name")
        try:
            module = importlib.import_module(name)
        except Exception as error:
            raise StartupError(
                f"on-demand module '{name}' cannot be imported: {type(error).__name__}: {error}"
            ) from error
        found = [one for one in vars(module).values() if isinstance(one, OnDemandFeatureView)]
        if not found:
            raise StartupError(f"on-demand module '{name}' defines no on-demand feature view")
        for view in found:
            if views.setdefault(view.name, view) is not view:
                raise StartupError(f"on-demand feature view '{view.name}' is defined twice")
    return {name: OnDemandCode(view) for name, view in views.items()}


def _only(value: Any) -> Any:
    # As Feast: a list is a list of rows, of which there is one.
    if not isinstance(value, list):
        return value
    if len(value) != 1:
        raise ValueError(f"{len(value)} values for one row")
    return value[0]
