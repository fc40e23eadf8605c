"""Who is forgotten when there are too many to remember."""

from hypothesis import given
from hypothesis import strategies as st

from headrace.batching.eviction import idlest

PASTS = st.dictionaries(st.integers(), st.floats(0, 10), max_size=60)


@given(PASTS, st.floats(0, 10), st.integers(1, 40))
def test_nobody_is_remembered_for_less_than_those_who_are_forgotten(pasts, now, most):
    gone = set(idlest(pasts, now, most))

    left = {key: at for key, at in pasts.items() if key not in gone}
    assert len(left) <= most
    assert all(at > now for at in left.values())
    assert all(pasts[key] <= min(left.values(), default=99.0) for key in gone)


@given(PASTS, st.floats(0, 10), st.integers(1, 40))
def test_no_more_are_forgotten_than_the_idle_and_an_eighth(pasts, now, most):
    gone = idlest(pasts, now, most)

    idle = sum(at <= now for at in pasts.values())
    excess = len(pasts) - idle - most
    assert len(gone) == len(set(gone))
    assert len(gone) <= idle + (excess + most // 8 if excess > 0 else 0)
