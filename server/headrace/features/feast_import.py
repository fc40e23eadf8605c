"""Imports Feast without the run-time type checks of its own classes.

Feast decorates its classes with typeguard's `@typechecked`, which parses and compiles every method
anew: three quarters of the CPU time that importing it takes. Whoever defines features runs
`feast apply`, where the checks are made; here they would check what has been applied.
"""

import functools
import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_TURN = [None]
"""Whoever takes it imports; the import system makes others wait for that."""


def import_feast() -> None:
    """
    Import Feast, which takes seconds; do nothing if it is, or is being, imported.

    Call this before any import of Feast's. typeguard is afterwards as it was before, and checks
    what is not Feast's all the time.

    Raises:
        ImportError: there is no Feast.
    """
    if "feast" in sys.modules:
        return
    try:
        turn = _TURN.pop()
    except IndexError:
        return
    try:
        with _unchecked("feast"):
            importlib.import_module("feast")
    finally:
        _TURN.append(turn)


@contextmanager
def _unchecked(package: str) -> Iterator[None]:
    """Let what a package decorates meanwhile be as it is."""
    try:
        import typeguard  # noqa: PLC0415 - Feast's dependency, not ours
    except ImportError:
        yield
        return
    real = typeguard.typechecked
    typeguard.typechecked = _except(package, real)
    try:
        yield
    finally:
        typeguard.typechecked = real


def _except(package: str, real: Callable[..., Any]) -> Callable[..., Any]:
    """Return typeguard's decorator for all but one package; some may keep it as their own."""

    @functools.wraps(real)
    def typechecked(target: Any = None, **options: Any) -> Any:
        if target is None:
            return functools.partial(typechecked, **options)
        module = getattr(target, "__module__", None) or ""
        return target if module.partition(".")[0] == package else real(target, **options)

    return typechecked
