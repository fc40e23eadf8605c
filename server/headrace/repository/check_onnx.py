"""ONNX's own checker, in a process with limits: `python -m headrace.repository.check_onnx`.

Reads one path per line and answers each with one line of JSON, `{"reason": null}` or why not. It is
a program of its own because a model is untrusted input to a parser: what it can cost is memory and
time of a process that may be killed. Nothing else of headrace is imported here.
"""

import json
import os
import resource
import sys

MEMORY_BYTES = 8 << 30
"""Address space. Protobuf messages end at 2 GiB; parsing takes some times a model's size."""

NICENESS = 10


def main() -> int:
    """Check what comes on standard input until it ends."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.nice(NICENESS)
    import onnx  # noqa: PLC0415 within the limits

    for line in sys.stdin:
        reason, details = None, ""
        try:
            onnx.checker.check_model(json.loads(line))
        except Exception as error:  # noqa: BLE001 whatever it is, the model is refused
            reason, details = type(error).__name__, str(error)[:1_000]
        sys.stdout.write(json.dumps({"reason": reason, "details": details}) + "\n")
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
