"""Which calls are not taken by an ingress that has fallen behind. Pure: times come in.

More calls than can even be read wait in sockets and in C-core, first come, first served: after a
while every call that is taken has waited for nearly all of its time, so that everything is answered
and nothing in time, and a core that is kept so busy answers less than it can. It does not end by
itself when fewer are asked again: not before that is far below the peak. What ends it is to let go
of those who have little time left, unread, until those who come are fresh again.
"""

PERIOD_S = 0.01
"""How often it is judged anew."""

LAG_S = 0.001
"""
A message that is there comes a tenth of a millisecond after its call, or half of one, as long as
the loop keeps up; two to six while calls wait in C-core.
"""

LAGGING_SHARE = 0.5
"""Of the messages of a period: then the loop has not kept up in it."""

EXPIRED_SHARE = 0.01
"""Of the calls of a period that have a deadline: more whose time was over when they came."""

LIMIT_MIN_S, LIMIT_MAX_S = 0.005, 1.0
"""Nobody who has more time than that is let go of."""


class Triage:
    """
    Judges calls that have a deadline. For one thread.

    An ingress is behind while most messages come late and some calls have expired before they came:
    a busy loop alone loses nobody's time, and callers who give no time are no sign of a busy loop.
    While it is behind, whoever has less time left than a limit is let go of; the limit doubles with
    each period, and halves again with each in which it is not.

    Attributes:
        limit_s: Who has less time is let go of; 0 while the ingress keeps up.
    """

    __slots__ = ("_calls", "_expired", "_is_lagging", "_judge_s", "_late", "_messages", "limit_s")

    def __init__(self) -> None:
        self.limit_s = 0.0
        self._messages = self._late = self._calls = self._expired = 0
        self._is_lagging = False
        self._judge_s = 0.0

    def message_came(self, lag_s: float) -> None:
        """Note how long after its call a message came."""
        self._messages += 1
        if lag_s > LAG_S:
            self._late += 1

    def lets_go(self, left_s: float, now_s: float) -> bool:
        """
        Say whether a call is not worth reading.

        Args:
            left_s: Until its deadline.
            now_s: On any clock.
        """
        if now_s >= self._judge_s:
            self._judge(now_s)
        self._calls += 1
        if left_s <= 0:
            self._expired += 1
            return True
        return left_s < self.limit_s

    def _judge(self, now_s: float) -> None:
        self._judge_s = now_s + PERIOD_S
        if self._messages:  # if all are let go of, nothing new is known
            self._is_lagging = self._late > LAGGING_SHARE * self._messages
        if self._is_lagging and self._expired > EXPIRED_SHARE * self._calls:
            self.limit_s = min(LIMIT_MAX_S, max(LIMIT_MIN_S, 2 * self.limit_s))
        else:
            self.limit_s = self.limit_s / 2 if self.limit_s > LIMIT_MIN_S else 0.0
        self._messages = self._late = self._calls = self._expired = 0
