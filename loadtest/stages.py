"""How the number of users changes over time: steady, ramp, spike. Pure: importing Locust is not."""

from typing import NamedTuple

SHAPE, USERS, SECONDS = "HEADRACE_SHAPE", "HEADRACE_SHAPE_USERS", "HEADRACE_SHAPE_SECONDS"

RAMP_STEPS = 5
SPIKE_BASE_SHARE = 0.25


class Stage(NamedTuple):
    """So many users until then."""

    until_s: float
    users: int


def plan(shape: str, users: int, seconds: float) -> list[Stage]:
    """
    Divide a test into stages, in order; the last ends after `seconds`.

    Args:
        shape: `steady`; `ramp`, in five steps up to all users; or `spike`, all of them in the
            middle third and a quarter before and after.
        users: At most.
        seconds: In all.
    """
    if shape == "steady":
        return [Stage(seconds, users)]
    if shape == "ramp":
        steps = range(1, RAMP_STEPS + 1)
        return [
            Stage(seconds * (i / RAMP_STEPS), max(1, round(users * i / RAMP_STEPS))) for i in steps
        ]
    if shape == "spike":
        base = max(1, round(users * SPIKE_BASE_SHARE))
        return [Stage(seconds / 3, base), Stage(2 * seconds / 3, users), Stage(seconds, base)]
    raise ValueError(f"no shape '{shape}'")


def user_seconds(stages: list[Stage]) -> float:
    """Return for how long users are there, all of them together."""
    began_s = [0.0, *(stage.until_s for stage in stages)]
    return sum(
        stage.users * (stage.until_s - start_s)
        for stage, start_s in zip(stages, began_s, strict=False)
    )
