"""What the generator reports, computed from its record after the fact. Pure.

Latencies count from when a request was due; in a closed loop that is when it was sent.
"""

from collections.abc import Collection
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from record import OK, UNANSWERED, Record

Figures = dict[str, Any]

NAMES = {
    0: "OK",
    1: "CANCELLED",
    4: "DEADLINE_EXCEEDED",
    8: "RESOURCE_EXHAUSTED",
    14: "UNAVAILABLE",
}
OTHER = "other"
REFUSED = (8, 14)
"""Statuses of a server that will not have a request: RESOURCE_EXHAUSTED and UNAVAILABLE."""

LATE_START_S = 0.005
"""A generator that starts its requests later than this, one in a hundred, is what is measured."""

BUSY_SHARE = 0.95
"""Likewise one that has so little of its core left."""

RECOVERED_SHARE = 0.99


class Window(NamedTuple):
    """The seconds that count, on the record's clock."""

    start_s: float
    end_s: float

    @property
    def seconds(self) -> float:
        """How long it is."""
        return self.end_s - self.start_s


class _Columns(NamedTuple):
    due_s: NDArray[np.float64]
    sent_s: NDArray[np.float64]
    done_s: NDArray[np.float64]
    status: NDArray[np.uint8]
    is_held: NDArray[np.bool_]
    is_wrong: NDArray[np.bool_]

    def where(self, chosen: NDArray[np.bool_]) -> "_Columns":
        return _Columns(*(column[chosen] for column in self))


def closed_loop(
    record: Record,
    window: Window,
    wrong: Collection[int],
    *,
    cpu_share: float,
    idle_share: float | None = None,
) -> Figures:
    """
    Report on a closed loop: on what was answered within the window.

    Returns:
        `requests`, `requests_per_s`, `errors` (not OK, or wrong), `wrong` (of all requests ever
        made), `statuses`, `mean_ms`, `p50_ms`, `p99_ms`, `window_start_s` and
        `window_end_s` on the clock of all processes of this machine, `generator_cpu_share`, and
        `generator_idle_share`: that of its core in which nobody had anything to do, if known.
    """
    columns = _columns(record, wrong)
    inside = columns.where((columns.done_s >= window.start_s) & (columns.done_s < window.end_s))
    latencies_s = inside.done_s - inside.due_s
    return {
        "requests": len(latencies_s),
        "requests_per_s": len(latencies_s) / window.seconds,
        "errors": int(((inside.status != OK) | inside.is_wrong).sum()),
        "wrong": len(wrong),
        "statuses": _statuses(inside.status),
        "mean_ms": _ms(latencies_s.mean()) if len(latencies_s) else None,
        **_quantiles_ms("", latencies_s),
        "window_start_s": window.start_s,
        "window_end_s": window.end_s,
        "generator_cpu_share": cpu_share,
        "generator_idle_share": idle_share,
    }


def open_loop(
    record: Record,
    window: Window,
    wrong: Collection[int],
    *,
    timeout_s: float | None,
    ended_s: float,
    cpu_share: float,
    idle_share: float | None = None,
) -> Figures:
    """
    Report on an open loop: on what was due within the window, whenever it was answered.

    Args:
        record: Of requests that were due before, within and perhaps after the window.
        window: What counts.
        wrong: Requests that were answered OK with an answer that is not theirs.
        timeout_s: An answer is good if it is OK, right and comes so soon after it was due; None
            for any time.
        ended_s: When waiting for answers was given up: what was not answered is as old as that.
        cpu_share: Of one core, that the generator used within the window.
        idle_share: Of the core that it is kept on, in which nobody used it.

    Returns:
        The names of `closed_loop`, and `window_s`, `offered_per_s` (were due), `achieved_per_s`
        (were sent before the window ended), `goodput_per_s`, `held` (waited for the server's limit
        on streams or bytes), `unsent` (never allowed in time), `unanswered`; `served_…` of the
        good ones; `refused_…` from when they were due and `refused_from_send_…` from when they were
        sent; `late_start_…` of those not held; `generator_is_bottleneck`.
    """
    columns = _columns(record, wrong)
    inside = columns.where((columns.due_s >= window.start_s) & (columns.due_s < window.end_s))
    is_sent, is_answered = ~np.isnan(inside.sent_s), inside.status != UNANSWERED
    latencies_s = np.where(is_answered, inside.done_s, ended_s) - inside.due_s
    if timeout_s is not None:  # whoever could not even send it gave it up then
        latencies_s[~is_sent] = np.minimum(latencies_s[~is_sent], timeout_s)
    is_good = _is_good(inside, timeout_s)
    is_refused = np.isin(inside.status, REFUSED)
    late_s = (inside.sent_s - inside.due_s)[is_sent & ~inside.is_held]
    figures: Figures = {
        "requests": int(is_answered.sum()),
        "requests_per_s": int(is_answered.sum()) / window.seconds,
        "errors": int((is_answered & ((inside.status != OK) | inside.is_wrong)).sum()),
        "wrong": len(wrong),
        "statuses": _statuses(inside.status[is_answered]),
        "mean_ms": _ms(latencies_s.mean()) if len(latencies_s) else None,
        **_quantiles_ms("", latencies_s),
        "window_s": window.seconds,
        "window_start_s": window.start_s,
        "window_end_s": window.end_s,
        "offered": len(inside.due_s),
        "offered_per_s": len(inside.due_s) / window.seconds,
        "achieved_per_s": int((inside.sent_s < window.end_s).sum()) / window.seconds,
        "goodput_per_s": int(is_good.sum()) / window.seconds,
        "held": int(inside.is_held.sum()),
        "unsent": int((~is_sent).sum()),
        "unanswered": int((is_sent & ~is_answered).sum()),
        **_quantiles_ms("served_", latencies_s[is_good]),
        **_quantiles_ms("refused_", latencies_s[is_refused]),
        **_quantiles_ms("refused_from_send_", (inside.done_s - inside.sent_s)[is_refused]),
        **_quantiles_ms("late_start_", late_s),
        "generator_cpu_share": cpu_share,
        "generator_idle_share": idle_share,
    }
    late_p99_s = float(np.quantile(late_s, 0.99)) if len(late_s) else 0.0
    figures["generator_is_bottleneck"] = (
        late_p99_s > LATE_START_S
        or cpu_share > BUSY_SHARE
        or bool((~is_sent & ~inside.is_held).any())
    )
    return figures


def recovery_s(
    record: Record, after: Window, wrong: Collection[int], timeout_s: float | None
) -> float | None:
    """
    Return from when on, counted from the window's start, 99 % of what was due was good.

    None if that was not so for the last hundred requests, or the last half of fewer.
    """
    columns = _columns(record, wrong)
    inside = columns.where((columns.due_s >= after.start_s) & (columns.due_s < after.end_s))
    is_good = _is_good(inside, timeout_s)
    left = np.arange(len(is_good), 0, -1)
    share = np.cumsum(is_good[::-1])[::-1] / left
    # What is bad must not be followed by the good that makes up for it.
    recovered = np.flatnonzero((share >= RECOVERED_SHARE) & is_good)
    if not len(recovered) or left[recovered[0]] < min(100, len(is_good) // 2):
        return None
    first = recovered[0]
    return 0.0 if first == 0 else float(inside.due_s[first] - after.start_s)


def _columns(record: Record, wrong: Collection[int]) -> _Columns:
    is_wrong = np.zeros(len(record.due_s), np.bool_)
    is_wrong[list(wrong)] = True
    return _Columns(
        np.array(record.due_s),
        np.array(record.sent_s),
        np.array(record.done_s),
        np.frombuffer(bytes(record.statuses), np.uint8),
        np.frombuffer(bytes(record.held), np.uint8).astype(np.bool_),
        is_wrong,
    )


def _is_good(columns: _Columns, timeout_s: float | None) -> NDArray[np.bool_]:
    is_good = (columns.status == OK) & ~columns.is_wrong
    if timeout_s is not None:
        is_good &= columns.done_s - columns.due_s <= timeout_s
    return is_good


def _statuses(statuses: NDArray[np.uint8]) -> dict[str, int]:
    """Count by name; every name is there, and they add up."""
    counts = np.bincount(statuses, minlength=256)
    named = {name: int(counts[code]) for code, name in NAMES.items()}
    return {**named, OTHER: len(statuses) - sum(named.values())}


def _quantiles_ms(prefix: str, seconds: NDArray[np.float64]) -> Figures:
    names = (f"{prefix}p50_ms", f"{prefix}p99_ms")
    if not len(seconds):
        return dict.fromkeys(names)
    return dict(zip(names, map(_ms, np.quantile(seconds, [0.5, 0.99])), strict=True))


def _ms(seconds: float) -> float:
    return 1e3 * float(seconds)
