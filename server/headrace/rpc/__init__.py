"""The gRPC edge: the only package that serves gRPC."""
