"""When to look for garbage, and where: decided from counts and times alone.

A collection holds the interpreter from its beginning to its end, so its size is a pause of every
request. What is found rarely is looked for rarely: new objects often and in small numbers, those
that survived that a second time, and then they are *frozen*: set aside with all that came before
them, until so many have been that everything is looked at again.

Source: CPython, "Garbage collector design" (generations, and the quarter of what is there that has
to be new before everything is looked at).
"""

from enum import Enum

YOUNG_OBJECTS = 10_000
"""New containers, net, that make a young collection due: some 0.3 ms of work."""

YOUNG_PERIOD_S = 10.0
"""A young one is due after this long whatever the count: few objects can hold many bytes."""

RECENT_OBJECTS = 50_000
"""Survivors of young collections that make a look at all of them due, busy or not."""

IDLE_PERIOD_S = 30.0
"""Between two looks at survivors while nobody waits for anything."""

BUSY_PERIOD_S = 600.0
"""The same while somebody always does."""

WHOLE_OBJECTS = 100_000
"""Objects set aside that make a look at everything due, once nobody waits."""

WHOLE_SHARE = 0.25
"""Or this share of all, if that is more."""

BUSY_FACTOR = 4
"""So many times as much makes it due although somebody waits."""


class Work(Enum):
    """What is to be done."""

    YOUNG = "young"
    """Look at what was made since the last look."""

    RECENT = "recent"
    """Look at all that has not been set aside, and set aside what is left of it."""

    WHOLE = "whole"
    """Look at everything, and set aside what is left."""


class Pace:
    """
    Keeps count, and says what is due.

    Garbage is among the young objects, the survivors, or those set aside since the last whole look;
    each of the three has a bound, so garbage has one.

    Args:
        kept: Objects that the last whole look left.
        now_s: When that was, on a monotonic clock, as all times here.
    """

    kept: int
    now_s: float

    def __init__(self, kept: int, now_s: float) -> None:
        self.kept = kept
        """Objects that the last whole look left."""
        self.survivors = 0
        """Objects that outlived a young collection and have not been set aside, about."""
        self.set_aside = 0
        """Objects set aside since the last whole look; some may have been freed since."""
        self._young_s = self._recent_s = now_s

    def due(self, *, now_s: float, young: int, is_idle: bool, has_loaded: bool) -> Work | None:
        """
        Say what to do now.

        Args:
            now_s: Now.
            young: Containers made since the last collection less those freed meanwhile.
            is_idle: Whether nobody waits for an answer.
            has_loaded: Whether a model was loaded that is to be set aside.
        """
        limit = max(WHOLE_OBJECTS, WHOLE_SHARE * self.kept) * (1 if is_idle else BUSY_FACTOR)
        if self.set_aside >= limit:
            return Work.WHOLE
        if has_loaded or self.survivors + young >= RECENT_OBJECTS:
            return Work.RECENT
        period_s = IDLE_PERIOD_S if is_idle else BUSY_PERIOD_S
        if self.survivors and now_s - self._recent_s >= period_s:
            return Work.RECENT
        if young >= YOUNG_OBJECTS or (young and now_s - self._young_s >= YOUNG_PERIOD_S):
            return Work.YOUNG
        return None

    def survived(self, count: int) -> None:
        """Note objects that outlived a young collection that nobody here has asked for."""
        self.survivors += count

    def done(self, work: Work, *, now_s: float, left: int) -> None:
        """
        Note what was done.

        Args:
            work: What `due` said.
            now_s: When it was over.
            left: How many of the objects looked at were no garbage.
        """
        self._young_s = now_s
        if work is Work.YOUNG:
            self.survivors += left
            return
        self._recent_s = now_s
        self.survivors = 0
        if work is Work.RECENT:
            self.set_aside += left
        else:
            self.set_aside, self.kept = 0, left
