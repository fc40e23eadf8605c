"""
Fill the demo's online store: make the feature tables, register them with Feast, write them.

    python materialize.py [--until DAY] [--redis HOST:PORT] [--feature-repo DIR]

The same as `feast apply` and `feast materialize` in the feature repository, in one process: Feast
takes seconds to import.
"""

import argparse
import importlib.util
import os
import sys
import time
import warnings
from collections.abc import Sequence
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

from home_sales import DEFAULT_CUTOFF, FEATURE_REPO, read_sales, write_feature_tables

from headrace.errors import StartupError

REDIS_VARIABLE = "HEADRACE_REDIS"
"""Where `feature_store.yaml` finds the online store. It has no default there: Feast has none."""

DEFAULT_REDIS = "127.0.0.1:6379"

_BEFORE_ALL = datetime(2010, 1, 1, tzinfo=UTC)


def prepare_online_store(feature_repo: Path, until: datetime) -> None:
    """
    Bring the online store to what was known at a time.

    Each home and area gets its newest row that is not younger than `until`; what the store has of
    them already is overwritten where it is older, and kept where it is newer.

    Args:
        feature_repo: The folder of `feature_store.yaml`; gets a `data/` with tables and registry.
        until: With a time zone.

    Raises:
        StartupError: the sales are missing, or `HEADRACE_REDIS` is not set.
    """
    if not os.environ.get(REDIS_VARIABLE):
        raise StartupError(f"{REDIS_VARIABLE} is not set; expected HOST:PORT of the online store")
    write_feature_tables(read_sales(), feature_repo / "data")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Feast's own
        store = apply_definitions(feature_repo)
        store.materialize(_BEFORE_ALL, until)


def apply_definitions(feature_repo: Path) -> Any:
    """
    Register what `definitions.py` defines, as `feast apply` does.

    Returns:
        Feast's client of the repository, a `feast.FeatureStore`.
    """
    from feast import Entity, FeatureService, FeatureStore, FeatureView  # noqa: PLC0415 - seconds

    spec = importlib.util.spec_from_file_location("definitions", feature_repo / "definitions.py")
    assert spec is not None
    assert spec.loader is not None
    definitions = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(definitions)
    kinds = (Entity, FeatureView, FeatureService)
    store = FeatureStore(repo_path=str(feature_repo))
    store.apply([value for value in vars(definitions).values() if isinstance(value, kinds)])
    return store


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; return the exit status."""
    parser = argparse.ArgumentParser(description="Fill the online store of the demo.")
    parser.add_argument(
        "--until", type=date.fromisoformat, default=DEFAULT_CUTOFF, metavar="YYYY-MM-DD"
    )
    parser.add_argument(
        "--redis", default=os.environ.get(REDIS_VARIABLE, DEFAULT_REDIS), metavar="HOST:PORT"
    )
    parser.add_argument("--feature-repo", type=Path, default=FEATURE_REPO, metavar="DIR")
    options = parser.parse_args(arguments)
    os.environ[REDIS_VARIABLE] = options.redis
    until = datetime.combine(options.until, datetime.min.time(), UTC)
    start = time.perf_counter()
    try:
        prepare_online_store(options.feature_repo, until)
    except StartupError as error:
        print(f"materialize: {error}", file=sys.stderr)
        return 1
    took_s = time.perf_counter() - start
    print(f"features as of {until:%Y-%m-%d} are in the online store, after {took_s:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
