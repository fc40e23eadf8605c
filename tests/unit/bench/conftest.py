"""The modules of `make bench`, for the tests of what its rounds say."""

import bench_modules
import pytest

NAMES = (
    *("contest", "contests", "cores", "drops", "names", "page", "peers", "processor_time"),
    *("rounds", "run", "servers", "stage"),
)


@pytest.fixture(scope="module")
def bench():
    return bench_modules.load(*NAMES)
