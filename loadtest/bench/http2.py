"""A gRPC load generator on bare HTTP/2 frames: each request with a body of its own.

    python http2.py --port 8500 --path /package.Service/Method --bodies FILE [--answers FILE]
        [--tolerance 1e-4] [--connections 4] [--in-flight 16] [--seconds 3] [--warm-up 1]
        [--rate 200] [--arrivals poisson|even] [--seed 1] [--then 50:5] [--timeout 0.8]

A closed loop, unless a rate is given: then requests are sent when they are due, at random times
unless told otherwise, whether the others have been answered or not. Latencies count from when they
were due. One that the server's limits do not allow waits for its turn; those that are open at the
end are waited for, and what is not answered even then counts with its age. `--then` goes on at
another rate, and reports how long it took until 99 % were served.

h2load is faster and sends one body only, which would let a server that merges equal entities cheat.
This one keeps up with every server here, without a gRPC library in the way; where it does not, it
says so. With `--answers` each reply must be the one to its own request.
"""

import argparse
import gc
import json
import math
import selectors
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import arrivals
import cores
import samples
from answers import Answers
from arrivals import Step
from bodies import read_answers, read_bodies, write_answers, write_bodies
from connection import Connection
from header_blocks import header_blocks
from record import Record
from samples import Figures, Window

__all__ = ["read_bodies", "run", "write_answers", "write_bodies"]

STALL_S = 5.0
"""A server from which nothing comes for so long is not waited for."""


class _Ran(NamedTuple):
    """What a loop knows besides its record."""

    window: Window
    ended_s: float
    cpu_share: float
    idle_share: float | None


def run(
    port: int,
    path: str,
    bodies: Sequence[bytes],
    *,
    connections: int,
    in_flight: int,
    warm_up_s: float,
    seconds: float,
    rate_per_s: float | None = None,
    is_even: bool = False,
    seed: int = 1,
    then: Step | None = None,
    timeout_s: float | None = None,
    answers: Answers | None = None,
) -> Figures:
    """
    Keep `connections` x `in_flight` requests in flight, or send `rate_per_s` as they are due.

    Args:
        port: On loopback.
        path: Of the method.
        bodies: One after another, again and again.
        connections: Requests are dealt out to them in turn.
        in_flight: On each connection, without a rate.
        warm_up_s: Before the seconds that count.
        seconds: That count.
        rate_per_s: On all connections together.
        is_even: Whether requests are due at equal distances.
        seed: Of the random times.
        then: What follows the seconds that count, with a rate.
        timeout_s: What the server is told as `grpc-timeout`; with a rate, also after what time
            an answer is not good any more, and a request that could not be sent is not sent.
        answers: Judges every reply.

    Returns:
        `samples.closed_loop` or `samples.open_loop`; after the latter, `recovered_s` if there is a
        `then`.

    Raises:
        TimeoutError: nothing came for `STALL_S`.
        ConnectionError: the server hung up.
    """
    record = Record()
    with ExitStack() as stack:
        opened = []
        for _ in range(connections):
            connection = Connection(
                port,
                header_blocks(path, timeout_s=timeout_s),
                bodies,
                record,
                answers=answers,
                timeout_s=timeout_s,
                stall_s=STALL_S,
            )
            stack.callback(connection.socket.close)
            opened.append(connection)
        if rate_per_s is None:
            ran = _in_a_closed_loop(opened, record, in_flight, warm_up_s, seconds)
            figures = samples.closed_loop(
                *(record, ran.window, _wrong(opened, answers)),
                cpu_share=ran.cpu_share,
                idle_share=ran.idle_share,
            )
            if not figures["requests"]:
                raise TimeoutError("nothing was answered")
            return figures
        steps = [Step(rate_per_s, warm_up_s), Step(rate_per_s, seconds), *([then] if then else [])]
        times_s = arrivals.even(steps) if is_even else arrivals.poisson(steps, seed)
        start_s = time.perf_counter()
        for time_s in times_s:
            record.add(start_s + time_s)
        # Added up as the times are: what is due at a border is on one side of it.
        window = Window(start_s + warm_up_s, start_s + (warm_up_s + seconds))
        ran = _in_an_open_loop(opened, record, window)
        wrong = _wrong(opened, answers)
        figures = samples.open_loop(
            record,
            window,
            wrong,
            timeout_s=timeout_s,
            ended_s=ran.ended_s,
            cpu_share=ran.cpu_share,
            idle_share=ran.idle_share,
        )
        if then is not None:
            after = Window(window.end_s, math.inf)
            figures["recovered_s"] = samples.recovery_s(record, after, wrong, timeout_s)
        return figures


def _in_a_closed_loop(
    opened: Sequence[Connection], record: Record, in_flight: int, warm_up_s: float, seconds: float
) -> _Ran:
    cpu_s, idle_s, core = 0.0, None, cores.own_core()
    is_warm = False
    with selectors.DefaultSelector() as selector:
        start_s = time.perf_counter() + warm_up_s
        for connection in opened:
            selector.register(connection.socket, selectors.EVENT_READ, connection)
            now_s = time.perf_counter()
            connection.is_refilled = True
            connection.send([record.add(now_s) for _ in range(in_flight)], now_s)
        while (now_s := time.perf_counter()) < start_s + seconds:
            if not is_warm and now_s >= start_s:
                is_warm, start_s, cpu_s = True, now_s, time.process_time()
                idle_s = cores.idle_s(core)
            if not (ready := selector.select(STALL_S)):
                raise TimeoutError(f"nothing came for {STALL_S} s")
            for key, _ in ready:
                key.data.receive()
    cpu_s = time.process_time() - cpu_s
    window = Window(start_s, time.perf_counter())
    idle_share = cores.idle_share(idle_s, cores.idle_s(core), window.seconds)
    return _Ran(window, window.end_s, cpu_s / window.seconds, idle_share)


def _in_an_open_loop(opened: Sequence[Connection], record: Record, window: Window) -> _Ran:
    due_s, count = record.due_s, len(record.due_s)
    number, share = 0, len(opened)
    core = cores.own_core()
    cpu_s, idle_s = [time.process_time()], [cores.idle_s(core)]
    marks_s = [window.start_s, window.end_s]
    # epoll and its kin wait for whole milliseconds, which every latency would have in it.
    with selectors.SelectSelector() as selector:
        for connection in opened:
            selector.register(connection.socket, selectors.EVENT_READ, connection)
        while number < count or marks_s:
            now_s = time.perf_counter()
            if marks_s and now_s >= marks_s[0]:
                del marks_s[0]
                cpu_s.append(time.process_time())
                idle_s.append(cores.idle_s(core))
            first = number
            while number < count and due_s[number] <= now_s:
                number += 1
            for place, connection in enumerate(opened):
                turn = range(first + (place - first) % share, number, share)
                if turn:
                    connection.send(turn, now_s)
            next_s = min([*marks_s[:1], *due_s[number : number + 1]], default=now_s)
            for key, _ in selector.select(max(0.0, next_s - time.perf_counter())):
                key.data.receive()
        while any(connection.unfinished for connection in opened):
            if not (ready := selector.select(STALL_S)):
                break
            for key, _ in ready:
                key.data.receive()
    idle_share = cores.idle_share(*idle_s[-2:], window.seconds)
    cpu_share = (cpu_s[-1] - cpu_s[-2]) / window.seconds
    return _Ran(window, time.perf_counter(), cpu_share, idle_share)


def _wrong(opened: Sequence[Connection], answers: Answers | None) -> list[int]:
    judged = answers.wrong() if answers is not None else []
    return [*judged, *(number for connection in opened for number in connection.not_whole)]


def _step(text: str) -> Step:
    rate, _, seconds = text.partition(":")
    return Step(float(rate), float(seconds))


def main() -> int:
    """Run from the command line; print the results as JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--path", required=True)
    parser.add_argument("--bodies", type=Path, required=True)
    parser.add_argument("--answers", type=Path, help="how the message that answers each body ends")
    parser.add_argument("--tolerance", type=float, help="of FP32 answers; else bytes are compared")
    parser.add_argument("--connections", type=int, default=4)
    parser.add_argument("--in-flight", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--warm-up", type=float, default=1.0)
    parser.add_argument("--rate", type=float, help="requests/s in all, instead of a closed loop")
    parser.add_argument("--arrivals", choices=["poisson", "even"], default="poisson")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--then", type=_step, metavar="RATE:SECONDS", help="what follows, unasked")
    parser.add_argument("--timeout", type=float, help="seconds that each call has")
    options = parser.parse_args()
    if options.then and not options.rate:
        parser.error("--then needs --rate")
    bodies = read_bodies(options.bodies)
    answers = None
    if options.answers:
        expected = read_answers(options.answers)
        if len(expected) != len(bodies):
            parser.error(f"{len(expected)} answers to {len(bodies)} bodies")
        answers = Answers(expected, options.tolerance)
    gc.disable()  # a pause would look like the server's; what is made here makes no cycles
    figures = run(
        options.port,
        options.path,
        bodies,
        connections=options.connections,
        in_flight=options.in_flight,
        warm_up_s=options.warm_up,
        seconds=options.seconds,
        rate_per_s=options.rate,
        is_even=options.arrivals == "even",
        seed=options.seed,
        then=options.then,
        timeout_s=options.timeout,
        answers=answers,
    )
    print(json.dumps(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
