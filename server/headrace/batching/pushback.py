"""When those who are refused may come again: by what waits, in a few fixed steps. Pure.

Few, so that what they are told is made once for each step and not for each of them.
"""

from bisect import bisect_left

UNKNOWN_S = 0.1
"""Where nothing is known of how long a batch takes."""

RETRY_STEPS_S = (0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4)


def retry_step_s(wait_s: float) -> float:
    """
    Return in how many seconds it may go better: the next step above, or the last.

    Args:
        wait_s: Until what waits now has been run, about; 0 where that is not known.
    """
    wait_s = wait_s or UNKNOWN_S
    return RETRY_STEPS_S[min(bisect_left(RETRY_STEPS_S, wait_s), len(RETRY_STEPS_S) - 1)]
