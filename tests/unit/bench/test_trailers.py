"""How a call ended is read from the server's headers, whichever way it compresses them."""

import bench_modules
import pytest
from hypothesis import given
from hypothesis import strategies as st

trailers = bench_modules.load("trailers").trailers

OTHER = (b"grpc-message", b"too much is waiting")
HEADERS = st.lists(
    st.tuples(
        st.one_of(
            st.integers(0, 16).map(lambda code: (b"grpc-status", str(code).encode())),
            st.just(OTHER),
            st.tuples(
                st.binary(min_size=1, max_size=200).filter(lambda name: name != b"grpc-status"),
                st.binary(max_size=200),
            ),
        ),
        st.sampled_from(["recalled", "remembered", "once", "name recalled"]),
    ),
    max_size=4,
)


class Encoder:
    """RFC 7541 as a server may do it, in every way there is but Huffman's."""

    def __init__(self):
        self.table = []
        self.table_bytes = 0

    def encode(self, headers):
        return b"".join(self._one(header, how) for header, how in headers)

    def _one(self, header, how):
        name, value = header
        if how == "recalled" and header in self.table:
            return self._integer(62 + self.table.index(header), 7, 0x80)
        is_remembered = how == "remembered" and self._fits(header)
        bits, mark = (6, 0x40) if is_remembered else (4, 0)
        names = [known for known, _ in self.table]
        if how == "name recalled" and name in names:
            out = self._integer(62 + names.index(name), bits, mark)
        else:
            out = bytes((mark,)) + self._text(name)
        if is_remembered:
            self.table.insert(0, header)
            self.table_bytes += len(name) + len(value) + 32
        return out + self._text(value)

    def _fits(self, header):
        return self.table_bytes + sum(map(len, header)) + 32 <= 4_096

    def _text(self, text):
        return self._integer(len(text), 7, 0) + text

    @staticmethod
    def _integer(value, bits, mark):
        most = (1 << bits) - 1
        if value < most:
            return bytes((mark | value,))
        out, value = bytes((mark | most,)), value - most
        while value >= 128:
            out, value = out + bytes((value % 128 + 128,)), value // 128
        return out + bytes((value,))


@given(blocks=st.lists(HEADERS, max_size=12))
def test_statuses_are_found_in_whatever_form_they_come(blocks):
    encoder, reader = Encoder(), trailers.TrailerReader()

    for headers in blocks:
        codes = [int(value) for (name, value), _ in headers if name == b"grpc-status"]

        assert reader.status(encoder.encode(headers)) == (codes[-1] if codes else None)


def test_the_same_bytes_mean_something_else_once_more_is_remembered():
    encoder, reader = Encoder(), trailers.TrailerReader()
    for code in (b"0", b"8"):
        reader.status(encoder.encode([((b"grpc-status", code), "remembered")]))
    newest = bytes((0xBE,))
    assert reader.status(newest) == reader.status(newest) == 8

    reader.status(encoder.encode([((b"grpc-status", b"4"), "remembered")]))

    assert reader.status(newest) == 4


@pytest.mark.parametrize(
    "block",
    [
        b"\xbe",  # recalls what was never remembered
        b"\x00\x0bgrpc-status",  # ends in the middle
        b"\x00\x0bgrpc-status\x81\x00",  # Huffman-coded
        b"\x00\x0bgrpc-status\x03bad",
    ],
)
def test_what_cannot_be_read_is_said_and_not_guessed(block):
    with pytest.raises(ValueError, match=r"header block|cannot be read"):
        trailers.TrailerReader().status(block)


def test_more_than_is_followed_is_said():
    reader = trailers.TrailerReader()
    long = b"\x40\x01a\x7f" + bytes((0x80 | (2_000 - 127) % 128, (2_000 - 127) // 128))

    for _ in range(2):
        reader.status(long + bytes(2_000))
    with pytest.raises(ValueError, match="more headers than fit"):
        reader.status(long + bytes(2_000))
