"""When a whole hash is read."""

import pytest

from headrace.features.hash_reads import HashSample, prefers_whole


@pytest.mark.parametrize(
    ("wanted", "fields", "value_bytes", "is_whole"),
    [
        pytest.param(55, 55, 12, True, id="all of a small hash"),
        pytest.param(28, 55, 12, True, id="half of it"),
        pytest.param(27, 55, 12, False, id="less than half"),
        pytest.param(18, 18, 12, True, id="all of sixteen features and two event times"),
        pytest.param(14, 14, 12, False, id="a short search costs little"),
        pytest.param(16, 28, 12, False, id="half of it, where that is little"),
        pytest.param(55, 129, 12, False, id="a table"),
        pytest.param(120, 200, 12, False, id="a table, though most is wanted"),
        pytest.param(55, 55, 65, False, id="a table for its long value"),
    ],
)
def test_whole_hashes_are_read_where_the_server_would_search(wanted, fields, value_bytes, is_whole):
    assert prefers_whole(wanted, HashSample(fields, value_bytes)) is is_whole
