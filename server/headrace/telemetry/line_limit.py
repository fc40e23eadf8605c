"""How many log lines of one kind may be written: so many a second, the rest is counted. Pure."""


class LineLimit:
    """
    A bucket of lines that fills at a steady rate; not safe for several threads at once.

    Every line is either allowed or counted, and the next one that is allowed is told how many were
    not: none is lost silently.

    Args:
        lines_per_s: The rate, and how many may come at once after a rest.
    """

    __slots__ = ("_at_s", "_lines", "_lines_per_s", "_suppressed")

    def __init__(self, lines_per_s: float) -> None:
        self._lines_per_s = self._lines = lines_per_s
        self._at_s: float | None = None
        self._suppressed = 0

    def take(self, now_s: float, wanted: int = 1) -> int | None:
        """
        Ask for a line.

        Args:
            now_s: On a monotonic clock. An earlier time than before counts as none passed.
            wanted: How many lines are given up if this one is not allowed.

        Returns:
            How many were held back since the last one that was allowed; None to hold back this one.
        """
        if self._at_s is None:
            self._at_s = now_s
        elif now_s > self._at_s:
            filled = self._lines + (now_s - self._at_s) * self._lines_per_s
            self._lines = min(self._lines_per_s, filled)
            self._at_s = now_s
        if self._lines < 1:
            self._suppressed += wanted
            return None
        self._lines -= 1
        suppressed, self._suppressed = self._suppressed, 0
        return suppressed

    def lose(self, suppressed: int) -> None:
        """Say that a line that was allowed, and told of so many, is not written after all."""
        self._suppressed += suppressed + 1
