"""The supervisor's side of one worker: its process, and the channel to it."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from headrace.workers.channel import ChannelBrokenError, Decoder, Message, encode

WAITING_BYTES_MAX = 4 * 2**20
"""Of messages to a worker that does not read them; it is ended then."""

_PIECE_BYTES = 1 << 18


class WorkerProcess:
    """
    One process, from its start to its end. Never waits; one thread's own.

    It has a session of its own, so that Ctrl-C reaches only the supervisor; it ends when the
    channel does. What it prints goes to standard error: standard output is the supervisor's.

    Args:
        number: From 1.
        device: The GPU that it sees; None for what this process sees.
        start: Its first message.

    Raises:
        OSError: no process can be started.
    """

    def __init__(self, number: int, device: str | None, start: Message) -> None:
        self.number = number
        self.is_started = False
        self.cannot_start: str | None = None
        """Why, as it says itself."""
        self.unanswered = 0
        """Looks in a row that it has not answered."""
        self._waiting = bytearray(encode(start))
        self._decoder = Decoder()
        self.channel, theirs = socket.socketpair()
        self.channel.settimeout(0)
        with theirs:
            try:
                self._process = subprocess.Popen(
                    [*interpreter(), "-m", "headrace", "serve-worker", str(theirs.fileno())],
                    stdin=subprocess.DEVNULL,
                    stdout=2,
                    env=_environment(os.environ, device),
                    pass_fds=[theirs.fileno()],
                    start_new_session=True,
                )
            except OSError:
                self.channel.close()
                raise
        self.pid = self._process.pid
        self.write()

    @property
    def wants_to_write(self) -> bool:
        """Whether messages wait for the channel to take them."""
        return bool(self._waiting)

    def send(self, message: Message) -> None:
        """Send as soon as the channel takes it. A worker that reads nothing for long is ended."""
        self._waiting += encode(message)
        self.write()
        if len(self._waiting) > WAITING_BYTES_MAX:
            self.kill()

    def write(self) -> None:
        """Send what waits, as far as the channel takes it."""
        with contextlib.suppress(OSError):  # full, or broken: reading finds that out
            while self._waiting:
                del self._waiting[: self.channel.send(self._waiting)]

    def read(self) -> list[Message] | None:
        """Return what has come; None when nothing will come any more."""
        try:
            piece = self.channel.recv(_PIECE_BYTES)
            return self._decoder.feed(piece) if piece else None
        except (BlockingIOError, InterruptedError):
            return []
        except (OSError, ChannelBrokenError):
            return None

    def exit_code(self) -> int | None:
        """Return it as `subprocess` does; None while the process is there."""
        return self._process.poll()

    def kill(self) -> None:
        """End it at once."""
        with contextlib.suppress(OSError):
            self._process.kill()

    def reap(self) -> None:
        """Kill it and wait: it cannot refuse."""
        self.kill()
        self._process.wait()


def interpreter() -> list[str]:
    """Return how to start this Python with modules found where this process finds them."""
    finds_here = sys.path[:1] in ([""], [str(Path.cwd())])
    return [sys.executable, *([] if finds_here else ["-P"])]


def describe_exit(code: int) -> str:
    """Say how a process ended, for people."""
    if code >= 0:
        return f"exit code {code}"
    with contextlib.suppress(ValueError):
        return signal.Signals(-code).name
    return f"signal {-code}"


def _environment(own: Mapping[str, str], device: str | None) -> dict[str, str]:
    return dict(own) if device is None else {**own, "CUDA_VISIBLE_DEVICES": device}
