"""What the servers are called, on the page and in the questions: the keys of `peers.PEERS`."""

GATEWAY, GATEWAY_WITH_FEATURES = "gateway", "gateway with features"
WITHOUT_STREAM, WITHOUT_TRACES = "gateway without the stream", "gateway without traces"
ALL_TRACED, WITHOUT_METRICS = "gateway, every call traced", "gateway without metrics"
TWO_WORKERS = "gateway, two workers"
CEILING, GLUE = "ceiling", "glue"
FLOOR, FLOOR_OF_FIELDS = "floor", "floor of single fields"
AIO, MLSERVER, TRITON = "grpc.aio servicer", "MLServer", "Triton, Python backend"
