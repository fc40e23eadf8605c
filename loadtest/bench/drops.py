"""What a gateway let fall of what watches it: who tells of half costs half. Pure.

Source: `headrace_stream_rows_total`, `headrace_spans_total`, `headrace_call_records_dropped_total`
and `headrace_requests_total`, in docs/operations.md.
"""

from collections import Counter
from typing import NamedTuple

from prometheus_client.parser import text_string_to_metric_families

DROPPED_SHARE_MAX = 0.05
"""By more than that a cost of some percent would look smaller than it is."""


class Drop(NamedTuple):
    """So many of something were not told of."""

    what: str
    lost: float
    of: float

    @property
    def is_too_much(self) -> bool:
        return self.lost > DROPPED_SHARE_MAX * self.of

    def __str__(self) -> str:
        return f"{self.lost:,.0f} of {self.of:,.0f} {self.what}"


def drops(metrics: str) -> list[Drop]:
    """Return what was dropped, from the text of `/metrics`, since the gateway began."""
    counts: Counter[tuple[str, str]] = Counter()
    for family in text_string_to_metric_families(metrics):
        for sample in family.samples:
            counts[sample.name, sample.labels.get("result", "")] += sample.value
    asked = sum(count for (name, _), count in counts.items() if name == "headrace_requests_total")
    found = [Drop("calls' records", counts["headrace_call_records_dropped_total", ""], asked)]
    for name, what in (
        ("headrace_stream_rows_total", "streamed rows"),
        ("headrace_spans_total", "spans"),
    ):
        lost = counts[name, "dropped"] + counts[name, "refused"]
        kept = counts[name, "sent"] + counts[name, "exported"]
        found.append(Drop(what, lost, lost + kept))
    return [drop for drop in found if drop.lost]
