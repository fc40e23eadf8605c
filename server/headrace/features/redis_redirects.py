"""Replies of a Redis Cluster's node that send the asker elsewhere. Pure.

Source: https://redis.io/docs/latest/operate/oss_and_stack/reference/cluster-spec/, "Redirection and
resharding" and "Hash tags"; RESP2.
"""

import re
from binascii import crc_hqx
from dataclasses import dataclass
from typing import Literal

SLOTS = 16384

_REDIRECT = re.compile(rb"-(MOVED|ASK) (\d{1,5}) ([^\r\n]*):(\d{1,5})\r\n")
_UNSERVED = (b"-CLUSTERDOWN ", b"-LOADING ", b"-MASTERDOWN ", b"-TRYAGAIN ")


@dataclass(frozen=True, slots=True)
class Redirect:
    """
    Where to ask instead.

    Args:
        kind: MOVED is for good; ASK is for this once, and the question begins with ASKING.
        host: Empty when it is the host that answered.
        port: TCP port.
    """

    kind: Literal["MOVED", "ASK"]
    host: str
    port: int


class DamagedRepliesError(ValueError):
    """The bytes are not the whole replies that they should be."""


def key_slot(key: bytes) -> int:
    """Return a key's hash slot. Braces in the raw bytes of Feast's keys count, too."""
    start = key.find(b"{")
    if start >= 0:
        end = key.find(b"}", start + 1)
        if end > start + 1:
            key = key[start + 1 : end]
    return crc_hqx(key, 0) & (SLOTS - 1)


def may_redirect(data: bytes) -> bool:
    """Return whether an error may be among the replies. Cheap; a value can look like one."""
    return data.startswith(b"-") or b"\r\n-" in data


def read_redirect(reply: bytes) -> Redirect | None:
    """Read one reply; None if it does not redirect."""
    found = _REDIRECT.fullmatch(reply)
    if found is None:
        return None
    host = found[3].decode(errors="replace").strip("[]")
    return Redirect("MOVED" if found[1] == b"MOVED" else "ASK", host, int(found[4]))


def is_unserved(reply: bytes) -> bool:
    """Return whether the reply says that this node cannot tell now, though it may be its slot."""
    return reply.startswith(_UNSERVED)


def split_replies(data: bytes) -> list[bytes]:
    """
    Cut replies apart: arrays of bulk strings, single lines, and errors.

    Raises:
        DamagedRepliesError: they end in the middle of one, or are of another kind.
    """
    replies, start = [], 0
    while start < len(data):
        end = _end_of(data, start)
        replies.append(data[start:end])
        start = end
    return replies


def _end_of(data: bytes, start: int) -> int:
    line_end = data.find(b"\r\n", start)
    if line_end < 0:
        raise DamagedRepliesError("half a line")
    kind, end = data[start : start + 1], line_end + 2
    if kind in b"+-:":
        return end
    if kind == b"*":
        for _ in range(_count(data, start, line_end)):
            end = _end_of(data, end)
    elif kind == b"$":
        length = _count(data, start, line_end)
        if length >= 0:
            end += length + 2
            if data[end - 2 : end] != b"\r\n":
                raise DamagedRepliesError("half a string")
    else:
        raise DamagedRepliesError("no reply begins so")
    return end


def _count(data: bytes, start: int, line_end: int) -> int:
    try:
        return int(data[start + 1 : line_end])
    except ValueError:
        raise DamagedRepliesError("no length") from None
