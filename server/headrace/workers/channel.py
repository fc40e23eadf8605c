"""Messages between the supervisor and a worker: JSON, a line each, over a pair of sockets.

From the supervisor: `start` (worker, settings, and what `catch_up` has), `catch_up` (seen, loaded
models, log_level) or `begin` (which `built` waits for), `look` (which `state` answers), `numbers`
(id), `change` (id, what, name), `changed` (id, failure), `drain`.
From a worker: `cannot_start` (reason), `built` (seen), `started` and `state` (ready, notes),
`numbers` (id, families), `ask` (id, what, name, timeout_s), `done` (id, failure; whether the
model of a load serves).
"""

import json
from typing import Any

MESSAGE_BYTES_MAX = 32 * 2**20
"""A page of numbers of thousands of model versions is the largest."""

Message = dict[str, Any]


class ChannelBrokenError(Exception):
    """The other side sent what is no message, or too long a one."""


def encode(message: Message) -> bytes:
    """
    Write a message down.

    Raises:
        ChannelBrokenError: it is too long.
    """
    line = json.dumps(message, separators=(",", ":")).encode() + b"\n"
    if len(line) > MESSAGE_BYTES_MAX:
        raise ChannelBrokenError(f"a message of {len(line)} bytes; at most {MESSAGE_BYTES_MAX}")
    return line


class Decoder:
    """Makes messages of bytes as they come."""

    def __init__(self) -> None:
        self._rest = bytearray()

    def feed(self, piece: bytes) -> list[Message]:
        """
        Take what came; return the messages that it completes.

        Raises:
            ChannelBrokenError: it is no message, or too long a one. Nothing more can be read.
        """
        *lines, rest = piece.split(b"\n")
        if lines:
            lines[0] = bytes(self._rest + lines[0])
            self._rest = bytearray(rest)
        else:
            self._rest += rest
        if len(self._rest) > MESSAGE_BYTES_MAX:
            raise ChannelBrokenError(f"a message of over {MESSAGE_BYTES_MAX} bytes")
        return [_message(line) for line in lines]


def _message(line: bytes) -> Message:
    try:
        message = json.loads(line)
    except ValueError:
        message = None
    if not isinstance(message, dict) or not isinstance(message.get("type"), str):
        raise ChannelBrokenError(f"no message: {line[:100]!r}")
    return message
