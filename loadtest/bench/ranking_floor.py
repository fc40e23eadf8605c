"""The floor of ranking: the least that 200 entities x 16 features and one run of a model can cost.

    python ranking_floor.py MODEL.onnx REDIS_PORT HMGET|HGETALL ANSWERS

A loop on one blocking socket: a pipeline that was packed before, as many bytes read as the answer
is known to have, the floats taken out of them as strided arrays, one `session.run`. No protocol is
parsed, no time or status looked at, nothing checked but the predictions, when the clock has
stopped. It exists to be compared with, as `ceiling.py` does. HMGET asks for the features and
nothing else; of hashes as small as these the store gives the whole one sooner.

Takes lines `SECONDS IN_FLIGHT` and answers each with a line of JSON as `http2.py` does, with
`cpu_s` besides; a line `answers N` with the predictions of the first N requests. With several in
flight their pipelines are under way together, and the store works while the model runs.

Source: Feast's own functions for keys and fields; RESP2 (https://valkey.io/topics/protocol/).
"""

import json
import socket
import sys
import time
from collections import deque
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import hiredis
import numpy as np
import onnxruntime
from bodies import read_answers
from feast.infra.online_stores.helpers import _mmh3, _redis_key
from feast.protos.feast.types.EntityKey_pb2 import EntityKey
from feast.protos.feast.types.Value_pb2 import Value
from numpy.typing import NDArray
from subjects import PROJECT, VIEWS, WIDTH, feature_names, ranking_ids

TOLERANCE = 1e-4
"""As of the servers' answers: a batch may add up in another order than another batch."""

FIELDS = [_mmh3(name) for name in feature_names()]


class Floor:
    """One connection, one session."""

    def __init__(self, model: str, port: int, command: str) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self.session = onnxruntime.InferenceSession(model, options)
        self.input = self.session.get_inputs()[0].name
        self.socket = socket.create_connection(("127.0.0.1", port))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.pipelines = [pipeline(command, ids) for ids in ranking_ids()]
        rows, (row_bytes, starts) = len(ranking_ids()[0]), self._layout(command)
        self.buffer = bytearray(rows * row_bytes)
        per_view = WIDTH // len(VIEWS)
        self.features: list[NDArray[np.float32]] = [
            np.ndarray((rows, per_view), "<f4", self.buffer, at[0], (row_bytes, _even(at)))
            for at in (starts[i : i + per_view] for i in range(0, WIDTH, per_view))
        ]

    def predict(self, number: int) -> NDArray[np.float32]:
        """Return a request's predictions, shape (rows,)."""
        self._ask(number)
        return self._answer()

    def measure(
        self, seconds: float, in_flight: int, expected: Sequence[NDArray[np.float32]]
    ) -> dict[str, float]:
        """
        Predict one request after the other, with so many under way.

        Args:
            seconds: How long, about.
            in_flight: Requests that are with the store or in the model.
            expected: What each must be answered; `wrong` are those that were not.
        """
        found: list[NDArray[np.float32]] = []
        latencies_s: list[float] = []
        sent_s: deque[float] = deque()
        cpu_s, start_s = time.process_time(), time.perf_counter()
        now_s = start_s
        for number in range(in_flight):
            self._ask(number)
            sent_s.append(now_s)
        while now_s < start_s + seconds:
            found.append(self._answer())
            now_s = time.perf_counter()
            latencies_s.append(now_s - sent_s.popleft())
            self._ask(len(found) + len(sent_s))
            sent_s.append(now_s)
        cpu_s = time.process_time() - cpu_s
        for _ in sent_s:
            self._answer()
        wrong = sum(
            not np.allclose(one, expected[number % len(expected)], rtol=TOLERANCE, atol=TOLERANCE)
            for number, one in enumerate(found)
        )
        ordered = sorted(latencies_s)
        return {
            "requests": len(found),
            "requests_per_s": len(found) / (now_s - start_s),
            "errors": 0,
            "wrong": wrong,
            "mean_ms": 1e3 * sum(ordered) / len(ordered),
            "p50_ms": 1e3 * ordered[len(ordered) // 2],
            "p99_ms": 1e3 * ordered[len(ordered) * 99 // 100],
            "cpu_s": cpu_s,
        }

    def _ask(self, number: int) -> None:
        self.socket.sendall(self.pipelines[number % len(self.pipelines)])

    def _answer(self) -> NDArray[np.float32]:
        """Take the oldest request's reply and run the model on it."""
        view, received = memoryview(self.buffer), 0
        while received < len(self.buffer):
            size = self.socket.recv_into(view[received:])
            if not size:
                raise ConnectionError("the store hung up")
            received += size
        (result,) = self.session.run(None, {self.input: np.concatenate(self.features, axis=1)})
        predictions: NDArray[np.float32] = result[:, 0]
        return predictions

    def _layout(self, command: str) -> tuple[int, list[int]]:
        """Return how long an entity's reply is, and where each feature's float begins in it."""
        self.socket.sendall(pipeline(command, ranking_ids()[0][:1]))
        reader = hiredis.Reader()
        while (cells := reader.gets()) is False:
            reader.feed(self.socket.recv(1 << 16))
        length, starts = len(b"*%d\r\n" % len(cells)), []
        for cell in cells:
            starts.append(length + len(b"$%d\r\n" % len(cell)))
            length = starts[-1] + len(cell) + len(b"\r\n")
        is_whole = command == "HGETALL"  # names and values in turn
        places = [cells.index(name) + 1 for name in FIELDS] if is_whole else range(WIDTH)
        floats = [starts[place] + 1 for place in places]  # after the tag of the value
        return length, floats


def _even(starts: Sequence[int]) -> int:
    """Return how far apart they all are."""
    gaps = {after - before for before, after in pairwise(starts)}
    if len(gaps) != 1:
        raise RuntimeError("the features of a view do not lie evenly")
    return gaps.pop()


def pipeline(command: str, ids: Sequence[int]) -> bytes:
    """Return one command for each entity."""
    commands = []
    for one in ids:
        key = EntityKey(join_keys=["item_id"], entity_values=[Value(int64_val=one)])
        words = [command.encode(), _redis_key(PROJECT, key, entity_key_serialization_version=3)]
        words += FIELDS if command == "HMGET" else []
        commands.append(b"*%d\r\n" % len(words))
        commands += [b"$%d\r\n%b\r\n" % (len(word), word) for word in words]
    return b"".join(commands)


def main() -> int:
    """Answer lines until there are no more."""
    floor = Floor(sys.argv[1], int(sys.argv[2]), sys.argv[3])
    expected = [np.frombuffer(raw, "<f4") for raw in read_answers(Path(sys.argv[4]))]
    print("serving", flush=True)
    for line in sys.stdin:
        if line.startswith("answers"):
            count = int(line.split()[1])
            answer: object = [floor.predict(number).tolist() for number in range(count)]
        else:
            seconds, in_flight = line.split()
            answer = floor.measure(float(seconds), int(in_flight), expected)
        print(json.dumps(answer), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
