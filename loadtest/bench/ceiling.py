"""The ceiling: the least a Python process can do to serve a model on grpcio's completion queue.

    python ceiling.py MODEL.onnx PORT

One thread polls, one runs whatever waits as one batch and replies. Nothing is checked: no
signature, no deadline, no cancellation, no error, no telemetry, no features. It exists to be
compared with.
"""

import os

os.environ["GRPC_EXPERIMENTS"] = "-event_engine_listener"  # before grpc is imported

import sys
import threading
import time
from concurrent import futures
from queue import SimpleQueue
from typing import Any

import grpc
import numpy as np
import onnxruntime
from grpc._cython import cygrpc
from tritonclient.grpc import service_pb2

PATH = "/inference.GRPCInferenceService/ModelInfer"
OUTSTANDING = 64
MAX_BATCH = 128


class Ceiling:
    """A server of one method."""

    def __init__(self, model: str, port: int) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self.session = onnxruntime.InferenceSession(model, options)
        self.input = self.session.get_inputs()[0].name
        self.width = self.session.get_inputs()[0].shape[1]
        self.output = self.session.get_outputs()[0].name
        self.lock = threading.Lock()
        self.waiting: list[tuple[Any, Any]] = []
        self.is_idle = False
        self.wake: SimpleQueue[None] = SimpleQueue()
        self.server = grpc.server(futures.ThreadPoolExecutor(1))
        self.core = self.server._state.server
        self.queue = self.server._state.completion_queue
        self.core.register_method(PATH)
        self.server.add_insecure_port(f"127.0.0.1:{port}")

    def serve(self) -> None:
        """Poll for ever."""
        self.core.start()
        threading.Thread(target=self.execute, daemon=True).start()
        for _ in range(OUTSTANDING):
            self.ask()
        print("serving", flush=True)
        while True:
            event = self.queue.poll(time.time() + 1)
            if event.tag is not None:
                event.tag(event)
            del event

    def ask(self) -> None:
        self.core.request_registered_call(self.queue, self.queue, PATH, self.on_call)

    def on_call(self, event: Any) -> None:
        self.ask()
        call = event.call

        def on_message(event: Any) -> None:
            raw = event.batch_operations[0].message()
            if raw is not None:
                self.put(call, service_pb2.ModelInferRequest.FromString(raw))

        call.start_server_batch((cygrpc.ReceiveMessageOperation(0),), on_message)

    def put(self, call: Any, request: Any) -> None:
        with self.lock:
            self.waiting.append((call, request))
            was_idle, self.is_idle = self.is_idle, False
        if was_idle:
            self.wake.put(None)

    def execute(self) -> None:
        while True:
            with self.lock:
                batch, self.waiting = self.waiting[:MAX_BATCH], self.waiting[MAX_BATCH:]
                self.is_idle = not batch
            if not batch:
                self.wake.get()
                continue
            rows = b"".join([request.raw_input_contents[0] for _, request in batch])
            array = np.frombuffer(rows, np.float32).reshape(-1, self.width)
            (results,) = self.session.run(None, {self.input: array})
            for (call, request), row in zip(batch, results, strict=True):
                self.reply(call, request, row)

    def reply(self, call: Any, request: Any, row: Any) -> None:
        message = service_pb2.ModelInferResponse(
            model_name=request.model_name, model_version="1", id=request.id
        )
        message.outputs.add(name=self.output, datatype="FP32", shape=(1, len(row)))
        message.raw_output_contents.append(row.tobytes())
        call.start_server_batch(
            (
                cygrpc.ReceiveCloseOnServerOperation(0),
                cygrpc.SendInitialMetadataOperation(None, 0),
                cygrpc.SendMessageOperation(message.SerializeToString(), 0),
                cygrpc.SendStatusFromServerOperation(None, 0, b"", 0),
            ),
            _ignore,
        )


def _ignore(_event: Any) -> None:
    """Take the event of a reply that was sent."""


if __name__ == "__main__":
    Ceiling(sys.argv[1], int(sys.argv[2])).serve()
