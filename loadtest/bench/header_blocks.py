"""The header blocks of requests: one that the server is to remember, and one that recalls it.

Source: RFC 7541, sections 2.3.3 (index address space), 5.1 (integers), 6.1 (indexed fields), 6.2.1
(literals with incremental indexing), 6.2.2 (without) and appendix A (static table); gRPC over
HTTP/2, "Requests" and "Timeout".
"""

from typing import NamedTuple

_METHOD_POST, _SCHEME_HTTP = b"\x83", b"\x86"
_PATH, _AUTHORITY, _CONTENT_TYPE = b"\x44", b"\x41", b"\x5f"
_NEW_NAME = b"\x40"
_LAST_ADDED = 62
_TIMEOUT_DIGITS = 8
_KNOWN_TIMEOUT = b"\x0f" + bytes((_LAST_ADDED - 15,))
"""A literal that is not to be remembered, whose name was the last one to be."""


class HeaderBlocks(NamedTuple):
    """
    The headers of every request of a connection.

    Args:
        first: Of its first request.
        next: Of all others: six or seven bytes, as every gRPC client has them.
        untimed: The same without a timeout, if they have one.
    """

    first: bytes
    next: bytes
    untimed: bytes = b""

    def with_timeout(self, timeout_s: float) -> bytes:
        """
        Return the headers of a call, not the first one, that has only so much time left.

        What a call has waited in its client is no part of its `grpc-timeout`: a gRPC client writes
        what is left when it writes the headers.
        """
        return self.untimed + _KNOWN_TIMEOUT + _text(grpc_timeout(timeout_s))


def header_blocks(path: str, *, timeout_s: float | None = None) -> HeaderBlocks:
    """Return the headers of calls of `path`, each with so much time if it is given."""
    remembered = [
        _PATH + _text(path),
        _AUTHORITY + _text("127.0.0.1"),
        _CONTENT_TYPE + _text("application/grpc"),
        _NEW_NAME + _text("te") + _text("trailers"),
    ]
    if timeout_s is not None:
        remembered.append(_NEW_NAME + _text("grpc-timeout") + _text(grpc_timeout(timeout_s)))
    always = _METHOD_POST + _SCHEME_HTTP
    last = _LAST_ADDED + len(remembered) - 1
    recalled = bytes(0x80 | index for index in range(last, _LAST_ADDED - 1, -1))
    untimed = b"" if timeout_s is None else always + recalled[:-1]
    return HeaderBlocks(always + b"".join(remembered), always + recalled, untimed)


def grpc_timeout(timeout_s: float) -> str:
    """
    Write a timeout: microseconds, or milliseconds where those have more than eight digits.

    Raises:
        ValueError: it is not above 0, or longer than a day.
    """
    if not 0 < timeout_s <= 86_400:
        raise ValueError(f"a timeout is above 0 and at most a day, not {timeout_s:g} s")
    microseconds = max(1, round(timeout_s * 1e6))
    if microseconds < 10**_TIMEOUT_DIGITS:
        return f"{microseconds}u"
    return f"{round(timeout_s * 1e3)}m"


def _text(value: str) -> bytes:
    encoded = value.encode()
    assert len(encoded) < 127
    return bytes((len(encoded),)) + encoded
