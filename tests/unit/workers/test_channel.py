"""Messages arrive whole, in order, however the bytes come; what is none is refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.workers import channel
from headrace.workers.channel import ChannelBrokenError, Decoder, encode

MESSAGES = st.lists(
    st.fixed_dictionaries({"type": st.text(max_size=5), "text": st.text(max_size=40)}), max_size=6
)


@given(MESSAGES, st.lists(st.integers(1, 30)))
def test_messages_are_the_same_however_their_bytes_are_cut(messages, cuts):
    rest, decoder, received = b"".join(map(encode, messages)), Decoder(), []

    for cut in cuts:
        received += decoder.feed(rest[:cut])
        rest = rest[cut:]
    received += decoder.feed(rest)

    assert received == messages


@pytest.mark.parametrize("line", [b"\n", b"x\n", b"[]\n", b"{}\n", b'{"type": 1}\n', b"\xff\n"])
def test_what_is_no_message_breaks_the_channel(line):
    with pytest.raises(ChannelBrokenError):
        Decoder().feed(line)


def test_a_message_without_end_breaks_the_channel(monkeypatch):
    monkeypatch.setattr(channel, "MESSAGE_BYTES_MAX", 100)
    decoder = Decoder()
    decoder.feed(b"a" * 60)

    with pytest.raises(ChannelBrokenError):
        decoder.feed(b"a" * 60)
    with pytest.raises(ChannelBrokenError):
        encode({"type": "a" * 100})
