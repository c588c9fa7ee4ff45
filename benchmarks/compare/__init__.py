"""Comparison of the throughput of several engines."""
