"""What is loaded and unloaded, case by case, and what can never happen."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.repository.policy import Load, Unload, VersionPolicy, VersionView, next_action

LATEST, ALL = VersionPolicy(), VersionPolicy("all")


def version(number, on_disk="a", serving=None, failed=None, *, settled=True):
    return VersionView(number, on_disk, settled, serving, failed)


@pytest.mark.parametrize(
    ("policy", "versions", "action"),
    [
        pytest.param(LATEST, [], None, id="nothing there: nothing to do"),
        pytest.param(LATEST, [version(1)], Load(1), id="a version that nobody has loaded"),
        pytest.param(LATEST, [version(1), version(2)], Load(2), id="the newest, and only that"),
        pytest.param(LATEST, [version(1, serving="a")], None, id="it serves as it is on disk"),
        pytest.param(
            LATEST,
            [version(1, serving="a"), version(2)],
            Load(2),
            id="the new one is loaded before the old one goes",
        ),
        pytest.param(
            LATEST,
            [version(1, serving="a"), version(2, serving="a")],
            Unload(1),
            id="the old one goes once the new one serves",
        ),
        pytest.param(
            LATEST,
            [version(1, serving="a"), version(2, settled=False)],
            None,
            id="a version that is still being copied is waited for",
        ),
        pytest.param(
            LATEST,
            [version(1, serving="a"), version(2, failed="a")],
            None,
            id="a failed candidate leaves the old one serving",
        ),
        pytest.param(
            LATEST,
            [version(1), version(2, failed="a")],
            Load(1),
            id="an older version is better than none",
        ),
        pytest.param(
            LATEST, [version(2, "b", failed="a")], Load(2), id="files that changed are tried again"
        ),
        pytest.param(
            LATEST, [version(1, "b", serving="a")], Load(1), id="replaced in place: loaded anew"
        ),
        pytest.param(
            LATEST,
            [version(1, "b", serving="a", failed="b")],
            None,
            id="replaced in place by something broken: what served goes on",
        ),
        pytest.param(
            LATEST,
            [version(1, serving="a"), version(2, None, serving="a")],
            Unload(2),
            id="the newest was removed and an older one serves",
        ),
        pytest.param(
            LATEST,
            [version(1), version(2, None, serving="a")],
            Load(1),
            id="the newest was removed: the older one is loaded first",
        ),
        pytest.param(
            LATEST,
            [version(1, failed="a"), version(2, None, serving="a")],
            None,
            id="the newest was removed and the older one is broken: it goes on",
        ),
        pytest.param(
            LATEST,
            [version(1, None, serving="a"), version(2, settled=False)],
            None,
            id="moved away, the next still being copied: it goes on",
        ),
        pytest.param(
            LATEST, [version(1, None, serving="a")], Unload(1), id="everything was removed"
        ),
        pytest.param(
            LATEST,
            [version(1, None, serving="a", settled=False)],
            None,
            id="gone for a moment is not removed",
        ),
        pytest.param(
            VersionPolicy("latest", 2),
            [version(1, serving="a"), version(2, serving="a"), version(3)],
            Load(3),
            id="two: the third is loaded",
        ),
        pytest.param(
            VersionPolicy("latest", 2),
            [version(1, serving="a"), version(2, serving="a"), version(3, serving="a")],
            Unload(1),
            id="two: the first goes",
        ),
        pytest.param(ALL, [version(1), version(2, serving="a")], Load(1), id="all are all"),
        pytest.param(
            VersionPolicy("specific", numbers=frozenset({1, 7})),
            [version(1, serving="a"), version(2), version(3, serving="a")],
            Unload(3),
            id="specific: the others go, those that are not there are nothing to do",
        ),
    ],
)
def test_what_is_done_next(policy, versions, action):
    assert next_action(policy, versions) == action


CONTENT = st.sampled_from(["a", "b"])
VERSIONS = st.lists(
    st.builds(
        VersionView,
        number=st.integers(1, 5),
        on_disk=st.none() | CONTENT,
        is_settled=st.booleans(),
        serving=st.none() | CONTENT,
        failed=st.none() | CONTENT,
    ),
    unique_by=lambda v: v.number,
    max_size=5,
)
POLICIES = st.one_of(
    st.builds(VersionPolicy, st.just("latest"), st.integers(1, 3)),
    st.just(ALL),
    st.builds(VersionPolicy, st.just("specific"), numbers=st.frozensets(st.integers(1, 5))),
)


def carried_out(versions, action, breaks):
    """The versions after an action; what is in `breaks` cannot be loaded."""
    after = {v.number: v for v in versions}
    old = after[action.number]
    serving, failed = old.serving, old.failed
    if isinstance(action, Unload):
        serving = None
    elif (old.number, old.on_disk) in breaks:
        failed = old.on_disk
    else:
        serving, failed = old.on_disk, None
    after[action.number] = VersionView(old.number, old.on_disk, old.is_settled, serving, failed)
    return list(after.values())


@given(POLICIES, VERSIONS, st.sets(st.tuples(st.integers(1, 5), CONTENT)))
def test_it_comes_to_rest_and_never_leaves_a_model_on_disk_without_what_served(
    policy, versions, breaks
):
    for _ in range(20):
        had = any(v.serving for v in versions)
        action = next_action(policy, versions)
        if action is None:
            break
        versions = carried_out(versions, action, breaks)
        if had and any(v.on_disk for v in versions):
            assert any(v.serving for v in versions)
    else:
        pytest.fail("it never comes to rest")

    served = [v for v in versions if v.serving]
    if policy.kind == "latest" and any(v.on_disk for v in served):
        assert len(served) <= policy.count
    settled_and_sound = [
        v
        for v in versions
        if v.on_disk and v.is_settled and (v.number, v.on_disk) not in breaks and not v.failed
    ]
    if policy.kind == "all":
        assert all(v.serving == v.on_disk for v in settled_and_sound)


@given(POLICIES, VERSIONS)
def test_only_settled_files_are_loaded(policy, versions):
    action = next_action(policy, versions)

    if isinstance(action, Load):
        chosen = next(v for v in versions if v.number == action.number)
        assert chosen.is_settled
        assert chosen.on_disk not in (None, chosen.serving, chosen.failed)
