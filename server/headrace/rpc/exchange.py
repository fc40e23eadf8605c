"""What one stream has taken and not yet sent: whether it may take more, and what goes out next.

Decides for both ingresses; reads no clock and holds no lock.
"""

from collections import deque

MESSAGES_MAX = 64
"""
Messages of one stream that are unanswered, or whose answers the transport has not taken. Two of the
usual largest batches: one is carried while the next one gathers.
"""

BYTES_MAX = 4 << 20
"""
Bytes of them at which no further message is asked for: of the message until it is answered, then of
its answer. One message is always taken, whatever its size.
"""


class Exchange:
    """
    The accounts of one stream; its owner calls under a lock of its own.

    Every message that is accepted is answered at most once, and every answer is taken at most once,
    in the order in which they were given, one at a time: `take`, and `sent` before the next.
    """

    __slots__ = (
        "_answers",
        "_held_bytes",
        "_sending_bytes",
        "is_closed",
        "is_sending",
        "unanswered",
    )

    def __init__(self) -> None:
        self._answers: deque[bytes] = deque()
        self._held_bytes = self._sending_bytes = 0
        self.is_closed = False
        """Whether no further answer counts."""
        self.is_sending = False
        """Whether an answer was taken and not yet reported as sent."""
        self.unanswered = 0
        """Messages that wait for their answer."""

    @property
    def under_way(self) -> int:
        """Messages that are unanswered, or whose answers are not sent."""
        return self.unanswered + len(self._answers) + self.is_sending

    @property
    def has_room(self) -> bool:
        """Whether another message may be accepted."""
        under_way = self.under_way
        return under_way < MESSAGES_MAX and (self._held_bytes < BYTES_MAX or not under_way)

    @property
    def held_bytes(self) -> int:
        """Bytes of unanswered messages and of unsent answers."""
        return self._held_bytes

    def accept(self, size: int) -> None:
        """Count a message of so many bytes."""
        self.unanswered += 1
        self._held_bytes += size

    def answer(self, size: int, answer: bytes) -> None:
        """Queue the answer to a message of so many bytes; without effect after `close`."""
        if self.is_closed:
            return
        self.unanswered -= 1
        self._held_bytes += len(answer) - size
        self._answers.append(answer)

    def take(self) -> bytes | None:
        """Return the next answer to send; None while one is on its way, or when there is none."""
        if self.is_sending or not self._answers:
            return None
        self.is_sending = True
        answer = self._answers.popleft()
        self._sending_bytes = len(answer)
        return answer

    def sent(self) -> None:
        """Say that the transport has the answer that was taken last."""
        self.is_sending = False
        self._held_bytes -= self._sending_bytes
        self._sending_bytes = 0

    def close(self, *, drop_answers: bool = True) -> None:
        """Expect no further answers, and drop those that wait unless they shall still be sent."""
        self.is_closed = True
        self.unanswered = 0
        if drop_answers:
            self._answers.clear()
        self._held_bytes = self._sending_bytes + sum(map(len, self._answers))
