"""The gateway's side of the stream: every row that is put is sent, dropped or refused."""

import time
from concurrent import futures
from contextlib import contextmanager

import grpc
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.monitoring import stream as module
from headrace.monitoring.records import (
    BatchRecord,
    Block,
    RecordSchema,
    fitting,
    from_wire,
    to_wire,
)
from headrace.monitoring.stream import PredictionStream
from headrace.v1 import monitor_service_pb2 as pb
from headrace.v1 import monitor_service_pb2_grpc as pb_grpc

TIMEOUT_S = 10.0


class Monitor(pb_grpc.MonitorServiceServicer):
    """Counts rows by model; refuses what the test says."""

    def __init__(self):
        self.rows = {}
        self.refuse = lambda model: None
        self.pause_s = 0.0

    def RecordPredictions(self, request_iterator, context):
        taken = []
        for request in request_iterator:
            time.sleep(self.pause_s)
            for batch in request.batches:
                if code := self.refuse(batch.model_name):
                    context.abort(code, "refused")
                taken.append((batch.model_name, sum(batch.request_rows)))
        for model, rows in taken:
            self.rows[model] = self.rows.get(model, 0) + rows
        return pb.RecordPredictionsResponse(row_count=sum(rows for _, rows in taken))


@contextmanager
def serving(monitor):
    server = grpc.server(futures.ThreadPoolExecutor(4))
    pb_grpc.add_MonitorServiceServicer_to_server(monitor, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(0).wait()


def record(model="m", rows=10, width=1):
    columns = tuple(f"x[{i}]" for i in range(width))
    schema = SCHEMAS.setdefault(
        (model, width), RecordSchema(model, 1, "a" * 16, (Block("x", columns, "FP32"),), ())
    )
    values = np.zeros((rows, width), np.float32)
    return BatchRecord(schema, 0, [rows], rows, {"x": values}, None, [], 1.0, values.nbytes)


SCHEMAS = {}


def counted(stream):
    return stream.rows_sent + stream.rows_dropped + stream.rows_refused


def until(check):
    deadline_s = time.monotonic() + TIMEOUT_S
    while not check():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


@pytest.fixture(autouse=True)
def small_messages(monkeypatch):
    """Messages of a kilobyte and shipments of four, so that a few rows are many of them."""
    monkeypatch.setattr(module, "MESSAGE_BYTES_MAX", 1 << 10)
    monkeypatch.setattr(module, "SHIPMENT_BYTES_MAX", 4 << 10)
    monkeypatch.setattr(module, "RETRY_S", (0.05, 0.1))


def test_stopping_ships_everything_that_waits():
    monitor = Monitor()
    with serving(monitor) as address:
        stream = PredictionStream(address, max_queue_bytes=1 << 20)
        for _ in range(200):
            stream.put(record(rows=20))
        stream.start()
        stream.stop(TIMEOUT_S)

    assert monitor.rows == {"m": 4_000}
    assert (stream.rows_sent, stream.rows_dropped) == (4_000, 0)


def test_what_still_waits_when_there_is_no_more_time_is_counted_as_dropped():
    monitor = Monitor()
    monitor.pause_s = 0.02
    with serving(monitor) as address:
        stream = PredictionStream(address, max_queue_bytes=1 << 20)
        for _ in range(200):
            stream.put(record(rows=20))
        stream.start()
        stream.stop(0.2)
        stream._thread.join(TIMEOUT_S)

    assert stream.rows_sent == monitor.rows["m"]
    assert stream.rows_dropped > 0
    assert counted(stream) == 4_000


def test_a_message_that_is_refused_for_ever_takes_no_other_with_it():
    monitor = Monitor()
    monitor.refuse = lambda model: grpc.StatusCode.INVALID_ARGUMENT if model == "bad" else None
    with serving(monitor) as address:
        stream = PredictionStream(address, max_queue_bytes=1 << 20)
        for i in range(60):
            stream.put(record("bad" if i in (7, 30) else "good", rows=300))
        stream.start()
        until(lambda: counted(stream) == 60 * 300)
        for _ in range(5):
            stream.put(record("good", rows=300))
        until(lambda: monitor.rows["good"] == 63 * 300)
        stream.stop(TIMEOUT_S)

    assert (stream.rows_refused, stream.rows_dropped) == (600, 0)


def test_what_does_not_fit_is_dropped_and_counted():
    stream = PredictionStream("127.0.0.1:1", max_queue_bytes=1_000)
    for _ in range(10):
        stream.put(record(rows=50))

    assert stream.rows_dropped == 250


def test_a_batch_that_cannot_be_written_down_is_refused_and_the_stream_goes_on():
    monitor = Monitor()
    with serving(monitor) as address:
        stream = PredictionStream(address, max_queue_bytes=1 << 20)
        stream.start()
        stream.put(record()._replace(inputs={}))
        until(lambda: stream.rows_refused == 10)
        stream.put(record())
        until(lambda: stream.rows_sent == 10)
        stream.stop(TIMEOUT_S)


BLOCKS = st.lists(
    st.builds(
        lambda name, width, datatype: Block(
            name, tuple(f"{name}[{i}]" for i in range(width)), datatype
        ),
        st.text(st.characters(codec="ascii", categories=["L"]), min_size=1, max_size=300),
        st.integers(1, 256),
        st.sampled_from(["FP32", "FP64", "BYTES", "BOOL"]),
    ),
    max_size=8,
    unique_by=lambda block: block.tensor,
)


@given(BLOCKS, st.integers(1, 400))
def test_what_fits_is_taken_by_a_monitor(blocks, rows):
    kept = fitting(blocks, rows)
    kinds = {"FP32": np.float32, "FP64": np.float64, "BOOL": np.bool_, "BYTES": object}
    inputs = {
        block.tensor: np.zeros((rows, len(block.columns)), kinds[block.datatype]) for block in kept
    }
    schema = RecordSchema("m", 1, "a" * 16, tuple(kept), ())
    batch = BatchRecord(schema, 0, [rows], rows, inputs, None, [], 1.0, 1)

    (received,) = [from_wire(one) for one in to_wire([batch])]

    assert len(received.features) == sum(len(block.columns) for block in kept)


def test_a_model_of_ordinary_width_is_recorded_whole():
    blocks = [Block(f"x{i}", (f"x{i}",), "FP32") for i in range(200)]

    assert fitting(blocks, 10_000) == blocks
