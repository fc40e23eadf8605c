"""The modules of the bench, which are scripts beside each other and no package."""

import importlib
import sys
from argparse import Namespace
from pathlib import Path

BENCH = Path(__file__).parents[2] / "loadtest" / "bench"


def load(*names):
    """Import modules of `loadtest/bench` by their names."""
    sys.path.insert(0, str(BENCH))
    try:
        return Namespace(**{name: importlib.import_module(name) for name in names})
    finally:
        sys.path.remove(str(BENCH))
