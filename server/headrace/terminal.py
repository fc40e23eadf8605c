"""What goes to somebody's terminal, or to a file instead: whole, and safe to print."""

import os
import sys

from rich.console import Console

FILE_WIDTH = 10_000
"""Of a line that goes to no terminal: tables are as wide as they need, and not cut off."""


def open_console(*, as_json: bool = False) -> Console:
    """
    Return what writes to the standard output: text as it is, without markup and emoji.

    Args:
        as_json: Whether lines are for machines, and must not be broken.
    """
    is_file = not sys.stdout.isatty() and "COLUMNS" not in os.environ
    width = FILE_WIDTH if is_file else None
    return Console(highlight=False, markup=False, emoji=False, soft_wrap=as_json, width=width)


def printable(text: str | None) -> str:
    """
    Escape what could move the cursor, colour what follows or turn its direction; "" for None.

    Source: Unicode's categories Other and Separator, but the space (`str.isprintable`).
    """
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text or "")
