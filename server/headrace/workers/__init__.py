"""Several processes behind one gRPC port, and the one that starts, watches and replaces them."""
