"""Callers who want something done hear of it once, and never wait for a server that stops."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from headrace.errors import Draining
from headrace.repository.commands import Commands

TIMEOUT_S = 10.0


def nothing():
    pass


@pytest.fixture
def commands():
    return Commands()


@pytest.fixture
def pool():
    with ThreadPoolExecutor(4) as pool:
        yield pool


def ask(pool, commands, what):
    """Ask on a thread; return its future once the command is in the queue."""
    queued = threading.Event()
    asked = pool.submit(commands.ask, what, TIMEOUT_S, queued.set)
    assert queued.wait(TIMEOUT_S)
    return asked


def test_what_is_asked_for_is_done_and_what_it_raises_is_the_callers(pool, commands):
    done = []
    asked = [ask(pool, commands, lambda: done.append(1)), ask(pool, commands, lambda: 1 / 0)]

    commands.run()

    assert asked[0].result(TIMEOUT_S) is None
    assert done == [1]
    assert isinstance(asked[1].exception(TIMEOUT_S), ZeroDivisionError)


def test_a_stop_tells_whoever_waits_at_once_whatever_is_still_being_done(pool, commands):
    began, goes_on = threading.Event(), threading.Event()

    def long():
        began.set()
        assert goes_on.wait(TIMEOUT_S)

    first = ask(pool, commands, long)
    running = pool.submit(commands.run)
    assert began.wait(TIMEOUT_S)
    second = ask(pool, commands, nothing)

    commands.close()

    for waiting in (first, second):
        assert isinstance(waiting.exception(TIMEOUT_S), Draining)
    assert not running.done()
    goes_on.set()
    running.result(TIMEOUT_S)


def test_after_a_stop_nothing_is_asked_for_and_nothing_done(pool, commands):
    done = []
    waiting = ask(pool, commands, lambda: done.append(1))
    commands.close()
    assert isinstance(waiting.exception(TIMEOUT_S), Draining)

    with pytest.raises(Draining):
        commands.ask(lambda: done.append(2), TIMEOUT_S, nothing)
    commands.run()

    assert done == []


def test_who_waits_no_longer_is_not_waited_for(commands):
    with pytest.raises(TimeoutError):
        commands.ask(nothing, 0.0, nothing)
    commands.close()
