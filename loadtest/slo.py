"""The targets in `slo.yaml`, and whether what Locust found meets them. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

FILE = Path(__file__).with_name("slo.yaml")

Percentile = Literal["p50", "p95", "p99"]


Milliseconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
"""Nothing exceeds infinity or not-a-number: as a target either would always be met."""


class Scenario(BaseModel):
    """One scenario: what is offered, and what must come of it."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    shape: Literal["steady", "ramp", "spike"]
    users: int = Field(ge=1, le=1_000)
    seconds: float = Field(ge=1, le=3_600)
    reload_every_s: float | None = Field(None, ge=0.5)
    latency_ms: dict[str, Annotated[dict[Percentile, Milliseconds], Field(min_length=1)]] = Field(
        min_length=1
    )
    error_share: float = Field(ge=0, le=1)
    achieved_share: float = Field(gt=0, le=1)


class Targets(BaseModel):
    """The file."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    scenarios: dict[str, Scenario] = Field(min_length=1)


@dataclass(frozen=True, slots=True)
class Requests:
    """
    What Locust found of one kind of request.

    Args:
        name: As the user names it.
        count: How many were answered or failed.
        failures: How many failed.
        times_ms: How many took so long, by milliseconds as Locust rounds them.
    """

    name: str
    count: int
    failures: int
    times_ms: Mapping[float, int]

    def percentile_ms(self, percentile: str) -> float:
        """Return the least time that so many per cent did not exceed; infinite without any."""
        share, seen = int(percentile[1:]) / 100, 0
        total = sum(self.times_ms.values())
        for ms in sorted(self.times_ms):
            seen += self.times_ms[ms]
            if seen >= share * total:
                return ms
        return float("inf")


def read_targets(path: Path = FILE) -> Targets:
    """
    Read the file.

    Raises:
        ValueError: it cannot be read; the message names each wrong place.
    """
    try:
        return Targets.model_validate(yaml.load(path.read_text(), _UniqueKeys))
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"{path.name}: {error}") from None
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, at['loc']))}: {at['msg']}" for at in error.errors()]
        raise ValueError(f"{path.name}: {'; '.join(faults)}") from None


def read_statistics(entries: Sequence[Mapping[str, Any]]) -> list[Requests]:
    """Read what `locust --json` printed."""
    return [
        Requests(
            name=str(entry["name"]),
            count=int(entry["num_requests"]),
            failures=int(entry["num_failures"]),
            times_ms={float(ms): int(n) for ms, n in entry["response_times"].items()},
        )
        for entry in entries
    ]


def missed(
    scenario: Scenario, found: Sequence[Requests], *, achieved_per_s: float, offered_per_s: float
) -> list[str]:
    """Name each target that was missed: what, found, wanted."""
    faults = []
    by_name = {requests.name: requests for requests in found}
    for name, limits in scenario.latency_ms.items():
        requests = by_name.get(name)
        if requests is None or not requests.count:
            faults.append(f"{name}: no request was made")
            continue
        for percentile, limit_ms in limits.items():
            ms = requests.percentile_ms(percentile)
            if ms > limit_ms:
                faults.append(f"{name}: {percentile} {ms:g} ms, wanted at most {limit_ms:g}")
    total = sum(requests.count for requests in found)
    failures = sum(requests.failures for requests in found)
    if failures > scenario.error_share * total:
        faults.append(
            f"{failures} of {total} requests failed, wanted at most {scenario.error_share:.1%}"
        )
    if achieved_per_s < scenario.achieved_share * offered_per_s:
        faults.append(
            f"{achieved_per_s:.0f} of {offered_per_s:.0f} offered requests/s were sent, wanted "
            f"at least {scenario.achieved_share:.0%}: Locust or the machine is the limit"
        )
    return faults


class _UniqueKeys(yaml.SafeLoader):
    """Refuses a key that is there twice: YAML's readers forget the first, a target with it."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:  # noqa: FBT001, FBT002 YAML's signature
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for (key, _), name in zip(node.value, keys, strict=True):
            if keys.count(name) > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f"'{name}' is there twice", key.start_mark
                )
        return super().construct_mapping(node, deep)
