"""The performance page shows what the profile prints."""

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "performance.md").read_text()
BENCH = ROOT / "loadtest" / "bench"


def stages():
    sys.path.insert(0, str(BENCH))
    try:
        import stopwatches

        return stopwatches.STAGES
    finally:
        sys.path.remove(str(BENCH))


def rows():
    """Return the cells of the page's profile by their stage."""
    section = PAGE.partition("| µs of CPU per request |")[2].partition("\n\n")[0]
    lines = [line.strip("| ").split(" | ") for line in section.splitlines()[2:]]
    return {stage: cells for stage, *cells in lines}


@pytest.mark.parametrize("stage", stages())
def test_every_stage_is_in_the_profile_and_explained(stage):
    explained = PAGE.partition("## How to read it")[2].partition("\n## ")[0]

    assert stage in rows()
    assert f"| {stage} | " in explained


def test_the_profile_has_no_stage_that_is_not_printed():
    assert set(rows()) == {*stages(), "all", "all, and the stopwatches"}


def test_the_stages_add_up():
    """Medians of each need not add up to the median of all, but nearly do."""
    figures = [
        [0.0 if cell == "-" else float(cell.replace(",", "")) for cell in cells]
        for stage, cells in rows().items()
        if stage != "all, and the stopwatches"
    ]
    for *parts, whole in zip(*figures, strict=True):
        assert sum(parts) == pytest.approx(whole, rel=0.15)


def test_the_command_is_a_target():
    assert "make profile" in PAGE
    makefile = (ROOT / "Makefile").read_text()
    command = re.search(r"^profile: .*\n\t\$\(BIN\)/python (\S+)$", makefile, re.MULTILINE)[1]
    assert (ROOT / command).exists()
    assert command in PAGE
