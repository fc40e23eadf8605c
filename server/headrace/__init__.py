"""Headrace: feeds fresh features to models, over gRPC, a batch at a time."""

__version__ = "0.1.0.dev0"
