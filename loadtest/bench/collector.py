"""A collector that takes spans and forgets them, unread: `collector.py PORT`.

It shares the generator's core: what it costs there must not look like a cost of the gateway.
"""

import sys
from concurrent import futures

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2

SERVICE = "opentelemetry.proto.collector.trace.v1.TraceService"
TAKEN = trace_service_pb2.ExportTraceServiceResponse().SerializeToString()

if __name__ == "__main__":
    server = grpc.server(
        futures.ThreadPoolExecutor(2), options=[("grpc.max_receive_message_length", 64 << 20)]
    )
    export = grpc.unary_unary_rpc_method_handler(lambda _request, _context: TAKEN)
    handler = grpc.method_handlers_generic_handler(SERVICE, {"Export": export})
    server.add_generic_rpc_handlers((handler,))
    server.add_insecure_port(f"127.0.0.1:{sys.argv[1]}")
    server.start()
    print("serving", flush=True)
    server.wait_for_termination()
