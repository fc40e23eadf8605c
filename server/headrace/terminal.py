"""What came from elsewhere, made safe to print on somebody's terminal."""

import re


def printable(text: str | None) -> str:
    """Escape what could move the cursor or colour what follows; nothing for None."""
    return re.sub(r"[^\x20-\x7e\u00a0-\uffff]", lambda found: repr(found[0])[1:-1], text or "")
