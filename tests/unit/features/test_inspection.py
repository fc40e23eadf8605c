"""Keys tell who wrote them; golden ones are Feast's own."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.features.inspection import EntityKey, clashing_projects, group_pattern, read_key
from headrace.features.layout import key_prefix, value_head
from headrace.features.values import ValueType as V

DRIVER = "01000000 02000000 09000000 6472697665725f6964 04000000 08000000 e903000000000000 64656d6f"
PAIR = (
    "02000000 02000000 0b000000 637573746f6d65725f6964 02000000 09000000 6472697665725f6964"
    "02000000 03000000 616263 04000000 08000000 e903000000000000 64656d6f"
)
ENTITYLESS = "01000000 02000000 0a000000 5f5f64756d6d795f6964 02000000 00000000 64656d6f"
# The first, as Feast 0.40 and Feast 0.30 wrote it.
WITHOUT_COUNT = DRIVER[9:]
VERSION_2_SHORT = "02000000 6964 04000000 08000000 e903000000000000 64656d6f"
# A text value of 65 letters, whose length looks like the name `A`.
VERSION_2_PAIR = (
    f"02000000 61 02000000 62 02000000 41000000{65 * '78'} 04000000 08000000 {8 * '00'} 64656d6f"
)
VERSION_2 = "02000000 6472697665725f6964 04000000 08000000 e903000000000000 64656d6f"


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        (DRIVER, EntityKey("current", ("driver_id",), "demo", (V.INT64,))),
        (PAIR, EntityKey("current", ("customer_id", "driver_id"), "demo", (V.STRING, V.INT64))),
        (ENTITYLESS, EntityKey("current", ("__dummy_id",), "demo", (V.STRING,))),
        ("00000000 64656d6f", EntityKey("current", (), "demo")),
        ("00000000", EntityKey("not Feast's")),
        (WITHOUT_COUNT, EntityKey("0.38 to 0.43")),
        (VERSION_2, EntityKey("version 2")),
        (VERSION_2_SHORT, EntityKey("version 2")),
        (VERSION_2_PAIR, EntityKey("version 2")),
        (VERSION_2[:-8], EntityKey("not Feast's")),
        ("", EntityKey("not Feast's")),
        ("73657373696f6e3a3132", EntityKey("not Feast's")),
        (DRIVER[:41], EntityKey("not Feast's")),
    ],
)
def test_a_key_is_known_by_its_bytes(key, expected):
    assert read_key(bytes.fromhex(key)) == expected


@given(
    st.lists(
        st.tuples(st.text(min_size=1, max_size=8), st.integers(-(2**63), 2**63 - 1)), max_size=3
    ),
    st.from_regex(r"[a-z_]{1,12}", fullmatch=True),
)
def test_what_headrace_asks_for_is_of_the_current_layout(values, project):
    values.sort()
    key = key_prefix([name for name, _ in values])
    for _, value in values:
        key += value_head(V.INT64, 8) + value.to_bytes(8, "little", signed=True)
    names = tuple(name for name, _ in values) or ("__dummy_id",)

    types = (V.INT64,) * len(values) or (V.STRING,)
    assert read_key(key + project.encode()) == EntityKey("current", names, project, types)


@given(st.binary(max_size=64))
def test_any_bytes_are_judged(key):
    assert read_key(key).layout in {"current", "0.38 to 0.43", "version 2", "not Feast's"}


def test_projects_that_end_alike_are_named():
    projects = ["prod", "nonprod", "demo", "prod"]

    assert clashing_projects(projects) == [("prod", "nonprod")]


@given(st.lists(st.text(min_size=1, max_size=4), max_size=2, unique=True), st.text(max_size=4))
def test_a_pattern_finds_the_keys_of_a_group_whatever_is_in_its_names(names, project):
    names.sort()
    values = b"".join(value_head(V.INT64, 8) + b"*?[]\\^-\n" for _ in names)
    key = key_prefix(names) + values + project.encode()

    assert glob_matches(group_pattern(names, project), key)
    assert not glob_matches(group_pattern([*names, "!"], project), key)


def glob_matches(pattern, text):
    """Match as Redis does a pattern whose only special characters are `*` and the backslash."""
    parts = re.findall(rb"\\(.)|(.)", pattern, re.DOTALL)
    regex = b"".join(
        re.escape(escaped) if escaped else b".*" if plain == b"*" else re.escape(plain)
        for escaped, plain in parts
    )
    return re.fullmatch(regex, text, re.DOTALL) is not None
