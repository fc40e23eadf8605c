"""The end of a process that serves: in peace if the interpreter can end, else at once."""

import os
import sys

from headrace.app import Gateway


def end_if_held_up(gateway: Gateway, code: int) -> None:
    """
    End the process at once where the interpreter could not; otherwise return.

    It could not where threads wait for what has died, or where a load that nobody waits for any
    more is in native code: that would come back to an interpreter that is not there.

    Args:
        gateway: One that has stopped, or failed.
        code: The process' exit code.
    """
    is_loading = gateway.repository.abandon()
    if code == 0 and not is_loading:
        return
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
