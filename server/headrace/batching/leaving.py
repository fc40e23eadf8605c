"""Whether a call that is over was left by its caller, or had no time left. Pure.

gRPC closes both alike, and a caller whose time is over cancels as one does who changes his mind. He
often comes first: the timeout that a server is told is counted from when it arrives, and rounded up
to three digits.

Source: grpc's `timeout_encoding.cc`, `Timeout::FromMillis`.
"""

NEAR_S = 0.01
"""So long before its deadline a call is over for want of time: it was on its way so long, about."""

NEAR_SHARE = 0.01
"""Or that part of what it has waited: a timeout is rounded up by as much."""


def ran_out(left_s: float, waited_s: float) -> bool:
    """
    Say whether a call that its caller no longer waits for had no time left.

    Args:
        left_s: Until its deadline, in seconds; infinite where there is none, negative after it.
        waited_s: Since it came.
    """
    return left_s <= max(NEAR_S, NEAR_SHARE * waited_s)
