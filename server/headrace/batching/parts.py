"""When the parts of a request have their turns: decided from what is known of the cost alone.

Parts that all came at once would hold up whoever comes next until the last of them has run. They
have their turns as if each came when those before it have been run: small requests go between them,
and what is overtaken goes before whoever comes later than its own turn.
"""

from headrace.batching.cost import BatchCost


def turns_apart_s(
    cost: BatchCost, most: int, parts: int, ahead: float, executors: int, left_s: float
) -> float:
    """
    Return how far the turns of a request's parts are apart, in seconds.

    Who overtakes the parts delays the last of them by no more than its turn is put off, unless more
    comes than can be run at all: so it is put off by no more than the request has to spare.

    Args:
        cost: Of a batch.
        most: Rows that a part has, but for the last one.
        parts: How many there are.
        ahead: How many batches wait already.
        executors: How many batches run side by side.
        left_s: Until the request's deadline; infinite without one.
    """
    spare_s = left_s - (ahead + parts) * cost.bound_s(most) / executors
    return max(0.0, min(cost.estimate_s(most) / executors, spare_s / parts))
