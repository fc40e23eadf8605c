"""What came from elsewhere, made safe to print on somebody's terminal."""


def printable(text: str | None) -> str:
    """
    Escape what could move the cursor, colour what follows or turn its direction; "" for None.

    Source: Unicode's categories Other and Separator, but the space (`str.isprintable`).
    """
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text or "")
