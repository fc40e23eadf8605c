"""The plans of what callers ask for: compiled at the first request, kept for the next."""

import threading
from collections import OrderedDict
from collections.abc import Mapping
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


def refuse_many_references(count: int) -> None:
    """
    Check how many references a request has.

    Raises:
        InvalidRequest: more than `REFERENCES_MAX`.
    """
    if count > REFERENCES_MAX:
        raise InvalidRequest(f"request has {count} features; at most {REFERENCES_MAX} are accepted")


class FeaturePlans:
    """
    Finds plans by selection, as the registry is now. Safe for several threads at once.

    Args:
        repo: Compiles them.
    """

    def __init__(self, repo: FeatureRepo) -> None:
        self._repo = repo
        self._lock = threading.Lock()
        self._plans: OrderedDict[Selection, FeaturePlan] = OrderedDict()

    @property
    def entity_join_keys(self) -> Mapping[str, str]:
        """Join keys by entity name."""
        return self._repo.entity_join_keys

    def swap(self, repo: FeatureRepo) -> None:
        """Compile from another state of the registry from now on; reads under way go on."""
        with self._lock:
            self._repo = repo
            self._plans.clear()

    def compile(self, selection: Selection) -> FeaturePlan:
        """
        Return the plan of a selection; compiling one takes milliseconds.

        Raises:
            UnknownFeatures: no such service, view or feature.
            FeaturePlanError: they cannot be read.
        """
        with self._lock:
            plan = self._plans.get(selection)
            if plan is not None:
                self._plans.move_to_end(selection)
                return plan
            repo = self._repo
        full = selection.full_feature_names
        if selection.service:
            plan = repo.compile(selection.service, full_feature_names=full)
        else:
            plan = repo.compile_references(selection.references, full_feature_names=full)
        with self._lock:
            if repo is self._repo:
                self._plans[selection] = plan
                if len(self._plans) > PLANS_MAX:
                    self._plans.popitem(last=False)
        return plan

    def find(self, selection: Selection) -> FeaturePlan:
        """
        Return the plan of what a caller selects.

        Raises:
            InvalidRequest: nothing is selected, too much, or references that are none.
            FeaturesNotFound: no such service, view or feature.
            FeaturesNotServable: they are registered, and cannot be read.
        """
        if not selection.service and not selection.references:
            raise InvalidRequest("request names no feature service and no features")
        refuse_many_references(len(selection.references))
        try:
            return self.compile(selection)
        except UnknownFeatures as error:
            raise FeaturesNotFound(str(error)) from None
        except FeaturePlanError as error:
            if selection.service:
                raise FeaturesNotServable(str(error)) from None
            raise InvalidRequest(str(error)) from None

    def services(self) -> tuple[str, ...]:
        """Return the names of all feature services, sorted."""
        return self._repo.services()
