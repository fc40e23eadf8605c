"""The bench's arithmetic: what it reports is what it measured."""

import sys
from argparse import Namespace
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[3] / "loadtest" / "bench"


@pytest.fixture(scope="module")
def bench():
    sys.path.insert(0, str(BENCH))
    try:
        import http2
        import run
        import soak

        yield Namespace(http2=http2, run=run, soak=soak)
    finally:
        sys.path.remove(str(BENCH))


def contest(bench, target, gateway, other):
    return bench.run.Contest(
        "who is faster",
        ("gateway", "ceiling"),
        "requests_per_s",
        target,
        {"gateway": gateway, "ceiling": other},
    )


def test_a_ratio_is_of_medians_so_that_one_odd_round_decides_nothing(bench):
    found = contest(bench, 0.75, [80.0, 1.0, 82.0], [100.0, 100.0, 900.0])

    assert found.ratio == pytest.approx(0.8)
    assert not found.is_missed


def test_a_target_is_missed_below_it_and_not_at_it(bench):
    assert contest(bench, 0.8, [79.0], [100.0]).is_missed
    assert not contest(bench, 0.8, [80.0], [100.0]).is_missed
    assert not contest(bench, None, [1.0], [100.0]).is_missed


def test_the_page_shows_every_round_and_how_to_repeat_it(bench):
    found = contest(bench, 0.75, [80.0, 81.0], [100.0, 101.0])

    page = bench.run._page([found], Namespace(rounds=2, seconds=1.5, only="tensor"))

    for shown in ("80.00, 81.00", "100.00, 101.00", "0.80, 0.80", "| 0.80 | ≥ 0.75 |"):
        assert shown in page
    assert "run.py --rounds 2 --seconds 1.5 --only tensor" in page


def test_bodies_are_read_as_written(bench, tmp_path):
    messages = [b"", b"one", bytes(range(256)) * 300]

    bench.http2.write_bodies(tmp_path / "bodies", messages)

    framed = bench.http2.read_bodies(tmp_path / "bodies")
    assert [body[5:] for body in framed] == messages
    assert [int.from_bytes(body[1:5], "big") for body in framed] == [len(m) for m in messages]


def test_a_line_that_grows_is_told_from_one_that_wobbles(bench):
    rising = bench.soak.growth([10.0, 10.3, 10.4, 10.8, 11.0])
    level = bench.soak.growth([10.0, 10.9, 9.8, 10.8, 10.1])
    falling = bench.soak.growth([12.0, 11.0, 10.0])

    assert rising.change == pytest.approx(0.095, abs=0.005)
    assert (rising.is_real, level.is_real, falling.is_real) == (True, False, False)
