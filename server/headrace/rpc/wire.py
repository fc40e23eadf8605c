"""Protobuf's wire format for the few fields that are written without a message object.

A serialized message may be the concatenation of serialized parts of it, and a packed field of
fixed-width numbers is their little-endian bytes: so a reply is a constant part made once, plus a
few length-delimited fields, and an output array goes out without a Python object per number.

Source: Protocol Buffers documentation, "Encoding" (length-delimited records, packed repeated
fields, last one wins).
"""

LENGTH_DELIMITED = 2


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


def tag(field_number: int) -> bytes:
    """Encode the tag of a length-delimited field."""
    return varint(field_number << 3 | LENGTH_DELIMITED)


def delimited(encoded_tag: bytes, payload: bytes) -> bytes:
    """Encode one length-delimited field: a string, bytes, a message or packed numbers."""
    return encoded_tag + varint(len(payload)) + payload


_ONE_BYTE = tuple(bytes((i,)) for i in range(0x80))
