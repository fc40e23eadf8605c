"""Who is forgotten when there are too many to remember."""

from hypothesis import given
from hypothesis import strategies as st

from headrace.batching.eviction import idlest

PASTS = st.dictionaries(st.integers(), st.floats(0, 10), max_size=60)


@given(PASTS, st.floats(0, 10), st.integers(1, 40))
def test_nobody_is_remembered_for_less_than_those_who_are_forgotten(pasts, now, most):
    gone = set(idlest(pasts, now, most))

    left = {key: at for key, at in pasts.items() if key not in gone}
    assert len(left) <= most - most // 8
    assert all(at > now for at in left.values())
    assert all(pasts[key] <= min(left.values(), default=99.0) for key in gone)


@given(PASTS, st.floats(0, 10), st.integers(1, 40))
def test_no_more_are_forgotten_than_the_idle_and_as_many_as_leave_an_eighth_free(pasts, now, most):
    gone = idlest(pasts, now, most)

    idle = sum(at <= now for at in pasts.values())
    assert len(gone) == len(set(gone))
    assert len(gone) == max(idle, len(pasts) - most + most // 8)


def test_whom_to_forget_is_asked_rarely_even_where_hardly_anybody_is_idle():
    """So many live at a time as just fit: it walks them all each time."""
    most, asked, free_at = 800, 0, {}
    for now in range(8_000):
        free_at[now] = now + most - 5
        if len(free_at) > most:
            asked += 1
            for key in idlest(free_at, now, most):
                del free_at[key]

    assert asked <= 8_000 / (most / 8)
