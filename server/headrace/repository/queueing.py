"""How requests wait and what batches they make, as a model's `config.pbtxt` has it.

Source: Triton, `ModelDynamicBatching` and `ModelQueuePolicy` in `model_config.proto`.
"""

import json
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from tritonclient.grpc import model_config_pb2

from headrace.repository.parameters import Parameters, shown, wrong

MAX_QUEUE_DELAY_S = 60.0
PRIORITY_LEVELS_MAX = 64
ALLOWED_SIZES_MAX = 64

CODEL_INTERVAL_MS = 100.0
"""When a file does not say. Source: RFC 8289, section 4.2."""


class QueueLevel(NamedTuple):
    """
    How requests of one priority level wait, as the file has it.

    Args:
        max_queue_size: Most of them waiting at once; 0 for the server's own limit.
        timeout_s: Longest that one waits for its batch, in seconds; infinite when not given.
        is_delayed: Whether one that has waited so long goes last, instead of being given up.
        may_override: Whether a request may ask for a shorter time.
    """

    max_queue_size: int = 0
    timeout_s: float = math.inf
    is_delayed: bool = False
    may_override: bool = False


class QueueControl(NamedTuple):
    """
    How long may be waited in a queue that stands, as the file has it.

    Args:
        target_s: The longest wait that is put up with.
        interval_s: How long more than that is put up with.
    """

    target_s: float
    interval_s: float


def queue_control(parameters: Parameters, delay_s: float) -> QueueControl | None:
    """
    Return what is done about a queue that stands; None for nothing.

    Args:
        parameters: The file's.
        delay_s: How long a request waits for a better batch, which is no standing.

    Raises:
        ModelLoadError: a value that cannot be, or an interval that controls nothing.
    """
    target_ms = parameters.positive("codel_target_ms")
    interval_ms = parameters.positive("codel_interval_ms")
    if target_ms is None:
        if interval_ms is not None:
            raise wrong("parameter 'codel_interval_ms' needs the parameter 'codel_target_ms'")
        return None
    if target_ms / 1000 <= delay_s:
        raise wrong(
            f"parameter 'codel_target_ms' is {target_ms:g}; expected more than "
            f"max_queue_delay_microseconds, {delay_s * 1000:g} ms"
        )
    return QueueControl(target_ms / 1000, (interval_ms or CODEL_INTERVAL_MS) / 1000)


def queue_levels(dynamic_batching: Any) -> tuple[QueueLevel, ...]:
    """
    Return the policy of each priority level, of level 1 first; of the only one without levels.

    Args:
        dynamic_batching: `ModelConfig.dynamic_batching`.

    Raises:
        ModelLoadError: levels that are not there are named, or too many.
    """
    levels = dynamic_batching.priority_levels
    default_level = dynamic_batching.default_priority_level
    policies = dynamic_batching.priority_queue_policy
    if levels > PRIORITY_LEVELS_MAX:
        raise wrong(f"priority_levels is {levels}; expected at most {PRIORITY_LEVELS_MAX}")
    if levels and not 1 <= default_level <= levels:
        raise wrong(f"default_priority_level is {default_level}; expected 1 to {levels}")
    if not levels and (default_level or policies):
        key = "default_priority_level" if default_level else "priority_queue_policy"
        raise wrong(f"{key} needs priority_levels")
    for level in policies:
        if not 1 <= level <= levels:
            raise wrong(f"priority_queue_policy has level {level}; expected 1 to {levels}")
    default = dynamic_batching.default_queue_policy
    return tuple(_policy(policies.get(level, default)) for level in range(1, max(1, levels) + 1))


def queue_delay_s(dynamic_batching: Any) -> float:
    """
    Return how long a request waits for a better batch, in seconds.

    Raises:
        ModelLoadError: too long.
    """
    delay_us = dynamic_batching.max_queue_delay_microseconds
    if delay_us > MAX_QUEUE_DELAY_S * 1e6:
        raise wrong(
            f"max_queue_delay_microseconds is {delay_us}; "
            f"expected at most {MAX_QUEUE_DELAY_S * 1e6:.0f}"
        )
    return float(delay_us / 1e6)


def preferred_batch_sizes(dynamic_batching: Any) -> tuple[int, ...]:
    """
    Return the row counts that are worth waiting for, ascending.

    Raises:
        ModelLoadError: one is none.
    """
    for size in dynamic_batching.preferred_batch_size:
        if size < 1:
            raise wrong(f"preferred_batch_size has {size}; expected sizes above 0")
    return tuple(sorted(set(dynamic_batching.preferred_batch_size)))


def preserve_ordering(dynamic_batching: Any) -> bool:
    """
    Say whether replies leave in the order in which requests came.

    Raises:
        ModelLoadError: requests are to overtake one another besides, as in Triton.
    """
    if not dynamic_batching.preserve_ordering:
        return False
    if dynamic_batching.priority_levels > 1:
        raise wrong("preserve_ordering does not go with more than one of priority_levels")
    policies = (
        dynamic_batching.default_queue_policy,
        *dynamic_batching.priority_queue_policy.values(),
    )
    if any(policy.timeout_action == model_config_pb2.ModelQueuePolicy.DELAY for policy in policies):
        raise wrong("preserve_ordering does not go with timeout_action DELAY")
    return True


def allowed_batch_sizes(text: str | None) -> tuple[int, ...]:
    """
    Read the parameter of that name.

    Raises:
        ModelLoadError: it is not a list of sizes.
    """
    if text is None:
        return ()
    expected = f"expected a JSON list of 1 to {ALLOWED_SIZES_MAX} row counts above 0, ascending"
    try:
        sizes = json.loads(text)
    except (ValueError, RecursionError):
        raise wrong(f"parameter 'allowed_batch_sizes' is not JSON; {expected}") from None
    if (
        not isinstance(sizes, list)
        or not 0 < len(sizes) <= ALLOWED_SIZES_MAX
        or not all(type(size) is int and size > 0 for size in sizes)
        or sorted(set(sizes)) != sizes
    ):
        raise wrong(f"parameter 'allowed_batch_sizes' is {shown(text)}; {expected}")
    return tuple(sizes)


def max_queue_size(levels: Sequence[QueueLevel]) -> int:
    """Return how many requests may wait in all; 0 where a level has no limit of its own."""
    sizes = [level.max_queue_size for level in levels]
    return sum(sizes) if all(sizes) else 0


def check_parts(max_request_rows: int, max_batch_size: int, queue_sizes: Sequence[int]) -> None:
    """
    Check that the parts of the largest request may wait together.

    Raises:
        ModelLoadError: they may not: such a request would be refused whenever it came.
    """
    parts = -(-max_request_rows // max(1, max_batch_size))
    if parts > min(queue_sizes):
        raise wrong(
            f"parameter 'max_request_rows' is {max_request_rows}, which is {parts} batches; "
            f"expected no more than may wait in the queue, {min(queue_sizes)}"
        )


def _policy(message: Any) -> QueueLevel:
    timeout_us = message.default_timeout_microseconds
    return QueueLevel(
        max_queue_size=message.max_queue_size,
        timeout_s=timeout_us / 1e6 if timeout_us else math.inf,
        is_delayed=message.timeout_action == model_config_pb2.ModelQueuePolicy.DELAY,
        may_override=message.allow_timeout_override,
    )
