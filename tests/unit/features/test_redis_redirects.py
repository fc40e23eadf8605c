"""Replies that send the asker elsewhere, told from values that look like them."""

import hiredis
import pytest
from hypothesis import given
from hypothesis import strategies as st
from redis.crc import key_slot as redis_py_slot

from headrace.features.redis_redirects import (
    DamagedRepliesError,
    Redirect,
    is_unserved,
    key_slot,
    may_redirect,
    read_redirect,
    split_replies,
)

CELLS = st.none() | st.binary(max_size=30) | st.just(b"\r\n-MOVED 1 a:2\r\n")
ARRAYS = st.lists(CELLS, max_size=6)
ERRORS = st.sampled_from([b"-MOVED 3999 127.0.0.1:6381\r\n", b"-ASK 1 h:2\r\n", b"-ERR no\r\n"])


def written(reply):
    if isinstance(reply, bytes):
        return reply
    cells = [b"$-1\r\n" if c is None else b"$%d\r\n%b\r\n" % (len(c), c) for c in reply]
    return b"*%d\r\n" % len(reply) + b"".join(cells)


@given(st.binary(max_size=60) | st.text("{}ab", max_size=8).map(str.encode))
def test_slots_are_those_of_redis_py(key):
    assert key_slot(key) == redis_py_slot(key)


def test_slots_are_those_of_the_specification():
    assert key_slot(b"123456789") == 0x31C3
    assert key_slot(b"{user1000}.following") == key_slot(b"{user1000}.followers")


@given(st.lists(ARRAYS | ERRORS, max_size=8))
def test_replies_are_cut_where_they_end(replies):
    parts = [written(reply) for reply in replies]
    assert split_replies(b"".join(parts)) == parts


@given(st.lists(ARRAYS | ERRORS, min_size=1, max_size=4), st.data())
def test_half_a_reply_is_an_error(replies, data):
    parts = [written(reply) for reply in replies]
    whole = b"".join(parts)
    ends = {len(b"".join(parts[:count])) for count in range(len(parts) + 1)}
    length = data.draw(st.integers(0, len(whole)).filter(lambda length: length not in ends))
    with pytest.raises(DamagedRepliesError):
        split_replies(whole[:length])


@given(st.binary(max_size=60))
def test_other_bytes_are_cut_as_hiredis_would_or_refused(data):
    try:
        parts = split_replies(data)
    except DamagedRepliesError:
        return
    assert b"".join(parts) == data
    for part in parts:
        reader = hiredis.Reader(notEnoughData=Ellipsis)
        reader.feed(part)
        try:
            reader.gets()
        except hiredis.ProtocolError:
            continue  # stricter than we need to be: lengths like "+1", numbers that are none
        assert not reader.has_data()


@pytest.mark.parametrize(
    ("reply", "redirect"),
    [
        (b"-MOVED 3999 127.0.0.1:6381\r\n", Redirect("MOVED", "127.0.0.1", 6381)),
        (b"-ASK 1 features.internal:2\r\n", Redirect("ASK", "features.internal", 2)),
        (b"-MOVED 1 :6381\r\n", Redirect("MOVED", "", 6381)),
        (b"-MOVED 1 ::1:6381\r\n", Redirect("MOVED", "::1", 6381)),
        (b"-MOVED 1 [::1]:6381\r\n", Redirect("MOVED", "::1", 6381)),
        (b"-ERR MOVED 1 a:2\r\n", None),
        (b"$14\r\n-MOVED 1 a:2\r\n\r\n", None),
    ],
)
def test_a_redirection_names_where_to_ask(reply, redirect):
    assert read_redirect(reply) == redirect


@given(st.lists(ARRAYS | ERRORS, max_size=5))
def test_no_error_is_overlooked(replies):
    data = b"".join(written(reply) for reply in replies)
    if any(isinstance(reply, bytes) for reply in replies):
        assert may_redirect(data)


@pytest.mark.parametrize("word", [b"CLUSTERDOWN", b"LOADING", b"MASTERDOWN", b"TRYAGAIN"])
def test_a_node_that_cannot_tell_says_so(word):
    assert is_unserved(b"-" + word + b" for a reason\r\n")
    assert not is_unserved(b"-WRONGTYPE for a reason\r\n")
