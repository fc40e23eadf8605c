"""Workers that hang, or die before they have served: the supervisor does not wait for them."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
from worker_processes import workers_of

SUPERVISE_WITH_A_FAULT = """
import sys
from headrace.__main__ import main
from headrace.workers import process, supervisor

{fault}
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def supervise(tmp_path):
    processes = []

    def begin(fault):
        command = [sys.executable, "-c", SUPERVISE_WITH_A_FAULT.format(fault=fault), "serve"]
        command += ["--model-repository", str(tmp_path), "--workers", "2", "--drain-delay-s", "0"]
        command += ["--grpc-address", "127.0.0.1:0", "--http-address", "127.0.0.1:0"]
        processes.append(
            subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ
            )
        )
        return processes[-1]

    yield begin
    for process in processes:
        process.kill()
        process.communicate(timeout=20)


def is_ready(address):
    url = f"http://{address}/readyz"
    with contextlib.suppress(urllib.error.HTTPError), urllib.request.urlopen(url) as reply:
        return reply.read() == b"ready\n"
    return False


def test_a_worker_that_answers_nothing_for_long_is_replaced(supervise):
    process = supervise("supervisor.LOOK_PERIOD_S, supervisor.UNANSWERED_MAX = 0.2, 10")
    address = json.loads(process.stdout.readline())["http_address"]
    before = set(workers_of(process))
    hung = min(before)

    os.kill(hung, signal.SIGSTOP)

    deadline_s = time.monotonic() + 60
    while hung in workers_of(process) or len(workers_of(process)) < 2 or not is_ready(address):
        assert time.monotonic() < deadline_s
        time.sleep(0.05)
    assert before - set(workers_of(process)) == {hung}  # the other answers, and stays
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0
    assert "worker_hangs" in process.stderr.read()


def test_a_worker_that_dies_at_the_first_start_ends_everything_with_1(supervise):
    dies = "process.interpreter = lambda: [sys.executable, '-c', 'import os; os.abort()']"
    process = supervise(dies)

    assert process.wait(60) == 1
    assert process.stdout.read() == ""
    (line,) = [line for line in process.stderr if "worker_died_at_start" in line]
    assert json.loads(line)["reason"] == "SIGABRT"
