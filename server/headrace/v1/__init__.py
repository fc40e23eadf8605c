"""Stubs of the protos, made by `make protos`; only this file is in git."""
