"""What a file of the skew log says of the plan that its rows were read with."""

import json
from dataclasses import asdict, dataclass

from headrace.features.plan import FeaturePlan

FORMAT = 1


@dataclass(frozen=True, slots=True)
class LoggedView:
    """
    A view as it was read.

    Args:
        name: The name under which the store holds it.
        column: Of its event times.
        join_keys: (name in the view, name in the log, `ValueType`'s number) each.
    """

    name: str
    column: str
    join_keys: tuple[tuple[str, str, int], ...]


@dataclass(frozen=True, slots=True)
class LoggedFeature:
    """
    A feature as it was read.

    Args:
        name: As served.
        feature: Its name in its view.
        view: Its view's place among the views.
        value_type: `ValueType`'s number.
    """

    name: str
    feature: str
    view: int
    value_type: int


@dataclass(frozen=True, slots=True)
class LoggedPlan:
    """What the rows of a file are; all that comparing them takes."""

    service: str
    views: tuple[LoggedView, ...]
    features: tuple[LoggedFeature, ...]

    def to_json(self) -> bytes:
        return json.dumps({"format": FORMAT, **asdict(self)}).encode()

    @classmethod
    def from_json(cls, text: bytes) -> "LoggedPlan":
        """
        Read what `to_json` wrote.

        Raises:
            ValueError: it is of a format that is not known here, or damaged.
        """
        try:
            fields = json.loads(text)
            if fields["format"] != FORMAT:
                raise ValueError(f"format {fields['format']}; this version reads {FORMAT}")
            return cls(
                fields["service"],
                tuple(
                    LoggedView(
                        view["name"],
                        view["column"],
                        tuple((base, name, kind) for base, name, kind in view["join_keys"]),
                    )
                    for view in fields["views"]
                ),
                tuple(LoggedFeature(**feature) for feature in fields["features"]),
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"a damaged footer: {error}") from None


def logged_plan(plan: FeaturePlan) -> LoggedPlan:
    """Say of a plan what the log has to keep."""
    names = [view.name for view in plan.views]
    views = []
    for view in plan.views:
        group = plan.groups[view.group]
        suffix = f"#{view.group}" if names.count(view.name) > 1 else ""
        keys = [plan.join_keys[at] for at in group.join_keys]
        views.append(
            LoggedView(
                view.name,
                f"event_time.{view.name}{suffix}",
                tuple(
                    (base, key.name, int(key.value_type))
                    for base, key in zip(group.base_names, keys, strict=True)
                ),
            )
        )
    return LoggedPlan(
        plan.service,
        tuple(views),
        tuple(
            LoggedFeature(of.name, of.feature, of.view_index, int(of.value_type))
            for of in plan.features
        ),
    )
