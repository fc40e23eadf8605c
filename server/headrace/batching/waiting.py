"""What a queue needs to know of a request that waits in it."""

from collections.abc import Hashable, Sequence
from typing import Any, Protocol, TypeVar

from headrace.batching.callers import Caller


class Waiting(Protocol):
    """What the queue needs to know of a request."""

    rows: int
    byte_count: int
    """What it holds in memory, about."""
    arrival_s: float
    """On `time.perf_counter`'s clock."""
    deadline_s: float
    """When it must have been answered, Unix seconds; infinite when it need not."""
    priority: int
    """1 is served first; 0 for the default level."""
    timeout_s: float
    """How long it may wait for its batch, as its caller says; 0 when he does not."""
    caller: Caller
    """Who asks; he shares a fair queue with the others."""
    is_shed: bool
    """Whether it is dropped because the queue stands; the queue sets it."""
    is_displaced: bool
    """Whether it is dropped to make room for one of a higher level; likewise."""
    retry_after_s: float | None
    """When it may come again if it is dropped for what waits; the batcher sets it."""
    place: Any
    """The queue's own."""
    waits_in: Any
    """The batcher's own."""

    @property
    def batch_key(self) -> Hashable:
        """Requests share a batch only when their keys are equal."""

    @property
    def parts(self) -> Sequence[Any]:
        """
        All parts of the request that it is one of, itself among them, in the order in which they
        were added; the same object for each. Empty for a whole one, and once nobody waits.
        """

    def expired(self, now_s: float) -> bool:
        """Say whether its caller has left, or its deadline has passed (Unix seconds)."""

    def drop(self) -> None:
        """Answer a request that is given up."""


RequestT = TypeVar("RequestT", bound=Waiting)
