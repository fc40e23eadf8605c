"""A servicer as people write it, in its kindest form: `grpc.aio` with ONNX Runtime in process.

    python aio_server.py MODEL.onnx PORT

On uvloop where it is installed, one row per run, nothing checked: what ModelInfer costs where it is
an ordinary handler of an asyncio server.
"""

import asyncio
import sys
from typing import Any

import grpc.aio
import numpy as np
import onnxruntime
from tritonclient.grpc import service_pb2, service_pb2_grpc

try:
    from uvloop import new_event_loop
except ImportError:
    from asyncio import new_event_loop


class Servicer(service_pb2_grpc.GRPCInferenceServiceServicer):
    """One model."""

    def __init__(self, model: str) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self.session = onnxruntime.InferenceSession(model, options)
        self.input = self.session.get_inputs()[0].name
        self.output = self.session.get_outputs()[0].name

    async def ModelInfer(self, request: Any, _context: Any) -> Any:  # noqa: N802 gRPC's name
        rows = np.frombuffer(request.raw_input_contents[0], np.float32)
        (result,) = self.session.run(None, {self.input: rows.reshape(request.inputs[0].shape)})
        reply = service_pb2.ModelInferResponse(
            model_name=request.model_name, model_version="1", id=request.id
        )
        reply.outputs.add(name=self.output, datatype="FP32", shape=result.shape)
        reply.raw_output_contents.append(result.tobytes())
        return reply


async def serve(model: str, port: int) -> None:
    """Serve for ever."""
    server = grpc.aio.server()
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(Servicer(model), server)
    server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    print("serving", flush=True)
    await server.wait_for_termination()


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(serve(sys.argv[1], int(sys.argv[2])))
