"""The feature join: what a model's callers send, and how features become the model's own inputs.

A model whose configuration names a feature service is called with entity ids. Its public inputs are
the service's join keys, the data of its on-demand views, then one request-time input for each
column or input of the model that the service does not have. All of this is settled when the model
is loaded; a batch only moves columns.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from headrace.errors import ModelLoadError
from headrace.features.plan import FeaturePlan, FeatureStatus
from headrace.features.store import FeatureRows
from headrace.features.values import ValueType
from headrace.tensors import TensorSpec

KEY_BYTES_MAX = 4_096
"""Of a text entity key: every key of a batch shares one exchange with the store."""

MissingFeatures = Literal["nan", "default", "reject"]


class FeatureJoin:
    """
    How one model takes one feature service.

    A model with one 2-D input takes the names of `feature_order` as its columns, the service's own
    order by default. Any other model takes one value per row in each input, matched by name.
    Integers and booleans are cast to a float input; otherwise a cast must keep every value; text
    goes into BYTES inputs only, as UTF-8.

    Args:
        plan: The feature service.
        model_inputs: What the model itself takes, batch dimension first.
        model: Its name, for messages.
        feature_order: Names of features and request-time inputs in column order.
        missing_features: What the model gets for a missing feature: NaN, the feature's default, or
            nothing, for its request is refused.
        max_batch_size: As configured.

    Attributes:
        plan: As given.
        inputs: The public inputs: the plan's request columns, then request-time inputs; one value
            per row each. A model may take a data column of an on-demand view as an input, too.
        rejects_missing: Whether requests with missing features must be refused.

    Raises:
        ModelLoadError: service and model do not fit, or the policy cannot be kept.
    """

    def __init__(
        self,
        *,
        plan: FeaturePlan,
        model_inputs: Sequence[TensorSpec],
        model: str,
        feature_order: Sequence[str] | None,
        missing_features: MissingFeatures,
        max_batch_size: int,
    ) -> None:
        self.plan = plan
        self.rejects_missing = missing_features == "reject"
        self._model = model
        self._service = plan.service
        self._features = {feature.name: i for i, feature in enumerate(plan.features)}
        if max_batch_size < 1:
            raise self._refused("needs a batch dimension to be joined to; set max_batch_size")
        self._inputs = [
            self._model_input(spec, sources, missing_features)
            for spec, sources in self._sources(model_inputs, feature_order)
        ]
        sources = [(source, own.spec) for own in self._inputs for source in own.sources]
        data = {column.name: column for column in plan.data_columns}
        request_time = {}
        for source, spec in sources:
            if source in data:
                self._check_cast(data[source].value_type, spec, f"request column '{source}'")
            elif isinstance(source, str):
                request_time[source] = _column_spec(source, spec.datatype)
        self._refuse_join_keys(request_time)
        self._unused = np.ones(len(plan.features), np.bool_)
        self._unused[[source for source, _ in sources if not isinstance(source, str)]] = False
        self.inputs: tuple[TensorSpec, ...] = (
            *(
                _column_spec(column.name, column.datatype, is_key=column.is_key)
                for column in plan.request_columns
            ),
            *request_time.values(),
        )

    def column_sources(self, name: str) -> Sequence[int | str]:
        """Say what a model input's columns are: places in the plan, or request-time inputs."""
        return next(own.sources for own in self._inputs if own.spec.name == name)

    def missing(self, rows: FeatureRows) -> NDArray[np.bool_]:
        """
        Say what the model will miss: null, absent and too old alike.

        Returns:
            Shape (features, n), as the plan orders them; False for features the model does not use.
        """
        missing: NDArray[np.bool_] = rows.statuses != FeatureStatus.PRESENT
        if self._unused.any():
            missing[self._unused] = False
        return missing

    def assemble(
        self, rows: FeatureRows, request_columns: Mapping[str, NDArray[Any]]
    ) -> dict[str, NDArray[Any]]:
        """
        Make the model's inputs.

        Where a request is to be refused for what it misses, its rows hold fillers and must not be
        answered.

        Args:
            rows: What was read, with `plan`.
            request_columns: The request-time inputs by name, each n values of shape (n, 1) or (n,).

        Returns:
            By input name; not to be written to, since it may be `rows.matrix` itself.
        """
        return {own.spec.name: own.assemble(rows, request_columns) for own in self._inputs}

    def _sources(
        self, model_inputs: Sequence[TensorSpec], feature_order: Sequence[str] | None
    ) -> list[tuple[TensorSpec, list[int | str]]]:
        if len(model_inputs) == 1 and len(model_inputs[0].shape) == 2:
            names = self._matrix_columns(model_inputs[0], feature_order)
            return [(model_inputs[0], [self._features.get(name, name) for name in names])]
        self._check_columns(model_inputs, feature_order)
        return [(spec, [self._features.get(spec.name, spec.name)]) for spec in model_inputs]

    def _matrix_columns(self, spec: TensorSpec, feature_order: Sequence[str] | None) -> list[str]:
        names = list(self._features) if feature_order is None else list(feature_order)
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise self._refused(f"has {_listed(repeated)} twice in feature_order")
        if not any(name in self._features for name in names):
            raise self._refused(
                f"takes no feature of service '{self._service}'; feature_order has "
                f"{_listed(names)}, the service has {_listed(self._features)}"
            )
        width = spec.shape[1]
        if width not in (-1, len(names)):
            source = f"service '{self._service}'" if feature_order is None else "feature_order"
            raise self._refused(
                f"has {width} columns in input '{spec.name}', and {source} names {len(names)}: "
                f"{_listed(names)}"
            )
        return names

    def _check_columns(
        self, model_inputs: Sequence[TensorSpec], feature_order: Sequence[str] | None
    ) -> None:
        if feature_order is not None:
            raise self._refused(
                "has a feature_order, which is for a model with one input of two dimensions; its "
                f"inputs {_listed(spec.name for spec in model_inputs)} are matched by name"
            )
        for spec in model_inputs:
            if len(spec.shape) not in (1, 2) or spec.shape[1:] not in ((), (1,), (-1,)):
                raise self._refused(
                    f"has input '{spec.name}' of shape {list(spec.shape)}; an input for one "
                    "feature is [-1,1] or [-1]"
                )
        names = [spec.name for spec in model_inputs]
        unknown = [name for name in names if name not in self._features]
        unused = [name for name in self._features if name not in names]
        if unused:
            # An input that nothing feeds is a request-time input, so this is how a typo shows.
            raise self._refused(
                f"has no input for {_listed(unused)} of service '{self._service}'; its inputs "
                f"{_listed(unknown)} are not in the service. Rename them or leave the features "
                "out of the service"
            )

    def _check_cast(self, value_type: ValueType, spec: TensorSpec, what: str) -> None:
        if spec.datatype == "BYTES":
            fits = value_type.is_text
        elif value_type.dtype == np.object_:
            fits = False
        elif spec.dtype.kind == "f":
            fits = True
        else:
            fits = np.can_cast(value_type.dtype, spec.dtype, "safe")
        if not fits:
            raise self._refused(
                f"takes {spec.datatype} in input '{spec.name}', and {what} is {value_type.name}, "
                "which does not convert to it without loss"
            )

    def _model_input(
        self, spec: TensorSpec, sources: Sequence[int | str], policy: MissingFeatures
    ) -> "_ModelInput":
        features = [self.plan.features[i] for i in sources if not isinstance(i, str)]
        for feature in features:
            self._check_cast(feature.value_type, spec, f"feature '{feature.name}'")
        if policy == "nan" and features and spec.dtype.kind != "f":
            raise self._refused(
                f"takes {spec.datatype} in input '{spec.name}', where a missing feature cannot be "
                "NaN; set missing_features to default or reject"
            )
        filler: Any = {"f": np.nan, "O": b""}.get(spec.dtype.kind, 0)
        fillers = [filler] * len(features)
        if policy == "default":
            without = [feature.name for feature in features if feature.default is None]
            if without:
                raise self._refused(
                    f"has missing_features default, and {_listed(without)} of service "
                    f"'{self._service}' have no tag headrace.default"
                )
            fillers = [_as_bytes(feature.default) for feature in features]
        is_whole_plan = list(sources) == list(range(len(self.plan.features)))
        return _ModelInput(
            spec,
            sources,
            fillers,
            takes_plan_matrix=is_whole_plan
            and len(spec.shape) == 2
            and self.plan.is_float32
            and spec.dtype == np.float32,
        )

    def _refuse_join_keys(self, request_time: Mapping[str, TensorSpec]) -> None:
        both = [key.name for key in self.plan.join_keys if key.name in request_time]
        if both:
            raise self._refused(
                f"takes {_listed(both)} as a value, which is a join key of service "
                f"'{self._service}'; give the model's input another name"
            )

    def _refused(self, fact: str) -> ModelLoadError:
        return ModelLoadError(f"model '{self._model}' {fact}")


class _ModelInput:
    """
    One input of the model and where its columns come from.

    Args:
        spec: As the model declares it.
        sources: Per column: a place in the plan's features, or the name of a request-time input.
        fillers: What replaces a missing value, per column that is a feature.
        takes_plan_matrix: `FeatureRows.matrix` is this very tensor when nothing is missing.
    """

    def __init__(
        self,
        spec: TensorSpec,
        sources: Sequence[int | str],
        fillers: Sequence[Any],
        *,
        takes_plan_matrix: bool,
    ) -> None:
        self.spec = spec
        self.sources = sources
        self._takes_plan_matrix = takes_plan_matrix
        self._places = np.array([i for i in sources if not isinstance(i, str)], np.intp)
        self._columns = np.array(
            [j for j, source in enumerate(sources) if not isinstance(source, str)], np.intp
        )
        self._fillers = np.array(fillers, spec.dtype)

    def assemble(
        self, rows: FeatureRows, request_columns: Mapping[str, NDArray[Any]]
    ) -> NDArray[Any]:
        if self._takes_plan_matrix and rows.is_complete:
            assert rows.matrix is not None
            return rows.matrix
        missing = (rows.statuses[self._places] != FeatureStatus.PRESENT).T
        if self._takes_plan_matrix:
            assert rows.matrix is not None
            return np.where(missing, self._fillers, rows.matrix)
        tensor = np.empty((rows.statuses.shape[1], len(self.sources)), self.spec.dtype)
        with np.errstate(over="ignore"):  # what is too large for a narrower float is infinite
            for j, source in enumerate(self.sources):
                if isinstance(source, str):
                    tensor[:, j] = request_columns[source].reshape(-1)
                elif tensor.dtype == np.object_:
                    tensor[:, j] = [_as_bytes(value) for value in rows.values[source].tolist()]
                elif rows.matrix is None:
                    tensor[:, j] = rows.values[source]
            if rows.matrix is not None and tensor.dtype != np.object_:
                tensor[:, self._columns] = rows.matrix[:, self._places]
        if missing.any():
            tensor[:, self._columns] = np.where(missing, self._fillers, tensor[:, self._columns])
        return tensor if len(self.spec.shape) == 2 else tensor[:, 0]


def _column_spec(name: str, datatype: str, *, is_key: bool = False) -> TensorSpec:
    return TensorSpec(
        name,
        datatype,
        (-1, 1),
        is_column=True,
        widens_int32=is_key and datatype == "INT64",
        element_bytes_max=KEY_BYTES_MAX if is_key and datatype == "BYTES" else 0,
    )


def _as_bytes(value: Any) -> Any:
    """Turn text into what a BYTES tensor holds; other values are left alone."""
    if value is None:
        return b""
    return value.encode() if isinstance(value, str) else value


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"'{name}'" for name in names) or "none"
