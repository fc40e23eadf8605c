"""Whether each answer is the one to its own request.

A reply is judged by how its message ends: the raw outputs are the last field of an infer response.
Bytes are compared on the spot. Numbers are put aside and compared some thousands at a time, which
costs the generator next to nothing.

Source: `inference.ModelInferResponse`, `raw_output_contents`, little-endian FP32.
"""

from collections.abc import Sequence

import numpy as np

AT_A_TIME = 4_096


class Answers:
    """
    Compares messages with what was expected.

    Args:
        expected: How the message that answers each body ends, in the order of the bodies; request
            `number` has body `number % len(expected)`.
        tolerance: Relative, and absolute below 1, of FP32 numbers; None to compare bytes.

    Raises:
        ValueError: there is nothing to compare with, or it is not made of FP32 numbers.
    """

    def __init__(self, expected: Sequence[bytes], tolerance: float | None = None) -> None:
        if not expected or not all(expected):
            raise ValueError("every body needs an answer of a byte at least")
        if tolerance is not None and any(len(one) % 4 for one in expected):
            raise ValueError("a tolerance is for FP32 numbers, of four bytes each")
        self._expected = expected
        self._tolerance = tolerance
        self._wrong: list[int] = []
        self._numbers: list[int] = []
        self._ends: list[bytes] = []

    def check(self, number: int, message: bytes) -> None:
        """Compare the message that answered a request."""
        expected = self._expected[number % len(self._expected)]
        if self._tolerance is None:
            if not message.endswith(expected):
                self._wrong.append(number)
            return
        if len(message) < len(expected):
            self._wrong.append(number)
            return
        self._numbers.append(number)
        self._ends.append(message[-len(expected) :])
        if len(self._ends) >= AT_A_TIME:
            self._compare()

    def wrong(self) -> list[int]:
        """Return the requests that got another answer than their own."""
        if self._ends:
            self._compare()
        return self._wrong

    def _compare(self) -> None:
        expected = [self._expected[number % len(self._expected)] for number in self._numbers]
        starts = np.cumsum([0, *(len(one) // 4 for one in expected[:-1])])
        is_close = np.isclose(
            np.frombuffer(b"".join(self._ends), "<f4"),
            np.frombuffer(b"".join(expected), "<f4"),
            rtol=self._tolerance,
            atol=self._tolerance,
            equal_nan=True,
        )
        is_right = np.logical_and.reduceat(is_close, starts)
        self._wrong += np.array(self._numbers)[~is_right].tolist()
        self._numbers.clear()
        self._ends.clear()
