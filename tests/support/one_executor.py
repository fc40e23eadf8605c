"""One executor, driven by hand under a clock of the test's: it never sleeps."""

import threading


class Rests(Exception):
    """The executor would sleep now."""


class Clock:
    """What the modules under test believe to be `time` and `threading`."""

    def __init__(self, now_s=0.0):
        self.now_s = now_s

    def time(self):
        return self.now_s

    perf_counter = time

    def get_ident(self):
        return 1

    def Lock(self):
        return threading.Lock()


class Tokens:
    """In place of `SimpleQueue`."""

    def put(self, _):
        pass

    def get(self, timeout=None):
        raise Rests
