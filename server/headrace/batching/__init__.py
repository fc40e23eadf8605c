"""Gathering requests into batches."""
