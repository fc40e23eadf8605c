"""Who a request's caller is, from a header that comes with it. Pure.

What the header says is believed: whoever lets strangers reach the port lets a proxy set it.
"""

from collections.abc import Sequence
from hashlib import blake2b
from typing import TypeAlias

NAME_LENGTH_MAX = 64
"""Characters of a name that is kept as it is; of a longer one a digest is."""

Caller: TypeAlias = str | bytes
"""A name, or the digest of a long one: the two are never equal."""

NOBODY: Caller = ""
"""Everybody who does not say who he is, together."""

_DIGEST_BYTES = 16


def caller_of(metadata: Sequence[tuple[str, str | bytes]], header: str) -> Caller:
    """
    Return who calls.

    Args:
        metadata: What came with the call; keys in lower case. Of several such headers the last
            counts: a proxy adds its own behind those of its callers.
        header: The key, in lower case.

    Returns:
        At most `NAME_LENGTH_MAX` characters, or 16 bytes.
    """
    for key, value in reversed(metadata):
        if key == header:
            if isinstance(value, str) and len(value) <= NAME_LENGTH_MAX:
                return value
            data = value.encode(errors="surrogatepass") if isinstance(value, str) else value
            return blake2b(data, digest_size=_DIGEST_BYTES).digest()
    return NOBODY
