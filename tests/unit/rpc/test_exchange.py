"""How much one stream may have under way, and in which order its answers leave."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.rpc.exchange import BYTES_MAX, MESSAGES_MAX, Exchange


def test_a_new_stream_has_room_and_nothing_to_send():
    exchange = Exchange()

    assert exchange.has_room
    assert exchange.take() is None
    assert exchange.under_way == 0


@pytest.mark.parametrize(
    ("sizes", "has_room"),
    [
        pytest.param([1] * (MESSAGES_MAX - 1), True, id="one fewer than may be"),
        pytest.param([1] * MESSAGES_MAX, False, id="as many as may be"),
        pytest.param([BYTES_MAX - 1], True, id="one byte fewer than may be"),
        pytest.param([BYTES_MAX], False, id="as many bytes as may be"),
        pytest.param([BYTES_MAX // 2] * 2, False, id="as many bytes together"),
    ],
)
def test_messages_and_their_bytes_are_limited(sizes, has_room):
    exchange = Exchange()
    for size in sizes:
        exchange.accept(size)

    assert exchange.has_room is has_room


def test_an_answer_counts_until_it_is_sent():
    exchange = Exchange()
    exchange.accept(1)
    exchange.answer(1, bytes(BYTES_MAX))
    assert not exchange.has_room

    assert exchange.take() == bytes(BYTES_MAX)
    assert not exchange.has_room
    exchange.sent()

    assert exchange.has_room
    assert exchange.held_bytes == 0


def test_one_answer_is_on_its_way_at_a_time():
    exchange = Exchange()
    for answer in (b"a", b"b"):
        exchange.accept(1)
        exchange.answer(1, answer)

    assert exchange.take() == b"a"
    assert exchange.take() is None
    exchange.sent()
    assert exchange.take() == b"b"


@pytest.mark.parametrize(("drop_answers", "left"), [(True, None), (False, b"given")])
def test_after_the_end_no_answer_counts_and_those_given_may_still_be_sent(drop_answers, left):
    exchange = Exchange()
    exchange.accept(1)
    exchange.accept(1)
    exchange.answer(1, b"given")

    exchange.close(drop_answers=drop_answers)
    exchange.answer(1, b"too late")

    assert exchange.take() == left
    exchange.sent()
    assert exchange.take() is None
    assert (exchange.under_way, exchange.held_bytes) == (0, 0)


@given(
    st.lists(st.tuples(st.sampled_from(["accept", "answer", "take", "sent"]), st.integers(0, 9)))
)
def test_whatever_happens_every_answer_leaves_once_in_order_and_the_accounts_are_right(steps):
    exchange = Exchange()
    unanswered, given_answers, left = [], [], []
    sending = None
    for number, (step, size) in enumerate(steps):
        if step == "accept" and exchange.has_room:
            exchange.accept(size)
            unanswered.append(size)
        elif step == "answer" and unanswered:
            answer = b"%d" % number
            exchange.answer(unanswered.pop(size % len(unanswered)), answer)
            given_answers.append(answer)
        elif step == "take":
            taken = exchange.take()
            assert taken is None or sending is None
            if taken is not None:
                sending = taken
                left.append(taken)
        elif step == "sent" and sending is not None:
            exchange.sent()
            sending = None
        unsent = given_answers[len(left) :] + ([sending] if sending is not None else [])
        assert exchange.under_way == len(unanswered) + len(unsent)
        assert exchange.held_bytes == sum(unanswered) + sum(map(len, unsent))

    assert left == given_answers[: len(left)]
