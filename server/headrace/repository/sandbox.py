"""Runs `check_onnx`, the ONNX checker, in a process of its own with limits on time and memory."""

import contextlib
import json
import os
import select
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Self

import structlog

from headrace.errors import ModelLoadError

_LOG = structlog.get_logger(__name__)

CHECK_TIMEOUT_S = 60.0
"""For one model, starting the process included."""

KILL_TIMEOUT_S = 5.0

_ENVIRONMENT = {"PATH", "LD_LIBRARY_PATH", "LANG", "LC_ALL", "TMPDIR"}
"""What the checker's process gets of ours: no credentials, no proxies."""


class OnnxChecker:
    """
    Checks models one after another; used by one thread. Another may `close` it, at the very end.

    The process starts with the first model and serves until `close`, so that many models cost one
    start: a third of a second of CPU, which a server on one core would feel. A process that dies or
    is too slow is killed and takes only the model it was at.

    Args:
        timeout_s: Longest that one model may take.
    """

    def __init__(self, timeout_s: float = CHECK_TIMEOUT_S) -> None:
        self._timeout_s = timeout_s
        self._process: subprocess.Popen[bytes] | None = None
        self._used_s = 0.0

    def check(self, model: Path) -> None:
        """
        Check one file.

        Raises:
            ModelLoadError: it is not a valid model, or checking it took too much time or memory.
        """
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-m", "headrace.repository.check_onnx"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={name: os.environ[name] for name in _ENVIRONMENT & os.environ.keys()},
            )
        self._used_s = time.monotonic()
        answer = self._ask(self._process, json.dumps(str(model)).encode() + b"\n")
        if answer is None:
            raise ModelLoadError(
                f"{model.name}: the ONNX checker gave up on it (time or memory; "
                f"{self._timeout_s:g} s are allowed)"
            )
        if answer["reason"] is not None:
            # Its text names absolute paths: for the log only.
            _LOG.warning("onnx_checker_refused", error=answer["details"])
            raise ModelLoadError(f"{model.name}: the ONNX checker refuses it ({answer['reason']})")

    def close_when_idle(self, idle_s: float) -> None:
        """End the process if it has had nothing to do for so long."""
        if self._process is not None and time.monotonic() - self._used_s >= idle_s:
            self.close()

    def close(self) -> None:
        """End the process. The next model starts another."""
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):  # the kernel holds it: it is dead
            process.wait(KILL_TIMEOUT_S)
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):  # a question that nobody took is flushed
                    pipe.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _ask(self, process: subprocess.Popen[bytes], question: bytes) -> dict[str, str] | None:
        """Return the answer; None, with the process ended, when there is none in time."""
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(question)
            process.stdin.flush()
            line, pipe = b"", process.stdout.fileno()
            deadline_s = time.monotonic() + self._timeout_s
            while not line.endswith(b"\n"):
                remaining_s = deadline_s - time.monotonic()
                if remaining_s <= 0 or not select.select([pipe], [], [], remaining_s)[0]:
                    break
                piece = os.read(pipe, 1 << 16)
                if not piece:
                    break
                line += piece
            else:
                answer: dict[str, str] = json.loads(line)
                return answer
        except (OSError, ValueError) as error:
            _LOG.warning("onnx_checker_failed", error=str(error))
        self.close()
        return None
