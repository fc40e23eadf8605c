"""Protobuf's wire format for the few fields that are written without a message object.

A serialized message may be the concatenation of serialized parts of it, and a packed field of
fixed-width numbers is their little-endian bytes: so a reply is a constant part made once, plus a
few length-delimited fields, and an output array goes out without a Python object per number.

Source: Protocol Buffers documentation, "Encoding" (length-delimited records, packed repeated
fields, last one wins).
"""

from collections.abc import Sequence

from headrace.errors import InvalidRequest

LENGTH_DELIMITED = 2
_VARINT, _FIXED_BYTES = 0, {1: 8, 5: 4}

MAX_FIELDS = 10_000
"""Fields looked at in a large message; a tensor is two, an element of BYTES one more."""


def varint(value: int) -> bytes:
    """Encode a non-negative integer."""
    if value < 0x80:
        return _ONE_BYTE[value]
    parts = bytearray()
    while value >= 0x80:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    parts.append(value)
    return bytes(parts)


def refuse_costly_parse(message: bytes, path: Sequence[int], limit: int, remedy: str) -> None:
    """
    Refuse a large message with many numbers in it, before it holds up the ingress thread.

    A number in a typed field costs the parser 30 ns, a raw byte nothing: 64 MiB of numbers would
    keep every other caller waiting for seconds.

    Args:
        message: Not parsed yet.
        path: The field at the top of the message with typed numbers in it, and below it those that
            lead to texts, which cost little after all.
        limit: Bytes of numbers that are accepted; 1 MiB is 30 ms at the worst.
        remedy: What to say after "too much in typed …".

    Raises:
        InvalidRequest: there are more.
    """
    if len(message) <= limit:
        return
    costly, _ = _costly_bytes(message, 0, len(message), path, 0, MAX_FIELDS)
    if costly > limit:
        raise InvalidRequest(f"too much in typed {remedy}")


def has_more_fields(message: bytes, limit: int) -> bool:
    """
    Say whether a message that is not parsed yet has more than `limit` fields at its top.

    Takes as long as `limit` fields do, however large the message. One with groups in it has more
    than can be told; what is cut off or wrong is left to the parser.
    """
    position, end = 0, len(message)
    for _ in range(limit):
        if position >= end:
            return False
        key, position = _read_varint(message, position)
        kind = key & 7
        if kind == LENGTH_DELIMITED:
            length, position = _read_varint(message, position)
            position += length
        elif kind == _VARINT:
            _, position = _read_varint(message, position)
        elif kind in _FIXED_BYTES:
            position += _FIXED_BYTES[kind]
        else:
            return True
    return position < end


def _costly_bytes(
    message: bytes, position: int, end: int, path: Sequence[int], depth: int, fields: int
) -> tuple[int, int]:
    """Return bytes of one message that may cost, and how many more fields may be looked at."""
    costly = 0
    while position < end and fields > 0:
        start, fields = position, fields - 1
        key, position = _read_varint(message, position)
        if key & 7 != LENGTH_DELIMITED:
            position = start
            break  # no field that clients write here: all the rest counts
        length, position = _read_varint(message, position)
        if length > end - position:
            position = start
            break
        is_on_path = key >> 3 == path[depth]
        if is_on_path and depth + 1 < len(path):
            below, fields = _costly_bytes(
                message, position, position + length, path, depth + 1, fields
            )
            costly += below
        elif not is_on_path and depth:
            costly += length
        position += length
    return costly + end - position, fields


def _read_varint(message: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    for byte in message[position : position + 10]:
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            break
        shift += 7
    return value, position


def first_fields(message: bytes, count: int) -> tuple[list[bytes], int]:
    """
    Read the fields numbered 1 to `count` at the beginning of a message, without a parser.

    Args:
        message: Not parsed yet; may be no message at all.
        count: At most 15; all of the fields are length-delimited.

    Returns:
        Their contents, empty where one is absent, and where they end. They are all there is of them
        if the writer kept to the order of field numbers, as protobuf's libraries do: where that
        matters, see whether anything follows.
    """
    contents, position, size = [], 0, len(message)
    for number in range(1, count + 1):
        content = b""
        if position + 1 < size and message[position] == number << 3 | LENGTH_DELIMITED:
            length, start = _read_varint(message, position + 1)
            content = message[start : start + length]
            position = start + length
        contents.append(content)
    return contents, position


def tag(field_number: int) -> bytes:
    """Encode the tag of a length-delimited field."""
    return varint(field_number << 3 | LENGTH_DELIMITED)


def delimited(encoded_tag: bytes, payload: bytes) -> bytes:
    """Encode one length-delimited field: a string, bytes, a message or packed numbers."""
    return encoded_tag + varint(len(payload)) + payload


_ONE_BYTE = tuple(bytes((i,)) for i in range(0x80))
