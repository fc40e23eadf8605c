"""One table: which error is which gRPC status, and what travels with it."""

import itertools
import math
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import grpc
import structlog
from google.rpc import error_details_pb2, status_pb2

from headrace import errors
from headrace.telemetry.trace_context import Trace

_LOG = structlog.get_logger(__name__)

ERROR_DOMAIN = "headrace.v1"
DETAILS_BYTES_MAX = 2_000
"""
Of details as they travel: UTF-8, all but ASCII percent-encoded, three bytes for one. They go out
twice, and clients refuse more than 8 KiB of headers.
"""

REMEMBERED_MAX = 1_024
"""Statuses that are kept; callers can make up messages without end."""

REMEMBERED_CHARS_MAX = 256
"""Of the message of one that is kept."""

RETRY_AFTER_S = 0.1
"""What an overloaded server asks of clients that retry if it does not know. Source: gRFC A6."""

RETRY_SPREAD = tuple([0.5 + (7 * i % 16 + 0.5) / 16 for i in range(16)])
"""
What one after another is told, as shares of when he may come again: pushback takes the place of a
client's own jitter, and who was refused at one moment must not come back at one moment.
"""

RETRY_PUSHBACK_MAX_MS = 60_000
"""The most that it asks where it knows when they may come again."""

CODES: dict[type[errors.ServingError], grpc.StatusCode] = {
    errors.InvalidRequest: grpc.StatusCode.INVALID_ARGUMENT,
    errors.NotFound: grpc.StatusCode.NOT_FOUND,
    errors.PreconditionFailed: grpc.StatusCode.FAILED_PRECONDITION,
    errors.PermissionDenied: grpc.StatusCode.PERMISSION_DENIED,
    errors.NotReady: grpc.StatusCode.UNAVAILABLE,
    errors.Overloaded: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.DeadlineExceeded: grpc.StatusCode.DEADLINE_EXCEEDED,
    errors.CallerLeft: grpc.StatusCode.CANCELLED,
    errors.DependencyUnavailable: grpc.StatusCode.UNAVAILABLE,
    errors.ComputationFailed: grpc.StatusCode.INTERNAL,
    errors.BackendError: grpc.StatusCode.INTERNAL,
}
"""A class not listed takes the code of its nearest listed base."""


@dataclass(frozen=True, slots=True)
class Status:
    """
    A gRPC status as it goes out.

    Args:
        code: Its name and number.
        details: For people; at most `DETAILS_BYTES_MAX` as they travel.
        trailing: Trailing metadata for machines.
    """

    code: grpc.StatusCode
    details: str
    trailing: tuple[tuple[str, str | bytes], ...] = ()


def status_of(error: Exception, trace: Trace | None = None) -> Status:
    """
    Turn any error into what its caller may see.

    A `ServingError` keeps its message; anything else is a bug: logged once with the trace's id, or
    an incident number where there is no trace, and answered with that and nothing more. Whatever is
    INTERNAL names its trace.
    """
    if not isinstance(error, errors.ServingError):
        if trace is not None:
            incident = f"trace {trace.trace_id.hex()}"
        else:
            incident = f"incident {secrets.token_hex(8)}"
        _LOG.error("rpc_failed", incident=incident, exc_info=error)
        return Status(grpc.StatusCode.INTERNAL, f"internal error, {incident}")
    kind, message = type(error), str(error)
    if trace is not None and _code_of(kind) is grpc.StatusCode.INTERNAL:
        return _status(kind, f"{message}, trace {trace.trace_id.hex()}")
    if isinstance(error, errors.Overloaded) and not isinstance(error, errors.QuotaExceeded):
        return next(statuses_of(error))
    if len(message) > REMEMBERED_CHARS_MAX:
        return _status(kind, message)
    status = _remembered(kind, message)  # type: ignore[arg-type]  # mypy: classes have no hash
    if isinstance(error, errors.QuotaExceeded):
        after_ms = math.ceil(min(error.retry_after_s * 1000, RETRY_PUSHBACK_MAX_MS))
        return _later(status, after_ms)
    return status


def statuses_of(error: errors.Overloaded) -> Iterator[Status]:
    """Return without end what callers are told of an error in turn: all the same, but for when."""
    return _spread(str(error), error.retry_after_s or RETRY_AFTER_S)


@lru_cache(maxsize=REMEMBERED_MAX // 8)
def _spread(message: str, after_s: float) -> Iterator[Status]:
    status = _status(errors.Overloaded, message)
    return itertools.cycle(
        [_later(status, math.ceil(1_000 * after_s * share)) for share in RETRY_SPREAD]
    )


def _later(status: Status, after_ms: int) -> Status:
    """Say when to come again."""
    pushback = "grpc-retry-pushback-ms", str(after_ms)
    return Status(status.code, status.details, (*status.trailing, pushback))


def _status(kind: type[errors.ServingError], message: str) -> Status:
    code, details = _code_of(kind), _cut(message)
    trailing: tuple[tuple[str, str | bytes], ...] = (
        ("grpc-status-details-bin", _rich(code, details, kind.__name__)),
    )
    return Status(code, details, trailing)


# A server that is asked too much says the same again and again; it took half of a refusal's time.
_remembered = lru_cache(maxsize=REMEMBERED_MAX)(_status)


def _code_of(kind: type[errors.ServingError]) -> grpc.StatusCode:
    return next(CODES[base] for base in kind.__mro__ if base in CODES)


def _cut(details: str) -> str:
    """Cut details to what fits, between characters."""
    room = DETAILS_BYTES_MAX - len("%E2%80%A6")
    for i, character in enumerate(details):
        is_plain = " " <= character <= "~" and character != "%"
        room -= 1 if is_plain else 3 * len(character.encode(errors="replace"))
        if room < 0:
            return details[:i] + "…"
    return details


def _rich(code: grpc.StatusCode, details: str, class_name: str) -> bytes:
    """Add the machine-readable reason. Source: AIP-193, `google.rpc.ErrorInfo`."""
    reason = "".join(f"_{c}" if c.isupper() else c.upper() for c in class_name).lstrip("_")
    status = status_pb2.Status(code=code.value[0], message=details)
    status.details.add().Pack(error_details_pb2.ErrorInfo(reason=reason, domain=ERROR_DOMAIN))
    return bytes(status.SerializeToString())
