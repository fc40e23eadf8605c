"""How a call ended, from the header blocks of its answer.

Just enough of HPACK to find `grpc-status`, quickly: a block that has been read before, and has not
changed what its bytes mean, is looked up. Every block of a connection must be shown, in order: what
the server has its client remember counts.

Source: RFC 7541, sections 4.1 (entry size), 5.1 (integers), 5.2 (strings), 6 (binary format).
"""

from typing import NamedTuple

UNKNOWN = 2
"""gRPC's code for a call whose end says nothing."""

STATUSES_MAX = 17
_STATIC = 61
_TABLE_BYTES = 4_096
_ENTRY_BYTES = 32
_NAME = b"grpc-status"
_CACHED_MAX = 1_024


class _Entry(NamedTuple):
    """A header that is remembered: of the status or not, its code, its name's length at most."""

    is_status: bool
    value: int | None
    name_bytes: int


_STATIC_ENTRY = _Entry(is_status=False, value=None, name_bytes=27)


class TrailerReader:
    """
    Reads one connection's header blocks.

    Strings that are Huffman-coded are skipped, so a status must not be: C-core, under grpcio and
    Triton alike, writes it plainly.
    """

    def __init__(self) -> None:
        self._known: dict[bytes, int | None] = {}
        self._table: list[_Entry] = []  # newest first
        self._table_bytes = 0

    def status(self, block: bytes) -> int | None:
        """
        Return the status that a block has; None if it has none, as those before a message.

        Raises:
            ValueError: the block is not understood, or more is to be remembered than fits.
        """
        known = self._known
        if block in known:
            return known[block]
        found, changes = self._read(block)
        if changes or len(known) >= _CACHED_MAX:
            known.clear()
        if not changes:
            known[block] = found
        return found

    def _read(self, block: bytes) -> tuple[int | None, bool]:
        position, found, changes = 0, None, False
        try:
            while position < len(block):
                first = block[position]
                if first & 0x80:
                    index, position = _integer(block, position, 7)
                    is_status, value, _ = self._entry(index)
                elif first & 0xE0 == 0x20:
                    size, position = _integer(block, position, 5)
                    self._resize(size)
                    changes = True
                    continue
                else:
                    is_indexed = bool(first & 0x40)
                    index, position = _integer(block, position, 6 if is_indexed else 4)
                    if index:
                        is_status, _, name_bytes = self._entry(index)
                    else:
                        name, name_bytes, position = _string(block, position)
                        is_status = name == _NAME
                    text, text_bytes, position = _string(block, position)
                    value = _status(text) if is_status else None
                    if is_indexed:
                        self._remember(_Entry(is_status, value, name_bytes), text_bytes)
                        changes = True
                if is_status:
                    found = value
        except IndexError:
            raise ValueError(f"not a header block: {block.hex()}") from None
        return found, changes

    def _entry(self, index: int) -> _Entry:
        if index <= _STATIC:  # `grpc-status` is not among them
            return _STATIC_ENTRY
        return self._table[index - _STATIC - 1]

    def _remember(self, entry: _Entry, text_bytes: int) -> None:
        self._table.insert(0, entry)
        self._table_bytes += entry.name_bytes + text_bytes + _ENTRY_BYTES
        if self._table_bytes > _TABLE_BYTES:  # what is forgotten then is not followed here
            raise ValueError("the server has its client remember more headers than fit")

    def _resize(self, size: int) -> None:
        if size == 0:
            self._table.clear()
            self._table_bytes = 0
        elif size < self._table_bytes:
            raise ValueError("the server shortens what its client remembers")


def _integer(block: bytes, position: int, bits: int) -> tuple[int, int]:
    most = (1 << bits) - 1
    value = block[position] & most
    position += 1
    if value < most:
        return value, position
    shift = 0
    while True:
        byte = block[position]
        position += 1
        value += (byte & 0x7F) << shift
        shift += 7
        if not byte & 0x80:
            return value, position


def _string(block: bytes, position: int) -> tuple[bytes | None, int, int]:
    """Return a string, None if it is coded; how long it is at most; where it ends."""
    is_coded = bool(block[position] & 0x80)
    length, position = _integer(block, position, 7)
    end = position + length
    if end > len(block):
        raise IndexError
    if is_coded:  # no code is shorter than five bits
        return None, length * 8 // 5, end
    return block[position:end], length, end


def _status(text: bytes | None) -> int:
    if text is None or not text.isdigit():
        raise ValueError("a grpc-status that cannot be read")
    value = int(text)
    return value if value < STATUSES_MAX else UNKNOWN
