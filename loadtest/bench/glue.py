"""The glue: what people write today to serve a model with Feast features, in its kindest form.

    python glue.py MODEL.onnx FEATURE_REPO SERVICE PORT

`grpc.aio`, the Feast SDK and ONNX Runtime in one process: no second hop to a model server, the
feature service resolved once (resolving it per request costs 3 ms), the synchronous SDK (its
asynchronous one is slower), protobufs parsed once, one row per run.
"""

import asyncio
import sys
from typing import Any

import grpc
import grpc.aio
import numpy as np
import onnxruntime
from feast import FeatureStore
from tritonclient.grpc import service_pb2, service_pb2_grpc


class Glue(service_pb2_grpc.GRPCInferenceServiceServicer):
    """One model behind one feature service."""

    def __init__(self, model: str, feature_repo: str, service: str) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self.session = onnxruntime.InferenceSession(model, options)
        self.input = self.session.get_inputs()[0].name
        self.output = self.session.get_outputs()[0].name
        self.store = FeatureStore(repo_path=feature_repo)
        feature_service = self.store.get_feature_service(service)
        projections = feature_service.feature_view_projections
        self.names = [f.name for p in projections for f in p.features]
        self.features = [f"{p.name}:{f.name}" for p in projections for f in p.features]

    async def ModelInfer(self, request: Any, _context: Any) -> Any:  # noqa: N802 gRPC's name
        ids = np.frombuffer(request.raw_input_contents[0], np.int64).tolist()
        found = self.store.get_online_features(
            features=self.features, entity_rows=[{request.inputs[0].name: i} for i in ids]
        ).to_dict()
        rows = np.array([found[name] for name in self.names], np.float32).T
        (result,) = self.session.run(None, {self.input: np.ascontiguousarray(rows)})
        reply = service_pb2.ModelInferResponse(
            model_name=request.model_name, model_version="1", id=request.id
        )
        reply.outputs.add(name=self.output, datatype="FP32", shape=result.shape)
        reply.raw_output_contents.append(result.tobytes())
        return reply


async def serve(glue: Glue, port: int) -> None:
    """Serve for ever."""
    server = grpc.aio.server()
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(glue, server)
    server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    print("serving", flush=True)
    await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(serve(Glue(*sys.argv[1:4]), int(sys.argv[4])))
