"""Which calls are traced, and as whose children: W3C Trace Context and the sampling decision. Pure.

Source: W3C Trace Context, "traceparent header" (level 2); OpenTelemetry, "Sampling" and
"OTEL_TRACES_SAMPLER".
"""

import math
import random
import re
from collections.abc import Callable, Iterable
from typing import NamedTuple

from headrace.errors import StartupError

DEFAULT_ROOT_RATIO = 0.01
TRACESTATE_LENGTH_MAX = 512

# version 00 has exactly these four; a later one may have more, each after a dash.
_TRACEPARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_SAMPLED = 0x01


class Parent(NamedTuple):
    """
    What a `traceparent` says.

    Args:
        trace_id: 16 bytes, not all zero.
        span_id: The caller's span; 8 bytes, not all zero.
        is_sampled: Whether the caller records its part.
    """

    trace_id: bytes
    span_id: bytes
    is_sampled: bool


class Trace:
    """
    One sampled call, and the ids of its spans: one stem, and a number for each.

    Args:
        trace_id: 16 bytes.
        parent_id: The caller's span; empty at the root.
        stem: The first 7 bytes of every id.
        state: The caller's `tracestate`, to be kept.

    Attributes:
        called_s: When another server was called and told that it continues this trace, on
            `time.perf_counter`'s clock.
    """

    __slots__ = ("called_s", "parent_id", "state", "stem", "trace_id")

    def __init__(self, trace_id: bytes, parent_id: bytes, stem: bytes, state: str = "") -> None:
        self.trace_id = trace_id
        self.parent_id = parent_id
        self.stem = stem
        self.state = state
        self.called_s: float | None = None

    def id_of(self, number: int) -> bytes:
        """Return the id of the call's span of that number, from 1 to 255."""
        return self.stem + bytes((number,))

    @property
    def span_id(self) -> bytes:
        """The id of the call's own span."""
        return self.stem + b"\x01"


class Rule(NamedTuple):
    """
    How the decision is made.

    Args:
        root_ratio: Share of calls without a caller's trace that begin one.
        follows_parent: Whether a caller's decision is ours; otherwise its calls are like others.
    """

    root_ratio: float
    follows_parent: bool = True


def parse_traceparent(text: str) -> Parent | None:
    """Read a `traceparent`; None for one that must be ignored."""
    match = _TRACEPARENT.fullmatch(text)
    if match is None:
        return None
    version, trace, span, flags, more = match.groups()
    if version == "ff" or (version == "00" and more):
        return None
    trace_id, span_id = bytes.fromhex(trace), bytes.fromhex(span)
    if not any(trace_id) or not any(span_id):
        return None
    return Parent(trace_id, span_id, bool(int(flags, 16) & _SAMPLED))


def format_traceparent(trace_id: bytes, span_id: bytes) -> str:
    """Write the `traceparent` of a sampled span."""
    return f"00-{trace_id.hex()}-{span_id.hex()}-01"


def parse_sampler(name: str | None, argument: str | None) -> Rule | None:
    """
    Read OTEL_TRACES_SAMPLER and its argument.

    Returns:
        None for `always_off`.

    Raises:
        StartupError: they make no sense.
    """
    ratio = _ratio(argument)
    rules: dict[str, Rule | None] = {
        "always_on": Rule(1.0, follows_parent=False),
        "always_off": None,
        "traceidratio": Rule(ratio, follows_parent=False),
        "parentbased_always_on": Rule(1.0),
        "parentbased_always_off": Rule(0.0),
        "parentbased_traceidratio": Rule(ratio),
    }
    chosen = name or "parentbased_traceidratio"
    if chosen not in rules:
        raise StartupError(f"OTEL_TRACES_SAMPLER: expected one of {', '.join(rules)}")
    return rules[chosen]


class Sampler:
    """
    Decides call by call. Unsampled calls allocate nothing.

    Args:
        rule: How.
        uniform: Returns random numbers in [0, 1).
        random_bits: Returns random whole numbers of so many bits.
    """

    def __init__(
        self,
        rule: Rule,
        uniform: Callable[[], float] = random.random,
        random_bits: Callable[[int], int] = random.getrandbits,
    ) -> None:
        self._follows_parent = rule.follows_parent
        self._ratio = rule.root_ratio
        self._uniform = uniform
        self._random_bits = random_bits
        self._skips = self._next_skips()

    def sample(self, metadata: Iterable[tuple[str, str | bytes]]) -> Trace | None:
        """
        Decide about a call.

        Args:
            metadata: What came with it; keys in lower case.
        """
        parent = None
        for key, value in metadata:
            if key == "traceparent":
                parent = parse_traceparent(value) if isinstance(value, str) else None
                break
        if parent is not None and self._follows_parent:
            if not parent.is_sampled:
                return None
        elif self._skips:
            self._skips -= 1
            return None
        else:
            self._skips = self._next_skips()
        if parent is None:
            return self.begin()
        return Trace(parent.trace_id, parent.span_id, self._stem(), _state(metadata))

    def another(self, trace: Trace) -> Trace:
        """
        Return a trace for one more call of a sampled stream.

        Under the same caller's span, or where there is none in a trace of its own: a stream may
        last, and a trace must end.
        """
        if not trace.parent_id:
            return self.begin()
        return Trace(trace.trace_id, trace.parent_id, self._stem(), trace.state)

    def begin(self) -> Trace:
        """Begin a trace."""
        ids = (self._random_bits(184) or 1).to_bytes(23, "little")
        return Trace(ids[:16], b"", ids[16:])

    def _stem(self) -> bytes:
        return self._random_bits(56).to_bytes(7, "big")

    def _next_skips(self) -> float:
        """
        Draw how many root calls to pass over: one random number per trace, not per call.

        Source: the geometric distribution by inversion.
        """
        if self._ratio >= 1:
            return 0
        if self._ratio <= 0:
            return math.inf
        return math.floor(math.log(1 - self._uniform()) / math.log(1 - self._ratio))


def _state(metadata: Iterable[tuple[str, str | bytes]]) -> str:
    values = [v for key, v in metadata if key == "tracestate" and isinstance(v, str)]
    joined = ",".join(values)
    return joined if len(joined) <= TRACESTATE_LENGTH_MAX else ""


def _ratio(argument: str | None) -> float:
    try:
        ratio = DEFAULT_ROOT_RATIO if not argument else float(argument)
    except ValueError:
        ratio = math.nan
    if not 0 <= ratio <= 1:
        raise StartupError("OTEL_TRACES_SAMPLER_ARG: expected a number from 0 to 1")
    return ratio
