"""What to do next about one model's versions: load one, unload one, or nothing.

Decisions only: no clock, no files, no threads. `manager` describes what is there, this module says
what to do, and is asked again when that is done.

Source: TensorFlow Serving, `AvailabilityPreservingPolicy` (load before unload, never down to none);
Triton, "Model Version Policy" (`latest`, `all`, `specific`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class VersionPolicy:
    """
    Which versions of a model should serve.

    Args:
        kind: The newest `count`, all of them, or those in `numbers`.
        count: For `latest`, at least 1.
        numbers: For `specific`.
    """

    kind: Literal["latest", "all", "specific"] = "latest"
    count: int = 1
    numbers: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class VersionView:
    """
    One version as it is now. A fingerprint stands for the content of all its files.

    Args:
        number: Its number.
        on_disk: Fingerprint of its files; None when they are gone.
        is_settled: Whether the files, or their absence, have stood still for long enough.
        serving: Fingerprint of what serves under this number; None when nothing does.
        failed: Fingerprint of what could not be loaded last; None when nothing failed.
    """

    number: int
    on_disk: str | None
    is_settled: bool = True
    serving: str | None = None
    failed: str | None = None


@dataclass(frozen=True, slots=True)
class Load:
    """Load this version; where an older build of it serves, that goes on until the new one does."""

    number: int


@dataclass(frozen=True, slots=True)
class Unload:
    """Take this version out of service."""

    number: int


def next_action(policy: VersionPolicy, versions: Sequence[VersionView]) -> Load | Unload | None:
    """
    Decide what to do next.

    A candidate is loaded before anything is unloaded, a failed one is left alone until its files
    change, and while any version is on disk the last one that serves is never unloaded, whatever
    became of its own files.

    Args:
        policy: Which versions should serve.
        versions: All that are on disk or serve, in any order.

    Returns:
        One action, or None when nothing is to be done before something changes.
    """
    kept: set[int] = set()
    for version in sorted(versions, key=lambda version: -version.number):
        if policy.kind == "latest" and len(kept) >= policy.count:
            break
        if policy.kind == "specific" and version.number not in policy.numbers:
            continue
        if _is_candidate(version):
            return Load(version.number)
        if version.serving is not None and (version.on_disk is not None or not version.is_settled):
            kept.add(version.number)
    superfluous = [v.number for v in versions if v.serving is not None and v.number not in kept]
    if not superfluous or (not kept and any(v.on_disk is not None for v in versions)):
        return None
    return Unload(min(superfluous))


def _is_candidate(version: VersionView) -> bool:
    return (
        version.on_disk is not None
        and version.is_settled
        and version.on_disk not in (version.serving, version.failed)
    )
