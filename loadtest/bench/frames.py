"""HTTP/2 frames, as far as a load generator needs them.

Source: RFC 9113, sections 3.4 (preface), 4.1 (frame format), 6 (frames), 6.5.2 (settings) and 7
(error codes).
"""

import struct

DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
END_STREAM, END_HEADERS, ACK = 0x1, 0x4, 0x1
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
HEAD_BYTES = 9

MAX_CONCURRENT_STREAMS, INITIAL_WINDOW_SIZE, MAX_FRAME_SIZE = 3, 4, 5
WINDOW_MAX = 2**31 - 1
DEFAULT_WINDOW = 65_535
DEFAULT_FRAME_SIZE = 16_384
LAST_STREAM = 2**31 - 1


def head(length: int, kind: int, flags: int) -> bytes:
    """Return a frame's head, less its stream."""
    return length.to_bytes(3, "big") + bytes((kind, flags))


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """Return a whole frame."""
    return head(len(payload), kind, flags) + struct.pack(">I", stream) + payload


def settings(values: dict[int, int]) -> bytes:
    """Return the payload of a SETTINGS frame."""
    return b"".join(struct.pack(">HI", name, value) for name, value in values.items())


def read_settings(payload: bytes) -> dict[int, int]:
    """Read the payload of a SETTINGS frame."""
    return dict(struct.iter_unpack(">HI", payload))
