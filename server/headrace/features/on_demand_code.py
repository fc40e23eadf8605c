"""The code of on-demand feature views, from Python modules that the operator allows.

A registry holds such code too, as source and as a pickle; neither is ever run.
"""

import importlib
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from headrace.errors import FeaturePlanError, StartupError
from headrace.features.feast_import import import_feast
from headrace.features.values import ValueType

if TYPE_CHECKING:
    from feast.on_demand_feature_view import OnDemandFeatureView

_MODULE_NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", re.ASCII)
_MODES = ("python", "pandas")
_WITHOUT_NULL = frozenset({ValueType.INT32, ValueType.INT64, ValueType.BOOL})
"""Of whose dtypes pandas has none with a missing value."""


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

    def run(
        self,
        columns: Mapping[str, list[Any]],
        rows: int,
        types: Mapping[str, ValueType] = MappingProxyType({}),
    ) -> Mapping[str, list[Any]]:
        """
        Compute all the features of some rows.

        A row's results do not depend on the rows beside it, as far as the code judges each by
        itself: a frame's columns have the dtypes of their declared types, whatever is in them.

        Args:
            columns: Of n Python values each, as Feast gives them to its code; None is missing.
            rows: n.
            types: Of `columns`. One without a type has whatever dtype its values suggest.

        Returns:
            n values each, by the features' names in the view, and whatever else the code returns.

        Raises:
            Exception: whatever the code raises.
            ValueError: a result has not one value per row.
        """
        transformation = self._view.feature_transformation
        assert transformation is not None
        if self._view.mode == "pandas":
            results = _run_pandas(transformation.udf, columns, rows, types)
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


def _run_pandas(
    function: Callable[[Any], Any],
    columns: Mapping[str, list[Any]],
    rows: int,
    types: Mapping[str, ValueType],
) -> Mapping[str, list[Any]]:
    groups = _of_one_dtype(columns, rows, types)
    if len(groups) == 1:
        return _run_frame(function, columns, types)
    results: dict[str, list[Any]] = {}
    for own in groups:
        part = {name: [values[row] for row in own] for name, values in columns.items()}
        for name, values in _run_frame(function, part, types).items():
            if len(values) != len(own):
                raise ValueError(f"{len(values)} values of '{name}' for {len(own)} rows")
            found = results.setdefault(name, [None] * rows)
            for row, value in zip(own, values, strict=True):
                found[row] = value
    return results


def _of_one_dtype(
    columns: Mapping[str, list[Any]], rows: int, types: Mapping[str, ValueType]
) -> list[list[int]]:
    """
    Group rows so that no column's dtype depends on which are together.

    One missing integer makes a column of integers one of floats, for all rows that are in it.
    """
    fickle = [
        values
        for name, values in columns.items()
        if types.get(name) in _WITHOUT_NULL and None in values
    ]
    if not fickle:
        return [list(range(rows))]
    groups: dict[tuple[bool, ...], list[int]] = {}
    for row in range(rows):
        groups.setdefault(tuple([values[row] is None for values in fickle]), []).append(row)
    return list(groups.values())


def _run_frame(
    function: Callable[[Any], Any],
    columns: Mapping[str, list[Any]],
    types: Mapping[str, ValueType],
) -> Mapping[str, list[Any]]:
    import_feast()
    import pyarrow as pa  # noqa: PLC0415 - nobody else needs it
    from feast.online_response import _convert_uuids_for_arrow  # noqa: PLC0415

    # By way of Arrow, as Feast does: that is where the frame's dtypes come from.
    arrays = {}
    for name, values in _convert_uuids_for_arrow(dict(columns)).items():
        value_type = types.get(name)
        arrow = None if value_type is None else _arrow_type(value_type)
        arrays[name] = pa.array(values) if arrow is None else pa.array(values, arrow)
    table = pa.Table.from_pandas(function(pa.table(arrays).to_pandas()))
    return {name: _result(table[name]) for name in table.column_names}


def _arrow_type(value_type: ValueType) -> Any:
    """Return what Arrow makes of Feast's values of a type; None where that is up to each value."""
    import pyarrow as pa  # noqa: PLC0415 - as above

    name = value_type.name.removesuffix("_LIST")
    scalar = {
        "BYTES": pa.binary(),
        "STRING": pa.string(),
        "INT32": pa.int64(),
        "INT64": pa.int64(),
        "DOUBLE": pa.float64(),
        "FLOAT": pa.float64(),
        "BOOL": pa.bool_(),
        "UNIX_TIMESTAMP": pa.timestamp("us", tz="UTC"),
    }.get(name)
    return pa.list_(scalar) if scalar is not None and name != value_type.name else scalar


def _result(column: Any) -> list[Any]:
    import pyarrow as pa  # noqa: PLC0415 - as above

    if column.null_count and pa.types.is_integer(column.type):
        # As an array they would be floats, and large ones others.
        found: list[Any] = column.to_pylist()
        return found
    return list(column.to_numpy())


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
    import_feast()
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
