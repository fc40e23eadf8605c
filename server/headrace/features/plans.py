"""The plans of what callers ask for: compiled at the first request, kept for the next."""

import threading
from collections import OrderedDict
from dataclasses import dataclass, field

from headrace.errors import (
    FeaturePlanError,
    FeaturesNotFound,
    FeaturesNotServable,
    InvalidRequest,
    UnknownFeatures,
)
from headrace.features.plan import FeaturePlan
from headrace.features.repo import FeatureRepo

PLANS_MAX = 512
"""Kept; the one that was not asked for the longest makes room."""

REFERENCES_MAX = 2_000
"""In one request."""


@dataclass(frozen=True, slots=True)
class Selection:
    """
    Which features somebody asks for.

    Args:
        service: A feature service's name; empty for references.
        references: `view:feature` each; empty for a service.
        full_feature_names: Whether to name them `view__feature`.
    """

    service: str
    references: tuple[str, ...] = ()
    full_feature_names: bool = False
    _hash: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # Looked up several times per request; a tuple's hash is made anew each time.
        key = self.service, self.references, self.full_feature_names
        object.__setattr__(self, "_hash", hash(key))

    def __hash__(self) -> int:
        return self._hash


class FeaturePlans:
    """
    Finds plans by selection. Safe for several threads at once.

    Args:
        repo: Compiles them.
    """

    def __init__(self, repo: FeatureRepo) -> None:
        self.repo = repo
        self._lock = threading.Lock()
        self._plans: OrderedDict[Selection, FeaturePlan] = OrderedDict()

    def find(self, selection: Selection) -> FeaturePlan:
        """
        Return the plan of a selection; compiling one takes milliseconds.

        Raises:
            InvalidRequest: nothing is selected, too much, or references that are none.
            FeaturesNotFound: no such service, view or feature.
            FeaturesNotServable: they are registered, and cannot be read.
        """
        with self._lock:
            plan = self._plans.get(selection)
            if plan is not None:
                self._plans.move_to_end(selection)
                return plan
        plan = self._compile(selection)
        with self._lock:
            self._plans[selection] = plan
            if len(self._plans) > PLANS_MAX:
                self._plans.popitem(last=False)
        return plan

    def services(self) -> tuple[str, ...]:
        """Return the names of all feature services, sorted."""
        return self.repo.services()

    def _compile(self, selection: Selection) -> FeaturePlan:
        full = selection.full_feature_names
        try:
            if selection.service:
                return self.repo.compile(selection.service, full_feature_names=full)
            if not selection.references:
                raise InvalidRequest("request names no feature service and no features")
            if len(selection.references) > REFERENCES_MAX:
                raise InvalidRequest(
                    f"request has {len(selection.references)} features; "
                    f"at most {REFERENCES_MAX} are accepted"
                )
            return self.repo.compile_references(selection.references, full_feature_names=full)
        except UnknownFeatures as error:
            raise FeaturesNotFound(str(error)) from None
        except FeaturePlanError as error:
            if selection.service:
                raise FeaturesNotServable(str(error)) from None
            raise InvalidRequest(str(error)) from None
