"""Who waits in a queue without a batcher, and what a batch is known to cost there."""

import math

from headrace.batching.cost import BatchCost


class Caller:
    parts = ()

    def __init__(self, name, due=math.inf, rows=1, priority=0, key="x", timeout_s=0.0):
        self.name, self.deadline_s, self.rows, self.priority = name, due, rows, priority
        self.batch_key, self.timeout_s = key, timeout_s
        self.byte_count, self.arrival_s, self.place = rows, 0.0, None
        self.caller, self.is_shed = "", False

    def expired(self, now_s):
        return self.deadline_s <= now_s


def cost(fixed_s, per_row_s=0.0):
    known = BatchCost()
    for _ in range(50):
        for rows in (1, 16, 64):
            known.observe(rows, fixed_s + per_row_s * rows)
    return known
