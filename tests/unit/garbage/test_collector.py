"""
One owner of Python's collector, however many gateways a process has.

What is tested of the interpreter's own collector runs in processes of its own: here other tests'
gateways hold it too.
"""

import subprocess
import sys
import textwrap
import threading
import time

import pytest
import structlog

from headrace.garbage.collector import GarbageCollector
from headrace.garbage.pace import RECENT_OBJECTS, YOUNG_OBJECTS, Work
from headrace.garbage.pauses import Pauses


class FakeHeap:
    """Does as it is told, and remembers it."""

    def __init__(self):
        self.objects = 0
        self.survivors = 0
        self.done = []
        self.holders = []
        self.collecting = threading.Event()
        self.fails = False

    def take(self, on_gc):
        self.holders.append(on_gc)
        return 1_000

    def give_back(self, on_gc):
        self.holders.remove(on_gc)

    def young(self):
        return self.objects

    def survived(self):
        return self.survivors

    def collect(self, work):
        self.collecting.set()
        if self.fails:
            raise MemoryError
        self.done.append(work)
        self.objects = 0
        return 5


@pytest.fixture
def heap():
    return FakeHeap()


@pytest.fixture
def collector(heap):
    collector = GarbageCollector(is_idle=lambda: False, heap=heap)
    yield collector
    collector.stop(10)


def until(condition):
    limit_s = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < limit_s
        time.sleep(0.01)


def test_it_collects_by_itself_when_it_is_due(collector, heap):
    heap.objects = YOUNG_OBJECTS
    collector.start()
    until(lambda: heap.done)
    assert heap.done == [Work.YOUNG]


def test_a_loaded_model_is_set_aside_once(collector, heap):
    collector.start()
    collector.loaded()
    until(lambda: heap.done)
    assert collector.look() is None
    assert heap.done == [Work.RECENT]


def test_it_gives_back_what_it_took_and_only_once(collector, heap):
    collector.start()
    assert heap.holders == [collector.pauses.on_gc]
    for _ in range(2):
        collector.stop(10)
        assert heap.holders == []
    assert not collector._thread.is_alive()


def test_one_that_never_started_has_nothing_to_give_back(collector, heap):
    collector.stop(10)
    assert collector.look() is None
    assert heap.done == []


def test_a_collection_that_fails_is_told_of_and_not_the_last(collector, heap):
    heap.fails, heap.objects = True, YOUNG_OBJECTS
    with structlog.testing.capture_logs() as lines:
        collector.start()
        until(lambda: lines)
        heap.fails = False
        until(lambda: heap.done)
    assert {line["event"] for line in lines} == {"garbage_not_collected"}


def test_a_pause_lasts_from_start_to_stop():
    pauses = Pauses()
    pauses.on_gc("stop", {"generation": 2})  # began before anybody measured
    pauses.on_gc("start", {"generation": 0})
    pauses.on_gc("stop", {"generation": 0})
    (family,) = pauses.collect()
    counts = {
        sample.labels["generation"]: sample.value
        for sample in family.samples
        if sample.name.endswith("_count")
    }
    assert counts == {"young": 1, "middle": 0, "old": 0}


def run(script):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", PREAMBLE + textwrap.dedent(script)],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr


PREAMBLE = """
import gc, time
from headrace.garbage.collector import AUTOMATIC_OBJECTS, GarbageCollector
from headrace.garbage.pace import YOUNG_OBJECTS, Work

class Knot:
    def __init__(self):
        self.me = self

def until(condition):
    limit_s = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < limit_s
        time.sleep(0.01)

def pauses(collector):
    (family,) = collector.pauses.collect()
    return {
        s.labels["generation"]: s.value for s in family.samples if s.name.endswith("_count")
    }

def state():
    return gc.isenabled(), gc.get_threshold(), gc.get_freeze_count(), list(gc.callbacks)
"""


@pytest.mark.parametrize("begin", ["gc.enable()", "gc.disable()", "gc.set_threshold(123, 4, 5)"])
def test_python_is_left_as_it_was_found(begin):
    run(f"""
        {begin}
        before = state()
        collector = GarbageCollector(is_idle=lambda: True)
        collector.start()
        assert gc.get_freeze_count() and gc.callbacks
        assert gc.get_threshold()[0] == AUTOMATIC_OBJECTS
        collector.stop(30)
        assert state() == before
    """)


def test_of_two_in_one_process_the_last_one_restores():
    run("""
        before = state()
        one, two = (GarbageCollector(is_idle=lambda: True) for _ in range(2))
        one.start()
        two.start()
        one.stop(30)
        assert gc.get_threshold()[0] == AUTOMATIC_OBJECTS
        assert gc.get_freeze_count()
        assert len(gc.callbacks) == 2  # the heap's own, and one that times it
        two.stop(30)
        assert state() == before
    """)


def test_garbage_in_cycles_is_freed_and_every_pause_counted():
    run("""
        import weakref
        collector = GarbageCollector(is_idle=lambda: False)
        collector.start()
        watched = weakref.ref(Knot())
        for _ in range(YOUNG_OBJECTS):
            Knot()
        until(lambda: watched() is None)
        assert pauses(collector)["young"] >= 1
        collector.stop(30)
    """)


def test_a_burst_between_two_looks_is_cut_to_pieces():
    run("""
        collector = GarbageCollector(is_idle=lambda: False)
        collector.start()
        collector._stopping.set()  # nobody looks
        collector._thread.join(30)
        kept = [[number] for number in range(5 * AUTOMATIC_OBJECTS)]
        assert pauses(collector)["young"] >= 4
        assert pauses(collector)["old"] == 0
        collector.stop(30)
    """)


def test_what_outlives_a_collection_of_the_interpreters_own_is_looked_at_again(collector, heap):
    heap.survivors = 7 * RECENT_OBJECTS  # before anybody looked: set aside with the rest
    collector.start()
    collector._stopping.set()  # nobody else looks
    collector._thread.join(30)
    assert collector.look() is None
    heap.survivors += RECENT_OBJECTS
    assert collector.look() is Work.RECENT
    assert collector.look() is None
    assert heap.done == [Work.RECENT]


def test_the_interpreters_own_collections_are_counted_and_the_collectors_are_not():
    run("""
        collector = GarbageCollector(is_idle=lambda: False)
        collector.start()
        collector._stopping.set()  # nobody looks
        collector._thread.join(30)
        heap = collector._heap
        kept = [[number] for number in range(3 * AUTOMATIC_OBJECTS)]
        automatic = heap.survived()
        assert 2 * AUTOMATIC_OBJECTS <= automatic <= 3.2 * AUTOMATIC_OBJECTS
        for _ in range(2 * AUTOMATIC_OBJECTS):
            Knot()
        heap.collect(Work.YOUNG)
        assert heap.survived() - automatic < AUTOMATIC_OBJECTS  # garbage survives nothing
        before = heap.survived()
        gc.disable()
        more = [[number] for number in range(1000)]
        assert heap.collect(Work.YOUNG) >= 1000
        assert heap.collect(Work.RECENT) >= len(kept)
        assert heap.collect(Work.WHOLE) >= len(kept)
        assert heap.survived() == before
        collector.stop(30)
    """)


def test_a_pause_lasts_until_everything_is_counted():
    run("""
        collector = GarbageCollector(is_idle=lambda: True)
        collector.start()
        collector._stopping.set()  # nobody looks
        collector._thread.join(30)
        real = gc.get_objects

        def slow():
            time.sleep(0.2)
            return real()

        gc.get_objects = slow
        collector._heap.collect(Work.RECENT)
        gc.get_objects = real
        (family,) = collector.pauses.collect()
        total_s = sum(
            s.value
            for s in family.samples
            if s.name.endswith("_sum") and s.labels["generation"] == "old"
        )
        assert total_s >= 0.2
        collector.stop(30)
    """)


def test_garbage_that_was_set_aside_alive_is_found_by_a_whole_look():
    run("""
        import weakref
        collector = GarbageCollector(is_idle=lambda: True)
        kept = Knot()
        watched = weakref.ref(kept)
        collector.start()
        del kept
        collector.loaded()
        until(lambda: pauses(collector)["old"])
        assert watched() is not None  # it is where nobody looks
        collector._heap.collect(Work.WHOLE)
        assert watched() is None
        assert gc.get_freeze_count()  # what is left is set aside again
        collector.stop(30)
    """)
