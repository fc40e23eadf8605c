"""When requests are due: at random (Poisson) or evenly, in steps of a rate each.

Pure: the same seed gives the same times.

Source: a Poisson process' times in an interval are as many as a Poisson variate says, each uniform
(Kingman, "Poisson Processes", 1993, section 2.1).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Step(NamedTuple):
    """So many requests a second, for so long."""

    rate_per_s: float
    seconds: float


def poisson(steps: Sequence[Step], seed: int) -> NDArray[np.float64]:
    """Return when requests are due, in seconds from the first step's beginning, ascending."""
    rng = np.random.default_rng(seed)
    begin_s, times_s = 0.0, [np.empty(0)]
    for rate_per_s, seconds in steps:
        count = rng.poisson(rate_per_s * seconds)
        times_s.append(begin_s + np.sort(rng.random(count)) * seconds)
        begin_s += seconds
    return np.concatenate(times_s)


def even(steps: Sequence[Step]) -> NDArray[np.float64]:
    """Return the same, each step's first request at once and the others at equal distances."""
    begin_s, times_s = 0.0, [np.empty(0)]
    for rate_per_s, seconds in steps:
        count = np.ceil(rate_per_s * seconds - 1e-9)
        times_s.append(begin_s + np.arange(count) / rate_per_s)
        begin_s += seconds
    return np.concatenate(times_s)
