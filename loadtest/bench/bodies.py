"""Files of request bodies and of the answers they should get: each behind its length."""

import struct
from collections.abc import Sequence
from pathlib import Path


def write_bodies(path: Path, messages: Sequence[bytes]) -> None:
    """Write serialized messages for `--bodies`: each with gRPC's prefix and a 4-byte length."""
    write_answers(path, [b"\0" + struct.pack(">I", len(message)) + message for message in messages])


def read_bodies(path: Path) -> list[bytes]:
    """Read what `write_bodies` wrote, prefixes included."""
    return read_answers(path)


def write_answers(path: Path, answers: Sequence[bytes]) -> None:
    """Write for `--answers` how the message that answers each body ends."""
    with path.open("wb") as file:
        for answer in answers:
            file.write(struct.pack(">I", len(answer)) + answer)


def read_answers(path: Path) -> list[bytes]:
    """Read what `write_answers` wrote."""
    data, position, answers = path.read_bytes(), 0, []
    while position < len(data):
        (length,) = struct.unpack_from(">I", data, position)
        answers.append(data[position + 4 : position + 4 + length])
        position += 4 + length
    return answers
