"""What is known of the models of a repository: their files, what serves, what failed and why."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from headrace.repository.config import ModelConfig
from headrace.repository.policy import VersionPolicy, VersionView
from headrace.repository.scan import ModelFolder, VersionFolder


class Served(Protocol):
    """What a loaded version can do for the manager: `predict.ServedModel`."""

    def start(self) -> None: ...

    def stop(self, timeout_s: float) -> bool:
        """Finish what waits and end; say whether that was done in time."""

    def close(self) -> None: ...


ServedT = TypeVar("ServedT", bound=Served)


@dataclass(frozen=True, slots=True)
class ModelEntry(Generic[ServedT]):
    """
    One model of the repository, as it is at one moment.

    Args:
        name: The folder's name.
        config: None when it could not be read, or nothing was loaded yet.
        versions: Those that serve, by number.
        failures: Why others do not, by number; 0 stands for the model as a whole. For the
            operator, never for a caller.
        loading: The version that is being loaded now.
    """

    name: str
    config: ModelConfig | None
    versions: Mapping[int, ServedT]
    failures: Mapping[int, str]
    loading: int | None = None


@dataclass(slots=True)
class Build(Generic[ServedT]):
    """A version that serves."""

    fingerprint: str
    config: ModelConfig
    served: ServedT


@dataclass(slots=True)
class Seen:
    """A version's files at the last look, and since when they have been so."""

    folder: VersionFolder | None
    fingerprint: str | None
    since_s: float
    is_settled: bool


@dataclass(slots=True)
class Model(Generic[ServedT]):
    """
    Everything the manager knows of one model; its own, and changed by its thread alone.

    Args:
        name: The folder's name.
        folder: As it was at the last look; None when it is gone.
        config: As it was read last.
        reason: Why the configuration cannot be read.
        policy: Which versions should serve.
        seen: Versions on disk, and those that have gone and still serve.
        builds: Versions that serve.
        failed: Why others could not be loaded: fingerprint and reason.
        loading: The version that is being loaded now.
    """

    name: str
    folder: ModelFolder | None = None
    config: ModelConfig | None = None
    reason: str | None = None
    policy: VersionPolicy = field(default_factory=VersionPolicy)
    seen: dict[int, Seen] = field(default_factory=dict)
    builds: dict[int, Build[ServedT]] = field(default_factory=dict)
    failed: dict[int, tuple[str, str]] = field(default_factory=dict)
    loading: int | None = None

    def entry(self) -> ModelEntry[ServedT]:
        """Show it as it is now."""
        failures = {number: reason for number, (_, reason) in self.failed.items()}
        if self.reason is not None:
            failures[0] = self.reason
        newest = max(self.builds, default=None)
        return ModelEntry(
            self.name,
            self.config if newest is None else self.builds[newest].config,
            {number: build.served for number, build in sorted(self.builds.items())},
            failures,
            self.loading,
        )

    def views(self) -> list[VersionView]:
        """Describe its versions to the policy."""
        return [
            VersionView(
                number,
                on_disk=seen.fingerprint,
                is_settled=seen.is_settled,
                serving=self.builds[number].fingerprint if number in self.builds else None,
                failed=self.failed[number][0] if number in self.failed else None,
            )
            for number, seen in self.seen.items()
        ]
